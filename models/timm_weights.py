"""Weights on timm's ways in: `checkpoint_path`, and `pretrained=True` with a file of one's own.

timm reads the file (tensors only, never a pickle) and hands a state dict over; here it goes through
`models.weights.load_weights`, so every layout known there is, and its rules hold: an unknown key, a
part that is not whole or a shape that does not fit is a ValueError.

The surprising fact: timm switches to `strict=False` when the number of classes differs, which would
pass over every key of a foreign layout in silence. So the dict that timm gets back is always the
whole of the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.classifier import ITPNClassifier
from models.hivit import HiViT
from models.itpn import ITPN
from models.key_layouts import BACKBONE
from models.weights import RELATIVE_TABLES, load_weights

logger = logging.getLogger(__name__)


class Differences(NamedTuple):
    """What `torch.nn.Module.load_state_dict` returns."""

    missing_keys: list[str]
    """In the model only."""
    unexpected_keys: list[str]
    """In the file only, canonical names."""


def load_any_layout(model: ITPNClassifier | ITPN, state: Mapping[str, Any]) -> Differences:
    """Load a state dict of any layout, in place, and log the report.

    A warning if a part of the model was not in the file, such as the head of a classifier that
    starts from pre-training.

    Raises:
        ValueError: what `load_weights` refuses.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    report = load_weights(model, tensors, allow=_pruned(model.backbone))
    is_whole = all(name.endswith(RELATIVE_TABLES) for name in report.new)
    logger.log(logging.INFO if is_whole else logging.WARNING, "weights loaded:\n%s", report)
    return Differences(report.new, report.dropped)


def filter_checkpoint(
    state: Mapping[str, Any], model: ITPNClassifier | ITPN, *, num_classes: int
) -> dict[str, Any]:
    """timm's `pretrained_filter_fn`: the model's own state dict with the weights in it.

    As everywhere in timm, the head of a file is left out where the model has another number of
    classes than the `num_classes` of `pretrained_cfg`.
    """
    if getattr(model, "num_classes", 0) != num_classes:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    load_any_layout(model, state)
    return nn.Module.state_dict(model)


def _pruned(backbone: HiViT) -> tuple[str, ...]:
    """Canonical prefixes of what `prune_stages` dropped, which a file still has."""
    num_blocks = sum(backbone.depths) + len(backbone.merges)
    blocks = range(len(backbone.blocks), num_blocks)
    if not blocks:
        return ()
    return (f"{BACKBONE}pos_embed", *(f"{BACKBONE}blocks.{i}." for i in blocks))
