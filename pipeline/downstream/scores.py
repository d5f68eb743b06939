"""What the score keepers of the three tasks have in common.

Surprising: a result depends neither on how many workers shared the samples nor on the order they
came in, to the last bit. So keepers store integers, or what every sample got, and never a running
sum of floats; the workers' rows must have neither duplicates nor padding.
"""

# K classes

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Scores(Protocol):
    """What one evaluation keeps of its samples; `add` differs by task."""

    def state(self) -> dict[str, Any]:
        """Plain data and CPU tensors: what this worker gathered."""

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Replace the own content by the union of all workers' states, the own among them."""

    def result(self) -> dict[str, float]:
        """Metrics "val/...". One that is undefined, as of no samples at all, is left out."""


def check_labels(labels: Tensor, first: int, last: int, what: str) -> None:
    """Refuse labels that no class has.

    Args:
        labels: integers, any shape.
        first, last: the range labels must be in, both included.
        what: whose labels, for the message.

    Raises:
        ValueError: a label outside the range.
    """
    if labels.numel() == 0:
        return
    assert not labels.is_floating_point(), f"{what} labels are {labels.dtype}, not integers"
    outside = labels[(labels < first) | (labels > last)]
    if outside.numel():
        raise ValueError(
            f"{what} label {int(outside[0])} is outside the classes: labels of {last - first + 1} "
            f"classes are {first} ... {last}; evaluate on data prepared with the model's classes"
        )


def count_pairs(true: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix (K, K) int64 on the CPU, rows = true, of two tensors of one shape."""
    pairs = true.long().flatten() * num_classes + predicted.long().flatten()
    return torch.bincount(pairs, minlength=num_classes**2).cpu().view(num_classes, num_classes)


def percent(part: Tensor, whole: Tensor) -> Tensor:
    """100 * part / whole in float64, NaN where whole is 0."""
    return torch.where(whole > 0, 100 * part.double() / whole.double(), math.nan)


def by_class(classes: list[str], values: Iterable[float]) -> dict[str, float]:
    """Values under their classes' names, NaN left out.

    A name that several classes have (two of ImageNet's are "crane") gets the class's number behind
    it, so that none is lost.
    """
    count = Counter(classes)
    names = [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(classes)]
    pairs = zip(names, values, strict=True)
    return {name: float(value) for name, value in pairs if not math.isnan(value)}
