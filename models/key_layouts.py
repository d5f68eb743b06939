"""Names of weights: the official layouts and ours, all translated to one *canonical* key space.

Canonical keys are those of `PretrainingModel` (`encoder.backbone.*`, `encoder.pyramid.*`,
`decoder.*`, `mim.*`, `mfm.*`) plus the heads of the downstream models (`norm.*`, `fc_norm.*`,
`head.*`; `rpn.*`, `roi_heads.*`; `decode_head.*`, `auxiliary_head.*`), `clip.*` for the heads of
feature distillation, and two parts that only official files have: `hivit.*`, the decoder of HiViT's
masked autoencoder, and `mm.*`, the heads of mmdetection and mmsegmentation.

The surprising fact: official files use one name for different things. `norm` is a final norm before
the heads in CLIP pre-training, before the decoder in HiViT's, before the classifier in Fast-iTPN;
`mask_token` and `decoder_embed` belong to a decoder in one and to the distillation heads in the
other. So the layout is recognised first, from the keys that only it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

Layout = Literal["ours", "pixel", "clip", "hivit", "mm"]
"""Ours, or official: pixel iTPN (also Fast-iTPN and all classifiers), feature distillation (CLIP
iTPN, pre-trained Fast-iTPN), HiViT's masked autoencoder, a whole mmdetection or mmsegmentation
model."""
Prefixes = tuple[tuple[str, str], ...]

BACKBONE = "encoder.backbone."
PYRAMID = "encoder.pyramid."
HEADS = ("norm.", "fc_norm.", "head.", "rpn.", "roi_heads.", "decode_head.", "auxiliary_head.")
PARTS = (BACKBONE, PYRAMID, "decoder.", "mim.", "mfm.", "clip.", "hivit.", "mm.", *HEADS)
RECOMPUTED = "relative_position_index"
"""An official buffer we derive from the grid instead."""
DETECTOR_ENCODER = "backbone.encoder."
"""Where torchvision's detectors keep the encoder."""
_OWN_PREFIXES = ("encoder.", "decoder.", "mim.", "mfm.", "clip.", "backbone.", "pyramid.")
_OWN_HEADS = HEADS[3:]  # the others have the same names in official files
_MM_BACKBONE = "backbone."
_GATHERING_TOKENS = "gathering_tokens"

_TRUNK: Prefixes = (
    ("absolute_pos_embed", f"{BACKBONE}pos_embed"),
    ("pos_embed", f"{BACKBONE}pos_embed"),  # Fast-iTPN
    ("patch_embed.", f"{BACKBONE}patch_embed."),
    ("blocks.", f"{BACKBONE}blocks."),
)
_NECK: Prefixes = tuple(
    (name, PYRAMID + name)
    for name in (
        "align_dim_16tofpn.",
        "align_dim_16to8.",
        "align_dim_8to4.",
        "split_16to8.",
        "split_8to4.",
        "block_16to8.",
        "block_8to4.",
        "fpn_modules.",
    )
)
_CLASSIFIER: Prefixes = (("norm.", "norm."), ("fc_norm.", "fc_norm."), ("head.", "head."))
_PIXEL_DECODER: Prefixes = (
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "mim.pred."),
)
_DISTILLATION: Prefixes = (
    ("mask_token", "clip.mask_token"),
    ("decoder_embed.", "clip.embed."),
    ("decoder_", "clip.decoder_"),
    *(
        (name, f"clip.{name}")
        for name in ("cls_pt_layers.", "lm_head.", "lm_cls_head.", "norm.", "norm_cls.")
    ),
)
_HIVIT: Prefixes = tuple((name, f"hivit.{name}") for name in ("mask_token", "decoder_", "norm."))

OFFICIAL_PREFIXES: dict[Layout, Prefixes] = {
    "pixel": (*_TRUNK, *_NECK, *_PIXEL_DECODER, *_CLASSIFIER),
    "clip": (*_TRUNK, *_NECK, *_DISTILLATION, *_CLASSIFIER),
    "hivit": (*_TRUNK, *_HIVIT, *_CLASSIFIER),
    "mm": (*_TRUNK, *_NECK, *_CLASSIFIER),
}
"""Official prefix -> canonical prefix; the first match wins."""


def recognise(state: Mapping[str, Tensor]) -> Layout:
    """The layout of a state dict, from the keys only it has; "pixel" where nothing tells."""
    if any(key.endswith("backbone.absolute_pos_embed") for key in state):
        return "mm"
    if any(key.startswith((*_OWN_PREFIXES, *_OWN_HEADS)) for key in state):
        return "ours"
    if any(key.startswith(("lm_head.", "lm_cls_head.", "cls_pt_layers.")) for key in state):
        return "clip"
    return "hivit" if "decoder_embed.weight" in state else "pixel"


def to_canonical(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename to canonical keys; returns them and the keys that the layout does not know."""
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}  # of torch's DDP
    layout = recognise(state)
    canonical: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        if key.removeprefix(_MM_BACKBONE) == RECOMPUTED:
            continue
        name = _canonical_key(key, layout)
        if name is None:
            unknown.append(key)
        else:
            canonical[name] = tensor
    return canonical, unknown


def _canonical_key(key: str, layout: Layout) -> str | None:
    if layout == "ours":
        name = key.removeprefix("backbone.") if key.startswith(DETECTOR_ENCODER) else key
        if name.startswith(("backbone.", "pyramid.")):  # a bare encoder, or a classifier
            name = f"encoder.{name}"
        return name if name.startswith(PARTS) else None
    if layout == "mm" and not key.startswith(_MM_BACKBONE):
        return f"mm.{key}"
    if key == _GATHERING_TOKENS:  # of a bare trunk of ours: its other keys are the official ones
        return BACKBONE + key
    official = key.removeprefix(_MM_BACKBONE) if layout == "mm" else key
    return translate(official, OFFICIAL_PREFIXES[layout])


def translate(key: str, prefixes: Prefixes) -> str | None:
    """The key with its first matching prefix exchanged; None if none matches."""
    for old, new in prefixes:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return None


def official_key(name: str, layout: Layout, *, is_fast: bool = False) -> str | None:
    """The official key of a canonical one; None for what official files have no name for."""
    assert layout in get_args(Layout), f"unknown layout {layout}"
    prefixes = OFFICIAL_PREFIXES[layout]
    wrong_table = "absolute_pos_embed" if is_fast else "pos_embed"
    return translate(name, tuple((new, old) for old, new in prefixes if old != wrong_table))


def part_of(key: str) -> str:
    """The part of the model a canonical key belongs to, as its prefix."""
    return next(part for part in PARTS if key.startswith(part))
