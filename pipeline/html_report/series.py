"""Lines of a chart: the points of a metric, and fewer of them that look the same.

Surprising: thinning keeps the lowest and the highest point of every stretch, not means or every
n-th, so that a spike of one step in a million is still on the page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.metrics_file import Record

MAX_POINTS = 400
NOISY_POINTS = 150
"""A line of more points gets its trend drawn over it."""
_TREND_POINTS = 60
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line and what it is called."""

    label: str
    points: list[Point]
    """(step, value), by step; all finite."""
    non_finite: list[float]
    """Steps at which the value was inf or nan."""


def series_of(
    records: Sequence[Record],
    key: str,
    label: str,
    *,
    scale: float = 1.0,
) -> Series | None:
    """A metric over steps; None where no record has it.

    Args:
        records: rows of metrics.jsonl, by step.
        key: the metric.
        label: what the line is called.
        scale: factor for every value, such as 100 for per cent.
    """
    rows = [(float(r["step"]), r[key]) for r in records if isinstance(r.get(key), int | float)]
    if not rows:
        return None
    points = [(step, value * scale) for step, value in rows if math.isfinite(value)]
    non_finite = [step for step, value in rows if not math.isfinite(value)]
    return Series(label, points, non_finite)


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


def trend(points: Sequence[Point]) -> list[Point]:
    """The median of every stretch of many points, at its middle; empty for few points."""
    if len(points) <= NOISY_POINTS:
        return []
    found = []
    for i in range(_TREND_POINTS):
        first, last = (len(points) * k // _TREND_POINTS for k in (i, i + 1))
        steps, values = zip(*points[first:last], strict=True)
        found.append((statistics.median(steps), statistics.median(values)))
    return found
