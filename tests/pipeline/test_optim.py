"""The optimiser's parameter groups against the official ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from models.classifier import create_classifier
from models.detector import ITPNDetector, create_detector
from models.feature_distillation import create_feature_distillation_model
from models.itpn import create_itpn
from models.key_layouts import official_key
from models.pretraining import create_pretraining_model
from models.segmenter import create_segmenter
from models.variants import get_variant
from pipeline.optim import (
    TASKS,
    ParamSetting,
    Task,
    build_optimizer,
    layer_decay_groups,
    layer_decay_settings,
    param_groups,
    set_lr,
)
from tests.pipeline.samples import debug_networks

EXTRAS = Path(__file__).parents[1] / "golden" / "extras"


def decay_by_name(model: nn.Module, weight_decay: float) -> dict[str, float]:
    """Weight decay of every parameter in a group; fails for one in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [
        (names[id(p)], group["weight_decay"])
        for group in param_groups(model, weight_decay)
        for p in group["params"]
    ]
    assert len(dict(pairs)) == len(pairs), "a parameter is in two groups"
    return dict(pairs)


def official_name(name: str) -> str:
    layout = "clip" if name.startswith("clip.") else "pixel"
    official = official_key(name, layout)
    assert official is not None, f"{name} has no official name"
    return official


@pytest.mark.parametrize("objective", ["pixel", "clip"])
def test_param_groups_of_the_base_model_are_the_official_ones(objective: str) -> None:
    golden = json.loads((EXTRAS / f"param_groups_{objective}_pretrain_base.json").read_text())
    decays = [weight_decay for _, weight_decay in golden["groups"]]
    model: nn.Module
    with torch.device("meta"):
        if objective == "pixel":
            model = create_pretraining_model("itpn_base_patch16_224", mfm_weight=0)
        else:
            model = create_feature_distillation_model("itpn_base_clip_patch16_224", teacher_dim=512)
    ours = {official_name(name): d for name, d in decay_by_name(model, 0.05).items()}
    assert ours == {name: decays[group] for name, group in golden["param_to_group"].items()}


@pytest.mark.parametrize("with_mfm", [True, False])
def test_param_groups_cover_every_trainable_parameter_once(with_mfm: bool) -> None:
    model, _ = debug_networks(with_mfm=with_mfm)
    decays = decay_by_name(model, 0.1)
    assert set(decays) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "decoder.pos_embed" not in decays, "the sin-cos table is frozen"
    heads = {f"mfm.pred.{s}.{kind}" for s in (4, 8, 16) for kind in ("weight", "bias")}
    assert {name for name in decays if name.startswith("mfm.")} == (heads if with_mfm else set())
    for name in heads & set(decays):
        assert decays[name] == (0.1 if name.endswith("weight") else 0.0), name


def test_optimizer_gets_betas_and_lr_and_set_lr_reaches_every_group() -> None:
    model, _ = debug_networks()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.05, betas=(0.8, 0.9))
    assert [(g["lr"], g["betas"]) for g in optimizer.param_groups] == [(0.1, (0.8, 0.9))] * 2
    set_lr(optimizer, 0.2)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.2]


# ---- layer-wise learning rates ----

BASE, LARGE = "itpn_base_patch16_224", "itpn_large_patch16_224"
TABLES = ("relative_position_bias_table", "rel_pos_h", "rel_pos_w")


class Case(NamedTuple):
    """An official assignment: its golden file and how our model of the same shape is built."""

    file: str
    task: Task
    variant: str
    layer_decay: float
    is_clip: bool = False
    num_layers: int | None = None


CASES = [
    Case("pixel_finetune_base", "classification", BASE, 0.6),
    Case("pixel_finetune_large", "classification", LARGE, 0.55),
    Case("clip_finetune_base", "classification", BASE, 0.6, is_clip=True),
    Case("clip_finetune_large", "classification", LARGE, 0.55, is_clip=True),
    Case("fast_tiny", "classification", "fast_itpn_tiny_patch16_224", 0.8),
    Case("fast_small", "classification", "fast_itpn_small_patch16_224", 0.9),
    Case("fast_base", "classification", "fast_itpn_base_patch16_224", 0.9),
    Case("fast_large", "classification", "fast_itpn_large_patch16_256", 0.95),
    Case("det_pixel_base_1x", "detection", BASE, 0.9),
    Case("det_clip_large_1x", "detection", LARGE, 0.95, is_clip=True),
    Case("seg_pixel_base", "segmentation", BASE, 0.9),
    Case("seg_pixel_large", "segmentation", LARGE, 0.95),
    # the official config states 44 layers for a model of 30
    Case("seg_clip_base", "segmentation", BASE, 0.9, is_clip=True, num_layers=44),
]
CLASSIFIERS = [case for case in CASES if case.task == "classification"]
DETECTORS = [case for case in CASES if case.task == "detection"]
SEGMENTERS = [case for case in CASES if case.task == "segmentation"]


@cache
def build(case: Case) -> nn.Module:
    """The full-size model on the meta device, with narrow heads."""
    is_fast = get_variant(case.variant).fast
    scale = 0.1 if case.is_clip or is_fast else None
    with torch.device("meta"):
        if case.task == "classification":
            return create_classifier(
                case.variant, num_classes=1000, rel_pos_bias=not is_fast, init_values=scale
            )
        if case.task == "segmentation":
            return create_segmenter(case.variant, num_classes=5, channels=8, init_values=scale)
        encoder = create_itpn(  # as the official detectors
            case.variant, fpn_depth=1, init_values=scale, decomposed_rel_pos=case.is_clip
        )
        return ITPNDetector(encoder, 5, head_dim=8, fc_dim=8)


def settings_of(model: nn.Module, case: Case, *, quirks: bool) -> dict[str, ParamSetting]:
    return layer_decay_settings(
        model,
        task=case.task,
        layer_decay=case.layer_decay,
        weight_decay=0.05,
        official_quirks=quirks,
        num_layers=case.num_layers if quirks else None,
    )


def golden_settings(case: Case) -> dict[str, tuple[float, float]]:
    """{official name without the official `backbone.`: (lr factor, weight decay)}."""
    golden = json.loads((EXTRAS / f"param_groups_{case.file}.json").read_text())
    return {
        name.removeprefix("backbone."): tuple(golden["groups"][group])
        for name, group in golden["param_to_group"].items()
    }


def trunk_official_name(name: str) -> str | None:
    """Official name of an encoder parameter; None for the head of a detector or segmenter."""
    if name.startswith("backbone.encoder."):
        name = name.removeprefix("backbone.")
    elif name.startswith(("backbone.", "fc_norm.", "head.")):
        name = f"encoder.{name}" if name.startswith("backbone.") else name
    elif not name.startswith("encoder."):
        return None
    return official_name(name)


def assert_settings_equal(
    ours: dict[str, ParamSetting], official: dict[str, tuple[float, float]]
) -> None:
    named = {trunk_official_name(name): setting for name, setting in ours.items()}
    if "pos_embed" in official:  # Fast-iTPN's name of the table
        named["pos_embed"] = named.pop("absolute_pos_embed")
    heads = {setting for name, setting in ours.items() if trunk_official_name(name) is None}
    # the official file has one stand-in for the heads of the detector and of the segmenter
    stand_in = {s for name, s in official.items() if name.startswith("rpn_head.")}
    assert heads == stand_in
    wanted = {name: s for name, s in official.items() if not name.startswith("rpn_head.")}
    assert set(named) - {None} == set(wanted)
    for name, (scale, decay) in wanted.items():
        assert named[name] == (pytest.approx(scale, rel=1e-9), decay), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_layer_decay_with_quirks_is_the_official_one(case: Case) -> None:
    assert_settings_equal(settings_of(build(case), case, quirks=True), golden_settings(case))


@pytest.mark.parametrize("case", CLASSIFIERS, ids=lambda case: case.file)
def test_layer_decay_of_classification_needs_no_quirks(case: Case) -> None:
    assert_settings_equal(settings_of(build(case), case, quirks=False), golden_settings(case))


@pytest.mark.parametrize("case", DETECTORS + SEGMENTERS, ids=lambda case: case.file)
def test_corrected_layer_decay_differs_from_the_official_one_in_the_listed_points_only(
    case: Case,
) -> None:
    model = build(case)
    ours, official = settings_of(model, case, quirks=False), golden_settings(case)
    backbone = model.backbone.encoder.backbone if case.task == "detection" else None
    depths = (backbone or model.encoder.backbone).depths
    num_blocks = sum(depths)
    merges = (depths[0], depths[0] + 1 + depths[1])

    exponent = 1.0 if case.task == "detection" else 13 / (num_blocks + 2)
    rate = case.layer_decay**exponent
    for name, (scale, decay) in ours.items():
        key = trunk_official_name(name)
        if key is None:
            assert scale == 1 and decay == (0.0 if _is_1d(model, name) else 0.05)
            continue
        wanted_scale, wanted_decay = official[key]
        if key.startswith("blocks."):
            index = int(key.split(".")[1])
            layer = index + 1 - sum(index >= merge for merge in merges)
            wanted_scale = rate ** (num_blocks + 1 - layer)
        elif key.startswith(("absolute_pos_embed", "patch_embed")):
            wanted_scale = rate ** (num_blocks + 1)
        if key == "absolute_pos_embed" or key.endswith(TABLES):
            wanted_decay = 0.0
        assert (scale, decay) == (pytest.approx(wanted_scale, rel=1e-9), wanted_decay), name


def _is_1d(model: nn.Module, name: str) -> bool:
    return model.get_parameter(name).ndim <= 1


def test_no_corrected_factor_exceeds_one_where_the_official_ones_do() -> None:
    for case in DETECTORS + SEGMENTERS[:2]:
        model = build(case)
        official = max(s.lr_scale for s in settings_of(model, case, quirks=True).values())
        corrected = settings_of(model, case, quirks=False)
        assert official > 1.01
        assert max(s.lr_scale for s in corrected.values()) == 1.0
        last = next(s for n, s in reversed(corrected.items()) if ".blocks." in n)
        assert last.lr_scale < 1


def test_factors_of_the_base_detector_by_hand() -> None:
    """0.9 from layer to layer: 30 blocks below the neck and heads, the stem below them."""
    settings = settings_of(build(DETECTORS[0]), DETECTORS[0], quirks=False)
    trunk = "backbone.encoder.backbone"
    expected = {
        f"{trunk}.pos_embed": (0.9**31, 0.0),
        f"{trunk}.patch_embed.proj.weight": (0.9**31, 0.05),
        f"{trunk}.blocks.0.mlp.fc1.weight": (0.9**30, 0.05),
        f"{trunk}.blocks.2.mlp.fc1.weight": (0.9**28, 0.05),
        f"{trunk}.blocks.3.reduction.weight": (0.9**28, 0.05),  # the merge after block 2
        f"{trunk}.blocks.4.mlp.fc1.weight": (0.9**27, 0.05),
        f"{trunk}.blocks.31.attn.qkv.weight": (0.9, 0.05),
        f"{trunk}.blocks.31.norm1.weight": (0.9, 0.0),
        "backbone.encoder.pyramid.split_8to4.reduction.weight": (1.0, 0.05),
        "rpn.head.cls_logits.weight": (1.0, 0.05),
        "roi_heads.mask_predictor.mask_fcn_logits.bias": (1.0, 0.0),
    }
    for name, setting in expected.items():
        assert settings[name] == pytest.approx(setting), name


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_layer_decay_groups_cover_every_trainable_parameter_once(task: Task, quirks: bool) -> None:
    model: nn.Module
    if task == "classification":
        model = create_classifier("itpn_debug", num_classes=3)
    elif task == "detection":
        model = create_detector("itpn_debug", num_classes=3, head_dim=8, fc_dim=8)
    else:
        model = create_segmenter("itpn_debug", num_classes=3, img_size=64, channels=8)
    frozen = next(p for p in model.parameters())
    frozen.requires_grad_(False)
    groups = layer_decay_groups(
        model, task=task, layer_decay=0.5, weight_decay=0.05, official_quirks=quirks
    )
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(set(ids)) == len(ids), "a parameter is in two groups"
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    scales = [group["lr_scale"] for group in groups]
    assert scales == sorted(scales)


def test_a_layer_decay_of_one_changes_no_learning_rate() -> None:
    model = create_classifier("itpn_debug", num_classes=3)
    groups = layer_decay_groups(model, task="classification", layer_decay=1.0, weight_decay=0.05)
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1.0, 0.0), (1.0, 0.05)]


def test_the_optimizer_steps_each_layer_at_its_own_rate_under_any_schedule() -> None:
    model = create_classifier("itpn_debug", num_classes=3)
    groups = layer_decay_groups(model, task="classification", layer_decay=0.5, weight_decay=0.0)
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.0, betas=(0.9, 0.999), groups=groups)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    stem, head = model.backbone.patch_embed.proj.weight, model.head.weight
    assert rates[id(head)] == 0.1
    assert rates[id(stem)] == pytest.approx(0.1 * 0.5**13)

    set_lr(optimizer, 0.2)
    assert optimizer.param_groups[-1]["lr"] == 0.2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # the first step of Adam is the learning rate, whatever the gradient
    for name, p in model.named_parameters():
        step = float((before[name] - p.detach()).max())
        # Adam's eps and float32 rounding of values up to one
        assert step == pytest.approx(2 * rates[id(p)], rel=1e-3, abs=2e-7), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"task": "depth"},
            r"unknown task 'depth'\. Known: classification, detection, segmentation",
        ),
        ({"layer_decay": 1.2}, r"layer_decay=1.2 must be in \(0, 1\]"),
        ({"layer_decay": 0.0}, r"layer_decay=0.0 must be in \(0, 1\]"),
        ({"num_layers": 44}, "num_layers=44 .* unless official_quirks=True"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    model = create_classifier("itpn_debug", num_classes=3)
    arguments = {"task": "classification", "layer_decay": 0.9, "weight_decay": 0.05, **change}
    with pytest.raises(ValueError, match=message):
        layer_decay_groups(model, **arguments)
