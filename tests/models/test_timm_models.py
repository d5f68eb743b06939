"""Our models under timm: the checks timm makes of its own, and what they return, by value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from models import timm_models
from models.feature_maps import fold_cells
from models.itpn import ITPN, create_itpn
from models.timm_models import register_timm_models
from models.variants import VARIANTS
from tests.conftest import REPO_ROOT
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread", "registered")

FAMILIES = ("itpn_debug", "fast_itpn_debug")
CHANNELS = {4: 8, 8: 16, 16: 32}  # of both debug variants
FPN_DIM = 16


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    register_timm_models()
    yield


def create(name: str, **kwargs: Any) -> Any:
    """Random weights, off their initial values, in evaluation mode."""
    return tiny.randomize(timm.create_model(name, **kwargs)).eval()


def encoder_and(name: str, **kwargs: Any) -> tuple[ITPN, Any]:
    """An encoder and timm's features_only model with the same weights."""
    encoder = tiny.randomize(create_itpn(name, rel_pos_bias=False)).eval()
    model = timm.create_model(name, features_only=True, rel_pos_bias=False, **kwargs).eval()
    model.load_state_dict(encoder.state_dict())
    return encoder, model


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(images)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    torch.stack([x.square().mean() for x in outputs]).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---- registration ----


def test_every_variant_is_listed_once_and_registering_again_changes_nothing(
    recwarn: pytest.WarningsRecorder,
):
    before = [timm.model_entrypoint(name) for name in VARIANTS]
    register_timm_models()
    assert [timm.model_entrypoint(name) for name in VARIANTS] == before
    assert not [w for w in recwarn if "Overwriting" in str(w.message)]
    assert set(timm.list_models(module="timm_models")) == set(VARIANTS)
    assert not timm.list_models("*itpn*", pretrained=True)


def test_a_name_that_timm_has_is_refused_and_stays_timms(monkeypatch: pytest.MonkeyPatch):
    resnet = timm.model_entrypoint("resnet18")
    monkeypatch.setitem(VARIANTS, "resnet18", VARIANTS["itpn_debug"])
    with pytest.raises(ValueError, match=r"has a model 'resnet18' already \(timm\.models\.resnet"):
        register_timm_models()
    assert timm.model_entrypoint("resnet18") is resnet


def test_a_timm_that_unpickles_checkpoints_is_refused(monkeypatch: pytest.MonkeyPatch):
    def load_checkpoint(model: nn.Module, path: str, weights_only: bool = False) -> None: ...

    monkeypatch.setattr(timm_models, "load_checkpoint", load_checkpoint)
    with pytest.raises(ValueError, match=r"unpickles .* install timm>=1\.0\.26"):
        register_timm_models()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds_with_parts_named_as_its_cfg_says(name: str):
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg, state = model.pretrained_cfg, model.state_dict()
    side, dim = variant.img_size, variant.embed_dim
    assert cfg["input_size"] == (3, side, side) and not cfg["fixed_input_size"]
    assert cfg["crop_pct"] == {64: 0.875, 224: 0.875, 256: 1.0}[side]
    assert cfg["mean"][0] == (0.5 if "clip" in name else 0.485) and "url" not in cfg
    assert state[f"{cfg['classifier']}.weight"].shape == (1000, dim)
    assert state[f"{cfg['first_conv']}.weight"].shape == (dim // 4, 3, 4, 4)
    assert [i["num_chs"] for i in model.feature_info] == [dim // 4, dim // 2, dim]
    for info in model.feature_info:
        weight = model.get_submodule(info["module"]).norm2.weight
        assert weight.shape == (info["num_chs"],)
    assert bool([n for n in state if "bias_table" in n]) != variant.fast


@pytest.mark.parametrize("name", FAMILIES)
def test_data_configuration_and_transform_are_resolved(name: str):
    config = resolve_model_data_config(create(name))
    assert config["input_size"] == (3, 64, 64) and config["interpolation"] == "bicubic"
    assert "CenterCrop(size=(64, 64))" in str(create_transform(**config))


def test_what_can_not_be_done_is_said_with_the_way_out():
    with pytest.raises(ValueError, match=r"no weights are hosted for 'itpn_debug'.*checkpoint"):
        timm.create_model("itpn_debug", pretrained=True)
    with pytest.raises(ValueError, match=r"neck=True .* add features_only=True"):
        timm.create_model("itpn_debug", neck=True)
    with pytest.raises(ValueError, match=r"feature_cls='hook' .* leave feature_cls out"):
        timm.create_model("itpn_debug", features_only=True, feature_cls="hook")
    with pytest.raises(ValueError, match=r"img_size=\(64, 96\): .* pass one side"):
        timm.create_model("itpn_debug", img_size=(64, 96))
    model = timm.create_model("itpn_debug")
    with pytest.raises(ValueError, match="norm=True: only the last stage has a norm"):
        model.forward_intermediates(tiny.images(), norm=True)
    with pytest.raises(ValueError, match="output_fmt='NCL' is unknown; use one of NCHW, NHWC, NLC"):
        model.forward_intermediates(tiny.images(), output_fmt="NCL")
    with pytest.raises(ValueError, match=r"patch_size=8: .* the patch size stays 16"):
        model.set_input_size(64, 8)


# ---- the classifier, as timm's test_models.py ----


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_the_head_of_pooled_normalised_tokens_at_any_size(name: str):
    model = create(name, num_classes=5)
    for height, width in ((64, 64), (96, 32)):
        images = tiny.images(height=height, width=width)
        tokens = model.forward_features(images)
        assert tokens.shape == (2, height * width // 256, model.num_features)
        hidden = model.fc_norm(tokens.mean(1))
        assert hidden.shape[1] == model.head_hidden_size
        assert torch.equal(model.forward_head(tokens, pre_logits=True), hidden)
        assert torch.equal(model(images), hidden @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_classes_the_features_come_out_pooled_or_not(name: str):
    model, images = create(name), tiny.images()
    tokens = model.forward_features(images)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), model.fc_norm(tokens.mean(1)))
    model.reset_classifier(0, "")
    assert torch.equal(model(images), model.fc_norm(tokens))
    built = timm.create_model(name, num_classes=0, global_pool="").eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(images), model(images))
    model.reset_classifier(3, "avg")
    assert model(images).shape == (2, 3) and model.get_classifier() is model.head


@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_reach_the_model(name: str):
    model = timm.create_model(
        name, num_classes=4, img_size=96, in_chans=1, drop_path_rate=0.3, drop_rate=0.2
    )
    assert model(torch.randn(2, 1, 96, 96)).shape == (2, 4) and model.in_chans == 1
    assert model.backbone.pos_embed.shape == (1, 36, 32)
    drop_paths = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert max(drop_paths) == 0.3
    ones, model.head = torch.ones(2, 36, 32), nn.Identity()
    model.fc_norm = nn.Identity()
    dropped = model.train().forward_head(ones)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient_and_checkpointing_the_same(name: str):
    model, images = create(name, num_classes=42).train(), tiny.images()
    plain = gradients(model, images)
    assert set(plain) == {n for n, _ in model.named_parameters()}
    assert all(g.any() for g in plain.values())
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    again = gradients(model, images)
    assert all(torch.equal(g, again[n]) for n, g in plain.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_decay_of_timms_optimizers_orders_stem_blocks_and_head(name: str):
    model = create(name)
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.5)
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p]: g for g in optimizer.param_groups for p in g["params"]}
    assert set(found) == set(names.values())
    assert found["backbone.pos_embed"]["weight_decay"] == 0.0
    assert found["head.weight"]["weight_decay"] == 0.05 and found["head.weight"]["lr_scale"] == 1.0
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    depth = max(layers.values())
    assert {n: g["lr_scale"] for n, g in found.items()} == {
        n: 0.5 ** (depth - layers[n]) for n in found
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_another_input_size_resizes_the_tables_as_reading_weights_does(name: str):
    model, other = create(name), timm.create_model(name, img_size=96).eval()
    other.load_state_dict(model.state_dict())
    images = tiny.images(height=96, width=96)
    assert not torch.equal(model(images), other(images))
    model.set_input_size((96, 96))
    assert torch.equal(model(images), other(images))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in other.named_parameters()
    }
    assert all(p.is_contiguous() for p in model.parameters())  # safetensors asks for it
    with pytest.raises(ValueError, match="img_size=100 must be a multiple of patch_size=16"):
        model.set_input_size(100)


# ---- features ----


@pytest.mark.parametrize("neck", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_encoders_folded_to_maps(name: str, neck: bool):
    encoder, model = encoder_and(name, neck=neck)
    images = tiny.images(height=64, width=96)
    outputs, expected = model(images), encoder(images)
    expected = expected.pyramid if neck else expected.stages
    assert len(outputs) == 3
    for output, stride in zip(outputs, tiny.STRIDES, strict=True):
        assert torch.equal(output, fold_cells(expected[stride], (4, 6)))
        assert output.shape[-2:] == (64 // stride, 96 // stride)
    assert model.feature_info.channels() == [FPN_DIM] * 3 if neck else list(CHANNELS.values())
    assert model.feature_info.reduction() == list(tiny.STRIDES)
    assert [x.shape[1] for x in outputs] == model.feature_info.channels()
    # the module named for a level is the last to touch it
    last: list[Tensor] = []
    module = model.model.get_submodule(model.feature_info.module_name()[0])
    module.register_forward_hook(lambda *args: last.append(args[-1]))
    assert torch.equal(model(images)[0], fold_cells(last[0], (4, 6)))


@pytest.mark.parametrize("out_indices", [(0,), (0, 1), (1,), (0, 2), (-1, 0), 2])
@pytest.mark.parametrize("neck", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_chosen_features_are_those_of_all_and_as_their_info_says(
    name: str, neck: bool, out_indices: Any
):
    encoder, model = encoder_and(name, neck=neck, out_indices=out_indices)
    complete = timm.create_model(name, features_only=True, neck=neck, rel_pos_bias=False).eval()
    complete.load_state_dict(encoder.state_dict())
    images = tiny.images()
    wanted = [1, 2] if out_indices == 2 else list(out_indices)
    outputs, of_all = model(images), complete(images)
    assert len(outputs) == len(wanted)
    assert all(torch.equal(x, of_all[i]) for x, i in zip(outputs, wanted, strict=True))
    assert model.feature_info.channels() == [x.shape[1] for x in outputs]
    assert model.feature_info.reduction() == [64 // x.shape[2] for x in outputs]


@pytest.mark.parametrize("out_indices", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_not_asked_for_are_pruned_and_all_that_is_left_learns(
    name: str, out_indices: tuple[int, ...]
):
    model = create(name, features_only=True, out_indices=out_indices).train()
    found = gradients(model, tiny.images())
    assert set(found) == {n for n, _ in model.named_parameters()}
    stages = {4: 1, 8: 3, 16: 5}[tiny.STRIDES[out_indices[-1]]]
    assert len(model.model.backbone.blocks) == stages
    assert not any("norm" in n and "backbone" not in n for n in found)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_neck_learns_whole_and_with_checkpointing_the_same(name: str):
    model, images = create(name, features_only=True, neck=True).train(), tiny.images()
    plain = gradients(model, images)
    assert set(plain) == {n for n, _ in model.named_parameters()}
    model.set_grad_checkpointing()
    assert model.model.backbone.grad_checkpointing
    again = gradients(model, images)
    assert all(torch.equal(g, again[n]) for n, g in plain.items())


# ---- intermediates ----


@pytest.mark.parametrize("name", FAMILIES)
def test_intermediates_are_one_per_stage_beside_forward_features(name: str):
    model, images = create(name), tiny.images(height=64, width=96)
    tokens, maps = model.forward_intermediates(images)
    assert torch.equal(tokens, model.forward_features(images))
    assert [x.shape[1] for x in maps] == [i["num_chs"] for i in model.feature_info]
    stages = model.backbone(images)
    assert all(
        torch.equal(x, fold_cells(stages[s], (4, 6)))
        for x, s in zip(maps, tiny.STRIDES, strict=True)
    )
    _, nhwc = model.forward_intermediates(images, output_fmt="NHWC")
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(nhwc, maps, strict=True))
    only = model.forward_intermediates(images, [2, 0], intermediates_only=True)
    assert torch.equal(only[0], maps[2]) and torch.equal(only[1], maps[0])
    (rows,) = model.get_intermediate_layers(images, [1])
    assert torch.equal(rows, maps[1].flatten(2).transpose(1, 2))
    last_two = model.get_intermediate_layers(images, 2, reshape=True)
    assert all(torch.equal(a, b) for a, b in zip(last_two, maps[1:], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_stopping_early_computes_no_later_block_and_pruning_keeps_the_values(name: str):
    model, images = create(name), tiny.images()
    _, maps = model.forward_intermediates(images)
    calls: list[int] = []
    for i, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    tokens, (first,) = model.forward_intermediates(images, [0], stop_early=True)
    assert calls == [0] and torch.equal(first, maps[0])
    # the tokens are the map's cells in another order: equal sums up to float32 rounding
    torch.testing.assert_close(tokens.mean(1), first.mean((2, 3)))
    assert model.prune_intermediate_layers([-2, 0]) == [1, 0]
    assert model.num_features == model.head_hidden_size == CHANNELS[8]
    tokens, again = model.forward_intermediates(images)
    assert len(again) == 2 and torch.equal(again[1], maps[1]) and torch.equal(again[0], maps[0])
    torch.testing.assert_close(model(images), maps[1].mean((2, 3)))
    model.reset_classifier(6)
    assert model(images).shape == (2, 6)


# ---- the documentation ----


def test_the_code_of_the_documentation_runs_and_gives_the_shapes_it_says(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    text = (REPO_ROOT / "docs" / "models.md").read_text()
    code, of_tokens = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    save_file(create_itpn("itpn_tiny_patch16_224").state_dict(), tmp_path / "encoder.safetensors")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    for line in code.splitlines():
        if found := re.match(r"(\w+) = .*# ((?:\(\d[\d, ]*\)(?:, )?)+)$", line):
            value = namespace[found[1]]
            shapes = [tuple(x.shape) for x in (value if isinstance(value, list) else [value])]
            assert ", ".join(map(str, shapes)) == found[2], line
            namespace[found[1]] = "checked"
    assert list(namespace.values()).count("checked") == 4
    exec(of_tokens, namespace)
    ordinary = create_itpn("fast_itpn_tiny_patch16_224")(torch.randn(2, 3, 224, 224)).stages
    assert {s: x.shape for s, x in namespace["stages"].items()} == {
        s: x.shape for s, x in ordinary.items()
    }
