"""Lines of a chart: the points of a metric, and fewer of them that look the same.

Surprising: thinning keeps the lowest and the highest point of every stretch, not means or every
n-th, so that a spike of one step in a million is still on the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.metrics_file import Record

MAX_POINTS = 400
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line and what it is called."""

    label: str
    points: list[Point]
    """(step, value), by step; all finite."""
    non_finite: list[float]
    """Steps at which the value was inf or nan."""
    is_reference: bool = False
    """Drawn as a dashed line: something to compare with."""


def series_of(
    records: Sequence[Record],
    key: str,
    label: str,
    *,
    scale: float = 1.0,
    is_reference: bool = False,
) -> Series | None:
    """A metric over steps; None where no record has it.

    Args:
        records: rows of metrics.jsonl, by step.
        key: the metric.
        label: what the line is called.
        scale: factor for every value, such as 100 for per cent.
        is_reference: see `Series`.
    """
    rows = [(float(r["step"]), r[key]) for r in records if isinstance(r.get(key), int | float)]
    if not rows:
        return None
    points = [(step, value * scale) for step, value in rows if math.isfinite(value)]
    non_finite = [step for step, value in rows if not math.isfinite(value)]
    return Series(label, points, non_finite, is_reference)


def thin(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most `max_points` points with the first, the last, and the extremes of every stretch."""
    if len(points) <= max_points:
        return list(points)
    num_stretches = (max_points - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for i in range(num_stretches):
        first, last = (len(inner) * k // num_stretches for k in (i, i + 1))
        stretch = inner[first:last]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return [*kept, points[-1]]
