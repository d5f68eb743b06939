"""Reading weights: official iTPN pixel checkpoints and our own, into any of our models.

Every load returns a `LoadReport` and fails loudly: a key that should have gone somewhere and did
not is an error, never a warning. Surprising: nothing is unpickled. `.pth` files go through torch's
`weights_only` reader with `argparse.Namespace` (which official files carry) as the one extra type.

All layouts meet in one *canonical* key space, that of `PretrainingModel`:
`encoder.backbone.*`, `encoder.pyramid.*`, `decoder.*`, `mim.*`, `mfm.*`, plus `fc_norm.*`,
`head.*`.
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
from models.hivit import HiViT
from models.itpn import ITPN
from models.pos_embed import relative_position_index, resize_pos_embed
from models.pretraining import PretrainingModel

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
)
PARTS = ("encoder.backbone.", "encoder.pyramid.", "decoder.", "mim.", "mfm.", "fc_norm.", "head.")
RECOMPUTED = "relative_position_index"  # an official buffer we derive from the grid instead
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


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load official or own weights into a model, in place.

    Args:
        model: a PretrainingModel, ITPN, HiViT or ITPNClassifier.
        source: a file (`.safetensors`, `.pth`, `.pt`) or a state dict, in the official layout or
        ours.

    Returns:
        The report; print it.

    Raises:
        ValueError: unknown keys, keys missing from a part the file does have, or shapes that no
            interpolation explains. The model is then unchanged.
        FileNotFoundError: no such file.
    """
    state = read_state_dict(source) if isinstance(source, (str, Path)) else dict(source)
    canonical, unexpected = to_canonical(state)
    target = {_canonical_name(model, name): (name, t) for name, t in model.state_dict().items()}
    file_parts = {_part(key) for key in canonical}
    target_parts = {_part(key) for key in target}

    report, loaded, problems = LoadReport(), {}, [f"unexpected key {k}" for k in unexpected]
    for key, tensor in canonical.items():
        if key in target:
            name, current = target[key]
            fitted = _fit(key, tensor, current)
            if fitted is None:
                problems.append(
                    f"{name}: shape {tuple(tensor.shape)} does not fit {tuple(current.shape)}"
                )
            else:
                loaded[name] = fitted
                (report.matched if fitted is tensor else report.resized).append(name)
        elif _part(key) in target_parts and BIAS_TABLE not in key:
            problems.append(f"unexpected key {key}")
        else:
            report.dropped.append(key)
    for key, (name, _) in target.items():
        if key in canonical:
            continue
        report.new.append(name)
        if _part(key) in file_parts and BIAS_TABLE not in key:
            problems.append(f"missing key {name}")
    if not loaded and not problems:
        raise ValueError(f"no weight of {type(model).__name__} among {len(state)} tensors given")
    if problems:
        shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
        raise ValueError(
            f"{len(problems)} keys do not fit {type(model).__name__}; build the model with the "
            f"dimensions of the checkpoint:\n  {shown}"
        )
    model.load_state_dict(loaded, strict=False)
    return report


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
    is_ours = any(key.startswith(own_prefixes) for key in state)
    for key, tensor in state.items():
        if key == RECOMPUTED:
            continue
        if is_ours:
            bare_encoder = key.startswith(("backbone.", "pyramid."))
            name = f"encoder.{key}" if bare_encoder else key
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
    if isinstance(model, PretrainingModel):
        return name
    if isinstance(model, HiViT):
        return f"encoder.backbone.{name}"
    if isinstance(model, (ITPN, ITPNClassifier)):
        return f"encoder.{name}" if name.startswith(("backbone.", "pyramid.")) else name
    raise ValueError(
        f"cannot load weights into {type(model).__name__}; "
        "use a PretrainingModel, ITPN, HiViT or ITPNClassifier"
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
