"""Reading weights: official iTPN pixel and CLIP checkpoints and our own, into any of our models.

Every load returns a `LoadReport` and fails loudly: a key that should have gone somewhere and did
not is an error, never a warning. Surprising: nothing is unpickled. `.pth` files go through torch's
`weights_only` reader with `argparse.Namespace` (which official files carry) as the one extra type.

All layouts meet in one *canonical* key space, that of `PretrainingModel`:
`encoder.backbone.*`, `encoder.pyramid.*`, `decoder.*`, `mim.*`, `mfm.*`, plus the heads of the
downstream models: `fc_norm.*`, `head.*`; `rpn.*`, `roi_heads.*`; `decode_head.*`,
`auxiliary_head.*`. `clip.*` holds what only the official CLIP pre-training has.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from models.classifier import ITPNClassifier
from models.detector import ITPNDetector, PyramidBackbone
from models.hivit import HiViT
from models.itpn import ITPN
from models.pos_embed import relative_position_index, resize_pos_embed
from models.pretraining import PretrainingModel
from models.segmenter import ITPNSegmenter

# official prefix -> canonical prefix; the first match wins
OFFICIAL_PREFIXES: tuple[tuple[str, str], ...] = (
    ("absolute_pos_embed", "encoder.backbone.pos_embed"),
    ("patch_embed.", "encoder.backbone.patch_embed."),
    ("blocks.", "encoder.backbone.blocks."),
    *(
        (name, f"encoder.pyramid.{name}")
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
    ),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "mim.pred."),
    ("fc_norm.", "fc_norm."),
    ("head.", "head."),
    *(
        (name, f"clip.{name}")
        for name in ("cls_pt_layers.", "lm_head.", "lm_cls_head.", "norm.", "norm_cls.")
    ),
)
BACKBONE = "encoder.backbone."
HEADS = ("fc_norm.", "head.", "rpn.", "roi_heads.", "decode_head.", "auxiliary_head.")
PARTS = (BACKBONE, "encoder.pyramid.", "decoder.", "mim.", "mfm.", "clip.", *HEADS)
RECOMPUTED = "relative_position_index"  # an official buffer we derive from the grid instead
DETECTOR_ENCODER = "backbone.encoder."  # where torchvision's detectors keep it
BIAS_TABLE = "relative_position_bias_table"


@dataclass
class LoadReport:
    """What became of every key. Names are those of the target model, or canonical when dropped."""

    matched: list[str] = field(default_factory=list)
    """Loaded as they are."""
    resized: list[str] = field(default_factory=list)
    """Loaded after interpolation to the target's grid."""
    new: list[str] = field(default_factory=list)
    """In the model only: keep their fresh initialisation."""
    dropped: list[str] = field(default_factory=list)
    """In the file only, by design: parts the target model does not have."""

    def __str__(self) -> str:
        rows = [("matched", self.matched), ("resized", self.resized)]
        rows += [("new", self.new), ("dropped by design", self.dropped)]
        return "\n".join(f"{name:18s}{len(keys):5d}  {_summary(keys)}" for name, keys in rows)


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    allow: tuple[str, ...] = (),
) -> LoadReport:
    """Load official or own weights into a model, in place.

    Parts the file does not have (heads, a neck) and bias tables keep their fresh initialisation and
    are reported as new; parts the model does not have are reported as dropped. Position and bias
    tables of another grid are interpolated. Everything else must fit.

    Args:
        model: a PretrainingModel, ITPN, HiViT, ITPNClassifier, ITPNDetector, PyramidBackbone or
            ITPNSegmenter.
        source: a file (`.safetensors`, `.pth`, `.pt`) or a state dict, in the official layout or
            ours.
        allow: prefixes of canonical keys that may be in the file or in the model alone, such as
            "encoder.pyramid.block_" for a detector with fewer neck blocks than pre-training.

    Returns:
        The report; print it.

    Raises:
        ValueError: not one backbone weight among the tensors (with the report), unknown keys, keys
            missing from a part the file does have, or shapes that no interpolation explains (the
            first that differ are named). The model is then unchanged.
        FileNotFoundError: no such file.
    """
    state = read_state_dict(source) if isinstance(source, (str, Path)) else dict(source)
    canonical, unknown = to_canonical(state)
    target = {_canonical_name(model, name): (name, t) for name, t in model.state_dict().items()}
    file_parts = {_part(key) for key in canonical}
    target_parts = {_part(key) for key in target}
    exempt = (*allow, "clip.")

    report, loaded = LoadReport(), {}
    shapes: list[str] = []
    others = [f"unexpected key {key}" for key in unknown]
    for key, tensor in canonical.items():
        if key in target:
            name, current = target[key]
            fitted = _fit(key, tensor, current)
            if fitted is None:
                shape, wanted = tuple(tensor.shape), tuple(current.shape)
                shapes.append(f"{name}: shape {shape} does not fit {wanted}")
            else:
                loaded[name] = fitted
                (report.matched if fitted is tensor else report.resized).append(name)
            continue
        report.dropped.append(key)
        if _part(key) in target_parts and BIAS_TABLE not in key and not key.startswith(exempt):
            others.append(f"unexpected key {key}")
    for key, (name, _) in target.items():
        if key in canonical:
            continue
        report.new.append(name)
        if _part(key) in file_parts and BIAS_TABLE not in key and not key.startswith(exempt):
            others.append(f"missing key {name}")

    if shapes or others:
        raise ValueError(_misfit(model, canonical, target, [*shapes, *others]))
    if BACKBONE not in file_parts:
        raise ValueError(
            f"no backbone weight for {type(model).__name__} among {len(state)} tensors given; it "
            f"would train from random weights:\n{report}"
        )
    model.load_state_dict(loaded, strict=False)
    return report


def _misfit(
    model: nn.Module,
    canonical: Mapping[str, Tensor],
    target: Mapping[str, tuple[str, Tensor]],
    problems: list[str],
) -> str:
    """The message for weights that do not fit: another variant is said to be one."""
    rule = "build the model with the dimensions of the checkpoint"
    key = f"{BACKBONE}pos_embed"
    if key in canonical and key in target:
        widths = canonical[key].shape[-1], target[key][1].shape[-1]
        if widths[0] != widths[1]:
            rule += f": it is of another variant (embed_dim {widths[0]}, not {widths[1]})"
    shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
    return f"{len(problems)} keys do not fit {type(model).__name__}; {rule}:\n  {shown}"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read tensors from a file without unpickling code; unwraps an official {"model": ...}."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = content.get("model", content)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def to_canonical(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename to canonical keys; returns them and the keys no layout knows."""
    canonical: dict[str, Tensor] = {}
    unexpected: list[str] = []
    own_prefixes = ("encoder.", "decoder.", "mim.", "mfm.", "backbone.", "pyramid.")
    is_ours = any(key.startswith((*own_prefixes, *HEADS[2:])) for key in state)
    for key, tensor in state.items():
        if key == RECOMPUTED:
            continue
        if is_ours:
            name = key.removeprefix("backbone.") if key.startswith(DETECTOR_ENCODER) else key
            if name.startswith(("backbone.", "pyramid.")):  # a bare encoder, or a classifier
                name = f"encoder.{name}"
            known = name.startswith(PARTS)
        else:
            prefix = next((p for p in OFFICIAL_PREFIXES if key.startswith(p[0])), None)
            known = prefix is not None
            name = prefix[1] + key.removeprefix(prefix[0]) if prefix else key
        if known:
            canonical[name] = tensor
        else:
            unexpected.append(key)
    return canonical, unexpected


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """State dict in the official key layout, the inverse of loading; MFM heads have no place."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = _canonical_name(model, name)
        for official, canonical in OFFICIAL_PREFIXES:
            if key.startswith(canonical):
                state[official + key.removeprefix(canonical)] = tensor
    for module in model.modules():
        if isinstance(module, HiViT) and module.rel_pos_bias:
            state[RECOMPUTED] = relative_position_index(module.grid)
    return state


def _canonical_name(model: nn.Module, name: str) -> str:
    """Canonical key of a parameter of one of our models."""
    if isinstance(model, (PretrainingModel, ITPNSegmenter, PyramidBackbone)):
        return name
    if isinstance(model, ITPNDetector):
        is_encoder = name.startswith(DETECTOR_ENCODER)
        return name.removeprefix("backbone.") if is_encoder else name
    if isinstance(model, HiViT):
        return f"{BACKBONE}{name}"
    if isinstance(model, (ITPN, ITPNClassifier)):
        return f"encoder.{name}" if name.startswith(("backbone.", "pyramid.")) else name
    raise ValueError(
        f"cannot load weights into {type(model).__name__}; use a PretrainingModel, ITPN, HiViT, "
        "ITPNClassifier, ITPNDetector, PyramidBackbone or ITPNSegmenter"
    )


def _part(key: str) -> str:
    return next(part for part in PARTS if key.startswith(part))


def _fit(key: str, tensor: Tensor, current: Tensor) -> Tensor | None:
    """The tensor in the target's shape, interpolated where that is meaningful, else None."""
    if tensor.shape == current.shape:
        return tensor
    if tensor.ndim != current.ndim or tensor.shape[-1] != current.shape[-1]:
        return None
    rows = tensor.shape[-2]
    if round(rows**0.5) ** 2 != rows:  # class-token rows, or no table at all
        return None
    side = round(current.shape[-2] ** 0.5)
    if key == "decoder.pos_embed":
        return current.clone()  # fixed sin-cos: the target grid's own table
    if key == "encoder.backbone.pos_embed":
        return resize_pos_embed(tensor.float(), (side, side), "size")
    if key.endswith(BIAS_TABLE):
        window = ((side + 1) // 2, (side + 1) // 2)
        return resize_rel_pos_bias_table_simple(tensor.float(), window, tuple(current.shape))
    return None


def _summary(keys: list[str]) -> str:
    """The first components of the keys with their counts."""
    counts: dict[str, int] = {}
    for key in keys:
        head = ".".join(key.split(".")[:2])
        counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head} ({n})" for head, n in counts.items())
