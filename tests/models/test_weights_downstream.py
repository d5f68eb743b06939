"""Pre-trained weights in the three downstream models: what loads, what is new, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.classifier import ITPNClassifier, create_classifier
from models.detector import ITPNDetector, PyramidBackbone, create_detector
from models.hivit import HiViT
from models.itpn import ITPN, create_itpn
from models.segmenter import ITPNSegmenter, create_segmenter
from models.weights import load_weights, to_official
from tests.models import tiny
from tests.models.golden import GOLDEN_DIR

pytestmark = pytest.mark.usefixtures("one_thread")

BIAS_TABLE = "relative_position_bias_table"


def classifier() -> ITPNClassifier:
    return create_classifier("itpn_debug", num_classes=5)


def detector() -> ITPNDetector:
    return create_detector("itpn_debug", num_classes=5, head_dim=16, fc_dim=32)


def segmenter() -> ITPNSegmenter:
    return create_segmenter("itpn_debug", num_classes=5, img_size=96, channels=16)


def encoder_of(model: nn.Module) -> ITPN:
    """The encoder of a detector or segmenter."""
    encoder = model.backbone.encoder if isinstance(model, ITPNDetector) else model.encoder
    assert isinstance(encoder, ITPN)
    return encoder


def backbone_of(model: nn.Module) -> HiViT:
    return model.backbone if isinstance(model, ITPNClassifier) else encoder_of(model).backbone


MODELS: dict[str, Callable[[], nn.Module]] = {
    "classifier": classifier,
    "detector": detector,
    "segmenter": segmenter,
}
HEADS = {
    "classifier": {"fc_norm", "head"},
    "detector": {"rpn", "roi_heads"},
    "segmenter": {"decode_head", "auxiliary_head"},
}


@pytest.fixture
def pretrained() -> ITPN:
    """An encoder as pre-training leaves it: no relative bias."""
    return tiny.randomize(create_itpn("itpn_debug"))


@pytest.mark.parametrize("layout", ["own file", "official"])
@pytest.mark.parametrize("task", MODELS)
def test_a_pretrained_encoder_fills_all_but_heads_and_bias_tables(
    task: str, layout: str, pretrained: ITPN, tmp_path: Path
):
    source: Path | dict[str, Tensor] = tmp_path / "encoder.safetensors"
    if layout == "own file":
        save_file(pretrained.state_dict(), source)
    else:
        source = to_official(pretrained)
    model = MODELS[task]()
    report = load_weights(model, source)

    tables = [name for name in report.new if BIAS_TABLE in name]
    assert len(tables) == (0 if task == "detector" else 1)  # one attention block
    assert all(not model.get_parameter(name).any() for name in tables), "they start at zero"
    assert {n.split(".")[0] for n in report.new if n not in tables} == HEADS[task]
    assert not report.resized, "the position table keeps its size and is interpolated in forward"

    loaded = backbone_of(model).state_dict()
    for name, tensor in pretrained.backbone.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    if task == "classifier":
        assert {".".join(key.split(".")[:2]) for key in report.dropped} == {"encoder.pyramid"}
    else:
        assert not report.dropped
        loaded = encoder_of(model).pyramid.state_dict()
        for name, tensor in pretrained.pyramid.state_dict().items():
            assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("task", MODELS)
def test_a_fine_tuned_model_restores_itself_whole(task: str):
    source, target = tiny.randomize(MODELS[task]()), MODELS[task]()
    report = load_weights(target, source.state_dict())
    assert not (report.new or report.dropped or report.resized)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_fine_tuned_classifier_starts_a_detector_whose_neck_and_heads_are_new():
    source, target = tiny.randomize(classifier()), detector()
    report = load_weights(target, source.state_dict())
    neck_and_heads = {name.split(".pyramid.")[0].split(".")[0] for name in report.new}
    assert neck_and_heads == {"backbone", "rpn", "roi_heads"}
    assert not any(".encoder.backbone." in name for name in report.new)
    assert {key.split(".")[0] for key in report.dropped} == {"encoder", "fc_norm", "head"}
    assert any(BIAS_TABLE in key for key in report.dropped), "the detector has no relative bias"


def test_bias_tables_of_another_size_are_resized_and_reported():
    source = tiny.randomize(create_itpn("itpn_debug", rel_pos_bias=True))  # 4x4 tokens
    target = segmenter()  # 6x6 tokens
    report = load_weights(target, source.state_dict())
    assert report.resized == [f"encoder.backbone.blocks.4.attn.{BIAS_TABLE}"]


def test_position_tables_of_the_native_size_are_left_bit_for_bit(pretrained: ITPN):
    model = create_classifier("itpn_debug", num_classes=5, img_size=64, rel_pos_bias=False)
    load_weights(model, pretrained.state_dict())
    assert torch.equal(model.backbone.pos_embed, pretrained.backbone.pos_embed)
    images = tiny.images()
    expected = pretrained.backbone.eval()(images)[16]
    assert torch.equal(model.eval().backbone(images)[16], expected)


@pytest.mark.parametrize(
    "create",
    [
        partial(create_detector, head_dim=16, fc_dim=32),
        partial(create_segmenter, img_size=64, channels=16),
    ],
)
def test_a_model_built_for_the_size_of_pretraining_keeps_its_position_table(
    create: Callable[..., nn.Module],
):
    encoder = tiny.randomize(create_itpn("itpn_debug", img_size=160))
    model = create("itpn_debug", num_classes=2, pos_embed_size=160)
    report = load_weights(model, encoder.state_dict())
    assert report.resized == []
    assert torch.equal(backbone_of(model).pos_embed, encoder.backbone.pos_embed)
    assert backbone_of(model).pos_embed.shape[1] == 100
    assert backbone_of(create("itpn_debug", num_classes=2)).pos_embed.shape[1] == 16  # its own


@pytest.mark.parametrize("task", MODELS)
def test_zero_bias_tables_do_not_change_what_pretraining_computed(task: str, pretrained: ITPN):
    model = MODELS[task]().eval()
    load_weights(model, pretrained.state_dict())
    images = tiny.images(height=96, width=64)
    ours, expected = backbone_of(model)(images), pretrained.backbone.eval()(images)
    for stride in tiny.STRIDES:  # a bias of zeros takes another attention kernel: float32 rounding
        torch.testing.assert_close(ours[stride], expected[stride], atol=1e-5, rtol=1e-5)


# ---- refusals ----


@pytest.mark.parametrize("task", MODELS)
def test_weights_that_match_nothing_are_refused_with_the_report(task: str):
    model = MODELS[task]()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    decoder_only = {"decoder_norm.weight": torch.ones(32), "mask_token": torch.ones(1, 1, 32)}
    message = r"no backbone weight .* random weights:\nmatched +0 "
    with pytest.raises(ValueError, match=message) as e:
        load_weights(model, decoder_only)
    assert "dropped by design     2" in str(e.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("task", MODELS)
def test_heads_alone_are_refused(task: str):
    model = MODELS[task]()
    state = {n: t for n, t in model.state_dict().items() if n.split(".")[0] in HEADS[task]}
    with pytest.raises(ValueError, match="no backbone weight"):
        load_weights(model, state)


@pytest.mark.parametrize("task", MODELS)
def test_weights_of_a_foreign_network_are_refused(task: str):
    with pytest.raises(ValueError, match=r"unexpected key encoder\.backbone\.layer1\.0"):
        load_weights(MODELS[task](), {"backbone.layer1.0.conv1.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("task", MODELS)
def test_another_variant_is_refused_with_its_width_and_the_first_shapes(task: str):
    other = create_itpn("itpn_nano_patch16_224")
    message = (
        r"build the model with the dimensions of the checkpoint: it is of another variant "
        r"\(embed_dim 128, not 32\):\n  \S*pos_embed: shape \(1, 196, 128\) does not fit "
        r"\(1, 16, 32\)\n  \S*patch_embed.proj.weight: shape \(32, 3, 4, 4\) does not fit"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(MODELS[task](), other.state_dict())


def test_a_neck_of_another_depth_is_refused_unless_allowed(pretrained: ITPN):
    deeper = create_itpn("itpn_debug", fpn_depth=2)
    shallow = PyramidBackbone(create_itpn("itpn_debug"))
    with pytest.raises(ValueError, match=r"unexpected key encoder\.pyramid\.block_16to8\.1"):
        load_weights(shallow, deeper.state_dict())
    report = load_weights(shallow, deeper.state_dict(), allow=("encoder.pyramid.block_",))
    assert len(report.dropped) == 12
    with pytest.raises(ValueError, match=r"missing key pyramid\.block_16to8\.1"):
        load_weights(deeper, pretrained.state_dict())
    report = load_weights(deeper, pretrained.state_dict(), allow=("encoder.pyramid.block_",))
    assert len(report.new) == 12


# ---- full-size official models ----


def official_state(variant: str) -> dict[str, Tensor]:
    """A full-size official state dict on the meta device."""
    keys = json.loads((GOLDEN_DIR / "full" / f"{variant}.json").read_text())["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape, *_ in keys}


@cache
def full_size(variant: str) -> ITPN:
    """The encoder of an official detector or segmenter, on the meta device."""
    task, teacher, size = variant.split("_")
    with torch.device("meta"):
        return create_itpn(
            f"itpn_{size}_patch16_224",
            fpn_depth=1 if task == "det" else 2,
            init_values=0.1 if teacher == "clip" else None,
            **({} if task == "det" else {"img_size": 512, "pos_embed_size": 224}),
            rel_pos_bias=task == "seg",
            decomposed_rel_pos=variant == "det_clip_large",
        )


FULL_SIZE = sorted(
    path.stem
    for path in (GOLDEN_DIR / "full").glob("*.json")
    if path.stem.startswith(("det_", "seg_"))
)


def test_all_official_detectors_and_segmenters_are_there():
    assert len(FULL_SIZE) == 7


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_keys_and_shapes_of_downstream_encoders_are_the_official_ones(variant: str):
    official = {key: tuple(t.shape) for key, t in official_state(variant).items()}
    ours = {key: tuple(t.shape) for key, t in to_official(full_size(variant)).items()}
    assert ours == official
    info = json.loads((GOLDEN_DIR / "full" / f"{variant}.json").read_text())
    assert sum(p.numel() for p in full_size(variant).parameters()) == info["params_total"]


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_transfer_counts_into_detection_and_segmentation_are_the_official_ones(variant: str):
    source = variant.split("_", 1)[1].replace("_", "_pretrain_")
    transfers = json.loads((GOLDEN_DIR / "extras" / "transfer_report.json").read_text())
    expected = transfers[f"{source} -> {variant}"]
    with torch.device("meta"):
        report = load_weights(
            full_size(variant), official_state(source), allow=("encoder.pyramid.block_",)
        )
    # The index is recomputed from the grid, never stored; tables of another size are resized here.
    index, tables = "relative_position_index", "blocks.*.attn.relative_position_bias_table"
    counts = {
        k: {n: c for n, c in v.items() if n != index} for k, v in expected.items() if k != "loaded"
    }
    # official counts have the index among the loaded where both have one of the same size
    with_index = variant == "det_clip_large"
    assert len(report.matched) == expected["loaded"] - with_index
    assert len(report.new) == sum(counts["missing_in_ckpt"].values())
    assert len(report.dropped) == sum(counts["unused_from_ckpt"].values())
    resized = counts["shape_mismatch"].get(tables, {"count": 0})
    assert len(report.resized) == resized["count"]


def test_tables_of_a_fine_tuned_classifier_are_resized_for_a_segmenter_as_officially():
    """Counts of golden/extras/transfer_report.json, "pixel_finetune_base -> seg_pixel_base"."""
    transfers = json.loads((GOLDEN_DIR / "extras" / "transfer_report.json").read_text())
    expected = transfers["pixel_finetune_base -> seg_pixel_base"]
    source = official_state("pixel_finetune_base")
    with torch.device("meta"):
        report = load_weights(full_size("seg_pixel_base"), source)
    assert len(report.matched) == expected["loaded"]
    tables = expected["shape_mismatch"]["blocks.*.attn.relative_position_bias_table"]
    assert len(report.resized) == tables["count"]
    assert len(report.new) == sum(expected["missing_in_ckpt"].values())
    assert len(report.dropped) == sum(expected["unused_from_ckpt"].values())


def test_what_only_clip_pretraining_has_is_dropped_by_design(pretrained: ITPN):
    """Names of the official CLIP pre-training model: golden/d1_clip_pretrain.json."""
    state = to_official(pretrained)
    names = ("cls_pt_layers.0.norm1.bias", "lm_head.bias", "lm_cls_head.bias", "norm.bias")
    state |= {name: torch.zeros(2) for name in (*names, "norm_cls.bias")}
    report = load_weights(detector(), state)
    assert len(report.dropped) == 5
    assert all(key.startswith("clip.") for key in report.dropped)
