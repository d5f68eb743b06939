"""Dimensions read off the tensors of a file: official families, ours, and neither of them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from models.itpn import create_itpn
from models.key_layouts import recognise
from models.variants import VARIANTS
from models.weight_shapes import create_encoder, infer_shape
from models.weights import load_weights, to_official
from tests.models import golden, tiny
from tests.models.golden import GOLDEN_DIR

FULL = sorted(path.stem for path in (GOLDEN_DIR / "full").glob("[a-z]*.json"))


def official_state(file: str) -> dict[str, Tensor]:
    keys = json.loads((GOLDEN_DIR / "full" / f"{file}.json").read_text())["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape, *_ in keys}


EXPECTED = {
    "pixel_pretrain_base": "itpn_base_patch16_224",
    "pixel_finetune_large": "itpn_large_patch16_224",
    "clip_pretrain_base": "itpn_base_clip_patch16_224",
    "clip_pretrain_large_256": "itpn_large_clip_patch16_256",
    "fast_tiny_224": "fast_itpn_tiny_patch16_224",
    "fast_large_256": "fast_itpn_large_patch16_256",
    "det_clip_large": "itpn_large_clip_patch16_224",
    "seg_pixel_base": "itpn_base_patch16_224",
}


@pytest.mark.parametrize("file", EXPECTED)
def test_official_files_are_told_apart_by_their_shapes(file: str):
    assert infer_shape(official_state(file)).variants[0] == EXPECTED[file]


@pytest.mark.parametrize("file", FULL)
def test_an_encoder_built_from_the_shapes_takes_every_weight_of_trunk_and_neck(file: str):
    state = official_state(file)
    with torch.device("meta"):
        shape = infer_shape(state)
        encoder = create_encoder(shape)
        report = load_weights(encoder if shape.fpn_dim else encoder.backbone, state)
    assert not (report.resized or report.new)
    heads = ("decoder.", "mim.", "clip.", "fc_norm.", "head.")
    assert all(key.startswith(heads) for key in report.dropped), report.dropped[:3]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_found_again(name: str):
    with torch.device("meta"):
        encoder = create_itpn(name)
    shape = infer_shape(encoder.state_dict())
    assert name in shape.variants
    variant = VARIANTS[name]
    assert (shape.fpn_dim, shape.fpn_depth) == (variant.fpn_dim, variant.fpn_depth)
    assert (shape.num_heads, shape.img_size) == (variant.num_heads, variant.img_size)


def test_a_neck_wider_than_the_code_says_is_found():
    """The released itpn_base_pixel.pth has one of 512 channels."""
    with torch.device("meta"):
        encoder = create_itpn("itpn_base_patch16_224", fpn_dim=512, fpn_depth=1)
    shape = infer_shape(to_official(encoder))
    assert (shape.fpn_dim, shape.fpn_depth) == (512, 1)
    assert shape.variants[0].startswith("itpn_base")


@pytest.mark.parametrize(
    "name", [*golden.case_names(golden.CLASSIFIER_CLASSES + golden.DISTILLATION_CLASSES)]
)
def test_an_encoder_from_a_golden_file_computes_its_stages(name: str):
    case = golden.load_case(name)
    state = case.group("w/")
    shape = infer_shape(state)
    config = case.config
    assert (shape.embed_dim, shape.patch_size) == (config["embed_dim"], config["patch_size"])
    assert shape.mlp_ratio == config["mlp_ratio"]
    assert shape.rel_pos_bias == config.get("rpe", False)
    assert shape.fast == (config["cls"] == "Fast_iTPN")
    if shape.num_heads != config["num_heads"]:  # these models have other heads than 64 wide
        assert not shape.rel_pos_bias
        return
    encoder = create_encoder(shape).eval()
    load_weights(encoder.backbone, state)
    image = next(t for key, t in case.group("in/").items() if key.startswith("image"))
    official = golden.build_backbone(case).eval()
    load_weights(official, state)
    for stride, feature in encoder.backbone(image).items():
        assert torch.equal(feature, official(image)[stride])


def test_a_state_dict_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"no iTPN, HiViT or Fast-iTPN trunk among 1 tensors"):
        infer_shape({"conv.weight": torch.zeros(3, 3)})
    encoder = tiny.randomize(create_itpn("itpn_debug"))
    broken = {k: t for k, t in encoder.state_dict().items() if "blocks.1.reduction" not in k}
    with pytest.raises(ValueError, match=r"merges at \[3\] among blocks"):
        infer_shape(broken)


def test_layouts_are_recognised_from_what_only_they_have():
    encoder = create_itpn("itpn_debug")
    official = to_official(encoder)
    zero = torch.zeros(1)
    assert recognise(encoder.state_dict()) == "ours"
    assert recognise(official) == "pixel"
    assert recognise(official | {"lm_head.weight": zero}) == "clip"
    assert recognise(official | {"decoder_embed.weight": zero}) == "hivit"
    assert recognise({f"backbone.{key}": t for key, t in official.items()}) == "mm"
    assert recognise({f"module.{key}": t for key, t in official.items()}) == "pixel"


@pytest.mark.parametrize("layout", ["mm", "hivit", "ddp"])
def test_other_peoples_wrappings_load_their_trunk_and_neck(layout: str):
    source = tiny.randomize(create_itpn("itpn_debug", rel_pos_bias=True))
    official, zero = to_official(source), torch.zeros(1)
    target = create_itpn("itpn_debug", rel_pos_bias=True)
    if layout == "mm":
        state = {f"backbone.{key}": t for key, t in official.items()}
        state |= {"rpn_head.rpn_conv.weight": zero, "decode_head.conv_seg.bias": zero}
        report = load_weights(target, state)
        assert report.dropped == ["mm.rpn_head.rpn_conv.weight", "mm.decode_head.conv_seg.bias"]
    elif layout == "ddp":
        report = load_weights(target, {f"module.{key}": t for key, t in official.items()})
    else:  # HiViT's masked autoencoder has no neck
        trunk = {k: t for k, t in official.items() if k.startswith(("blocks", "patch_", "absol"))}
        extra = {"decoder_embed.weight": zero, "norm.weight": zero, "mask_token": zero}
        report = load_weights(target, trunk | extra)
        assert all(name.startswith("pyramid.") for name in report.new)
        assert len(report.dropped) == 3
    for name, tensor in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[name], tensor), name
