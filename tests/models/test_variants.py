"""The named models: official parameter counts and keys, names, and the debug model running."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from models.classifier import ITPNClassifier, create_classifier
from models.feature_distillation import create_feature_distillation_model
from models.itpn import create_itpn
from models.pretraining import create_pretraining_model
from models.variants import VARIANTS, get_variant
from models.weights import to_official
from tests.models import tiny
from tests.models.golden import GOLDEN_DIR

TEACHER_DIMS = {"base": 512, "large": 768, "large_256": 768}
# detectors and segmenters: test_weights_downstream.py
OFFICIAL = sorted(
    path.stem
    for path in (GOLDEN_DIR / "full").glob("*.json")
    if path.stem.startswith(("pixel_", "clip_", "fast_"))
)


def official_info(file: str) -> dict[str, Any]:
    return json.loads((GOLDEN_DIR / "full" / f"{file}.json").read_text())


@cache
def build(file: str) -> nn.Module:
    """The full-size model of a golden file on the meta device: shapes without memory."""
    family, *rest = file.split("_")
    with torch.device("meta"):
        if family == "fast":
            name = f"fast_itpn_{rest[0]}_patch16_{rest[1]}"
            return create_classifier(name, num_classes=1000, rel_pos_bias=False)
        kind, size = rest[0], "_".join(rest[1:])
        side = 256 if size.endswith("256") else 224
        teacher = "_clip" if family == "clip" else ""
        name = f"itpn_{size.removesuffix('_256')}{teacher}_patch16_{side}"
        if kind == "finetune":
            return create_classifier(name, num_classes=1000)
        if family == "clip":
            return create_feature_distillation_model(name, teacher_dim=TEACHER_DIMS[size])
        return create_pretraining_model(name, mfm_weight=0)


def test_all_official_families_are_there():
    assert len(OFFICIAL) == 13


@pytest.mark.parametrize("file", OFFICIAL)
def test_parameter_counts_are_the_official_ones(file: str):
    info, parameters = official_info(file), list(build(file).parameters())
    assert sum(p.numel() for p in parameters) == info["params_total"]
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert trainable == info["params_trainable"]


@pytest.mark.parametrize("file", OFFICIAL)
def test_keys_and_shapes_are_the_official_ones(file: str):
    ours = [[key, list(t.shape)] for key, t in sorted(to_official(build(file)).items())]
    assert ours == [entry[:2] for entry in official_info(file)["keys"]]  # buffers add a dtype


# arXiv:2205.14949, table 1, in millions
@pytest.mark.parametrize(("size", "millions"), [("tiny", 19), ("small", 38), ("base", 66)])
def test_hivits_have_the_parameters_of_the_paper(size: str, millions: int):
    with torch.device("meta"):
        model = create_classifier(f"hivit_{size}_patch16_224", num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * millions, rel=0.02)


def test_an_unknown_name_is_answered_with_the_nearest_one():
    message = (
        "unknown model 'itpn_bas_patch16_224'; did you mean 'itpn_base_patch16_224'? "
        "Known: itpn_base_patch16_224, itpn_large_patch16_224, "
    )
    for lookup in (get_variant, create_itpn, create_pretraining_model):
        with pytest.raises(ValueError, match=re.escape(message)):
            lookup("itpn_bas_patch16_224")


def test_a_name_like_no_other_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'xyz'\. Known: .*itpn_debug"):
        get_variant("xyz")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds_with_the_numbers_of_its_row(name: str):
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = create_pretraining_model(name)
    assert model.encoder.backbone.is_fast == variant.fast
    assert model.encoder.backbone.rel_pos_bias == variant.rel_pos_bias
    backbone = model.encoder.backbone
    assert (backbone.embed_dim, backbone.depths) == (variant.embed_dim, variant.depths)
    assert backbone.blocks[-1].attn.num_heads == variant.num_heads
    assert backbone.img_size == variant.img_size
    assert model.encoder.pyramid.fpn_dim == variant.fpn_dim
    assert len(model.encoder.pyramid.block_8to4) == variant.fpn_depth
    assert len(model.decoder.blocks) == variant.decoder_depth
    assert model.decoder.dim == variant.decoder_dim
    assert model.decoder.blocks[0].attn.num_heads == variant.decoder_num_heads


def test_the_debug_encoder_runs_and_yields_stages_and_pyramid():
    encoder = create_itpn("itpn_debug")
    features = encoder(tiny.images())
    shapes = {s: tuple(f.shape) for s, f in features.pyramid.items()}
    assert shapes == {4: (2, 16, 4, 4, 16), 8: (2, 16, 2, 2, 16), 16: (2, 16, 1, 1, 16)}
    assert set(features.stages) == set(tiny.STRIDES)


def test_the_debug_classifier_runs():
    model = ITPNClassifier(create_itpn("itpn_debug", rel_pos_bias=True).backbone, 7)
    assert model(tiny.images()).shape == (2, 7)


def test_an_image_size_between_patches_is_refused_at_construction():
    with pytest.raises(ValueError, match="img_size=100 a multiple of patch_size=16"):
        create_itpn("itpn_debug", img_size=100)
