"""Reading weights: official iTPN, HiViT and Fast-iTPN files and our own, into any of our models.

Every load returns a `LoadReport` and fails loudly: a key that should have gone somewhere and did
not is an error, never a warning. Surprising: nothing is unpickled. `.pth` files go through torch's
`weights_only` reader with `argparse.Namespace` (which official files carry) as the one extra type.
Names are translated in `key_layouts.py`.
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
from models.feature_distillation import FeatureDistillationModel
from models.hivit import HiViT
from models.itpn import ITPN
from models.key_layouts import (
    BACKBONE,
    DETECTOR_ENCODER,
    PYRAMID,
    RECOMPUTED,
    Layout,
    official_key,
    part_of,
    to_canonical,
)
from models.pos_embed import relative_position_index, resize_pos_embed
from models.pretraining import PretrainingModel
from models.segmenter import ITPNSegmenter

BIAS_TABLE = "relative_position_bias_table"
RELATIVE_TABLES = (BIAS_TABLE, "rel_pos_h", "rel_pos_w")
"""Tables that may be in the file or in the model alone: at first they are zero."""
_WRAPPERS = ("model", "state_dict", "module")


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
    target = {canonical_name(model, name): (name, t) for name, t in model.state_dict().items()}
    file_parts = {part_of(key) for key in canonical}
    target_parts = {part_of(key) for key in target}
    exempt = (*allow, f"{BACKBONE}gathering_tokens")  # ours, an option: no released file has them

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
        if (
            part_of(key) in target_parts
            and not key.endswith(RELATIVE_TABLES)
            and not key.startswith(exempt)
        ):
            others.append(f"unexpected key {key}")
    for key, (name, _) in target.items():
        if key in canonical:
            continue
        report.new.append(name)
        if (
            part_of(key) in file_parts
            and not key.endswith(RELATIVE_TABLES)
            and not key.startswith(exempt)
        ):
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
    """The message for weights that do not fit: what differs is named where it can be told."""
    rule = "build the model with the dimensions of the checkpoint"
    theirs = _widths(canonical)
    ours = _widths({key: tensor for key, (_, tensor) in target.items()})
    if theirs.get("embed_dim", 0) != ours.get("embed_dim", 0):
        pair = theirs.get("embed_dim"), ours.get("embed_dim")
        rule += f": it is of another variant (embed_dim {pair[0]}, not {pair[1]})"
    elif "fpn_dim" in theirs and "fpn_dim" in ours:
        for name in ("fpn_dim", "fpn_depth"):
            if theirs[name] != ours[name]:
                option = f"--model.{name.replace('_', '-')} {theirs[name]}"
                rule += f": its neck has {name} {theirs[name]}, not {ours[name]} ({option})"
    elif any(key.startswith(PYRAMID) for key in canonical) and "fpn_dim" in ours:
        rule += ": its neck is not whole; leave it out (--no-init.neck)"
    shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
    return f"{len(problems)} keys do not fit {type(model).__name__}; {rule}:\n  {shown}"


def _widths(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Widths of trunk and neck, as far as there are tensors that show them."""
    found = {}
    if (table := tensors.get(f"{BACKBONE}pos_embed")) is not None:
        found["embed_dim"] = table.shape[-1]
    align = tensors.get(f"{PYRAMID}align_dim_8to4.weight")
    if align is not None and f"{PYRAMID}split_8to4.reduction.weight" in tensors:
        blocks = {key.split(".")[3] for key in tensors if key.startswith(f"{PYRAMID}block_8to4.")}
        found |= {"fpn_dim": align.shape[0], "fpn_depth": len(blocks)}
    return found


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read tensors from a file without unpickling code; unwraps {"model": ...} of the official
    files and {"state_dict": ...} of mmdetection's.

    Raises:
        ValueError: it holds no state dict.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = next((content[key] for key in _WRAPPERS if key in content), content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} as 'model', not a state dict")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """State dict in the official key layout, the inverse of loading; MFM heads have no place."""
    layout: Layout = "clip" if isinstance(model, FeatureDistillationModel) else "pixel"
    backbone = next(module for module in model.modules() if isinstance(module, HiViT))
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = official_key(canonical_name(model, name), layout, is_fast=backbone.is_fast)
        if key is not None:
            state[key] = tensor
    if backbone.rel_pos_bias or backbone.decomposed_rel_pos:
        state[RECOMPUTED] = relative_position_index(backbone.grid)
    return state


def canonical_name(model: nn.Module, name: str) -> str:
    """Canonical key of a parameter of one of our models."""
    if isinstance(
        model, (PretrainingModel, FeatureDistillationModel, ITPNSegmenter, PyramidBackbone)
    ):
        return name
    if isinstance(model, ITPNDetector):
        is_encoder = name.startswith(DETECTOR_ENCODER)
        return name.removeprefix("backbone.") if is_encoder else name
    if isinstance(model, HiViT):
        return f"{BACKBONE}{name}"
    if isinstance(model, (ITPN, ITPNClassifier)):
        return f"encoder.{name}" if name.startswith(("backbone.", "pyramid.")) else name
    raise ValueError(
        f"cannot load weights into {type(model).__name__}; use a PretrainingModel, "
        "FeatureDistillationModel, ITPN, HiViT, ITPNClassifier, ITPNDetector, PyramidBackbone or "
        "ITPNSegmenter"
    )


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
