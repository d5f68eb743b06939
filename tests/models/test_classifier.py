"""The classifier: any size, fresh heads, drop path, layers, and gradients to every parameter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import group_parameters

from models.classifier import ITPNClassifier, create_classifier
from models.layers import RelativePositions
from models.pos_embed import relative_position_index
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

BIAS_TABLE = "relative_position_bias_table"


def classifier(**kwargs: object) -> ITPNClassifier:
    return create_classifier("itpn_debug", num_classes=5, **kwargs)


# ---- any input size ----


@pytest.mark.parametrize("rel_pos_bias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (160, 224), (16, 48)])
def test_any_size_of_whole_patches_is_classified(height: int, width: int, rel_pos_bias: bool):
    model = tiny.randomize(classifier(rel_pos_bias=rel_pos_bias)).eval()
    tables = {n: p.detach().clone() for n, p in model.named_parameters() if "pos" in n}
    logits = model(tiny.images(height=height, width=width))
    assert logits.shape == (2, 5) and logits.isfinite().all()
    for name, table in tables.items():  # interpolated for the forward, never in place
        assert torch.equal(model.get_parameter(name), table), name


def test_a_size_between_patches_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"100x64 is not a multiple .* 16; use 96x64"):
        classifier()(tiny.images(height=100))


def test_a_smooth_bias_table_means_the_same_distance_at_twice_the_resolution():
    """A bias linear in the offset, resized, still grows linearly: offsets are rescaled."""
    attention = classifier().backbone.blocks[-1].attn
    offsets = torch.arange(-3.0, 4.0)  # 4x4 tokens
    with torch.no_grad():
        table = (offsets[:, None] + 10 * offsets[None, :]).reshape(-1, 1)
        attention.relative_position_bias_table.copy_(table.expand(-1, 2))
    bias = attention.position_bias(RelativePositions(relative_position_index((8, 8)), (8, 8)))
    # tokens in the middle, away from the edge where interpolation repeats the last value; torch's
    # bicubic kernel (a = -0.75) bends a straight line by up to 2 %
    row, column = bias.detach()[0, 3 * 8 + 3, [2 * 8 + 3, 3 * 8 + 2]].tolist()
    assert row == pytest.approx(7 / 15, rel=0.03)  # 7 rows of offsets stretched over 15
    assert column == pytest.approx(70 / 15, rel=0.03)


# ---- head ----


def test_a_reset_classifier_has_a_fresh_head_and_an_unchanged_trunk():
    model, images = tiny.randomize(classifier()).eval(), tiny.images()
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "head." not in n}
    model.reset_classifier(9)
    assert model.num_classes == 9 and model(images).shape == (2, 9)
    assert not model.head.bias.any()
    tiny.assert_std(model.head.weight, 2e-5, "head.weight")
    for name, tensor in before.items():
        assert torch.equal(model.get_parameter(name), tensor), name
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)


def test_a_reset_head_follows_the_dtype_of_the_model():
    model = classifier().double()
    model.reset_classifier(3)
    assert model(tiny.images().double()).dtype == torch.float64


def test_a_negative_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes=-1 must be >= 0"):
        classifier().reset_classifier(-1)


def test_the_head_starts_at_the_deviation_asked_for():
    backbone = classifier().backbone
    model = ITPNClassifier(backbone, 1000, head_init_std=0.02)
    tiny.assert_std(model.head.weight, 0.02, "head.weight")


# ---- training ----


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_gradients_reach_every_parameter(init_values: float | None):
    model = tiny.randomize(classifier(init_values=init_values)).train()
    F.cross_entropy(model(tiny.images()), torch.tensor([0, 3])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_bias_tables_learn_at_another_size_too():
    model = tiny.randomize(classifier()).train()
    model(tiny.images(height=96, width=32)).square().sum().backward()
    assert model.get_parameter(f"backbone.blocks.4.attn.{BIAS_TABLE}").grad.any()


def test_layer_scale_starts_at_its_value_and_zero_switches_the_blocks_off():
    model = classifier(init_values=0.1)
    gammas = {n: p for n, p in model.named_parameters() if "gamma_" in n}
    # stages 1 and 2 have one branch, stage 3 two
    assert [n.removeprefix("backbone.blocks.") for n in gammas] == [
        "0.gamma_2",
        "2.gamma_2",
        "4.gamma_1",
        "4.gamma_2",
    ]
    assert all(bool((p == 0.1).all()) for p in gammas.values())
    off = classifier(init_values=0.0)
    images = tiny.images()
    x = off.backbone.patch_embed(images)
    x = off.backbone.blocks[3](off.backbone.blocks[1](x)).flatten(2) + off.backbone.pos_embed
    assert torch.equal(off.forward_features(images), x)


def test_drop_path_is_passed_to_the_trunk():
    model = classifier(drop_path_rate=0.3)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)][-1] == 0.3


# ---- layers ----


def test_layers_are_stem_blocks_with_their_merges_and_head():
    layers = group_parameters(classifier(), classifier().group_matcher(), reverse=True)
    by_module = {name.removeprefix("backbone."): layer for name, layer in layers.items()}
    assert by_module["pos_embed"] == by_module["patch_embed.proj.weight"] == 0
    assert by_module["blocks.0.norm2.weight"] == by_module["blocks.1.norm.weight"] == 1
    assert by_module["blocks.2.norm2.weight"] == by_module["blocks.3.norm.weight"] == 2
    assert by_module[f"blocks.4.attn.{BIAS_TABLE}"] == 3
    assert by_module["fc_norm.weight"] == by_module["head.bias"] == 4


def test_coarse_layers_are_the_stages():
    model = create_classifier("itpn_debug", num_classes=5)
    layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert {n.split(".")[2]: i for n, i in layers.items() if "blocks" in n} == {
        "0": 1,
        "1": 1,
        "2": 2,
        "3": 2,
        "4": 3,
    }


def test_position_tables_are_named_as_undecayed():
    assert classifier().no_weight_decay() == {
        "backbone.pos_embed",
        f"backbone.blocks.4.attn.{BIAS_TABLE}",
    }
