"""Pictures of a sweep: parallel coordinates, metric over time, importance of the settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.sweeps.importance import compared_at, importances
from pipeline.sweeps.report import TrialRow, ranked, shown
from pipeline.sweeps.space import Axis
from pipeline.sweeps.trials import index_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "viridis"
_MOST_TICKS = 8


def draw_pictures(
    folder: Path, rows: Sequence[TrialRow], axes: Sequence[Axis], metric: str
) -> list[Path]:
    """Draw all of them as PNG files into the folder; their paths."""
    seen = [row for row in rows if row.value is not None]
    name = metric.removeprefix("val/")
    pictures = {
        "parallel_coordinates.png": parallel_coordinates(seen, axes, name),
        "metric_over_time.png": metric_over_time(seen, name),
        "importance.png": importance_bars(seen, axes, name),
    }
    for file, figure in pictures.items():
        figure.savefig(folder / file, dpi=110, bbox_inches="tight")
    return [folder / file for file in pictures]


def parallel_coordinates(rows: Sequence[TrialRow], axes: Sequence[Axis], metric: str) -> Figure:
    """A line a trial through its settings to its metric; those given up are dotted."""
    figure, plot = _figure(2.2 * (len(axes) + 1), 4.2)
    colour, low, high = _colours(rows)
    for row in reversed(ranked(list(rows))):
        assert row.value is not None, row
        heights = [_height(axis, row.overrides[axis.key]) for axis in axes]
        heights.append((row.value - low) / (high - low))
        line, width = ("-", 2.0) if row.outcome == "finished" else (":", 1.2)
        plot.plot(heights, color=colour(row.value), linestyle=line, linewidth=width)
    for place, axis in enumerate(axes):
        _scale(plot, place, [(_height(axis, value), value) for value in _ticks(axis)])
    ends = [(i / 4, low + (high - low) * i / 4) for i in range(5)]
    _scale(plot, len(axes), ends)
    plot.set_xticks(range(len(axes) + 1), [*(axis.key for axis in axes), metric])
    plot.set_yticks([])
    plot.set_xlim(-0.3, len(axes) + 0.5)
    plot.set_title("settings and metric of each trial (dotted: stopped early)")
    for side in ("left", "right", "top", "bottom"):
        plot.spines[side].set_visible(False)
    return figure


def metric_over_time(rows: Sequence[TrialRow], metric: str) -> Figure:
    """The metric of each trial over the share of its steps."""
    figure, plot = _figure(7.0, 4.2)
    colour, _, _ = _colours(rows)
    for rank, row in enumerate(ranked(list(rows))):
        assert row.value is not None, row
        shares = [100 * step / row.num_steps for step, _ in row.curve]
        is_finished = row.outcome == "finished"
        plot.plot(
            shares,
            [value for _, value in row.curve],
            color=colour(row.value),
            linestyle="-" if is_finished else ":",
            marker="o" if is_finished else "x",
            markersize=4,
            label=row.name if rank == 0 else None,
        )
    plot.set_xlabel("share of a trial's steps, %")
    plot.set_ylabel(metric)
    plot.set_title("metric over time (dotted: stopped early)")
    if rows:
        plot.legend(loc="lower right", title="best")
    return figure


def importance_bars(rows: Sequence[TrialRow], axes: Sequence[Axis], metric: str) -> Figure:
    """Share of the metric's variance explained by each setting."""
    figure, plot = _figure(7.0, 1.4 + 0.4 * len(axes))
    found = importances(rows, axes)
    if not found:
        plot.text(0.5, 0.5, "too few trials to tell", ha="center", va="center")
        plot.axis("off")
        return figure
    keys = sorted(found, key=lambda key: found[key])
    plot.barh(keys, [found[key] for key in keys])
    plot.set_xlim(0, 1)
    share = 100 * compared_at(rows)
    plot.set_xlabel(f"share of the variance of {metric} at {share:.0f} % of the steps (fANOVA)")
    plot.set_title(f"importance of the settings, {len(rows)} trials")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot, which holds global state

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _colours(rows: Sequence[TrialRow]) -> tuple[Any, float, float]:
    """Colour of a metric, and the range of metrics, never empty."""
    from matplotlib import colormaps

    values = [row.value for row in rows if row.value is not None] or [0.0]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0
    palette = colormaps[_COLOURS]
    return lambda value: palette(0.9 * (value - low) / (high - low)), low, high


def _height(axis: Axis, value: Any) -> float:
    """Place of a value along its axis, from 0 to 1."""
    if axis.values:
        return index_of(axis, value) / max(1, len(axis.values) - 1)
    if axis.kind == "loguniform":
        return math.log(value / axis.low) / math.log(axis.high / axis.low)
    return float((value - axis.low) / (axis.high - axis.low))


def _ticks(axis: Axis) -> Sequence[Any]:
    if axis.values:
        return axis.values[:: math.ceil(len(axis.values) / _MOST_TICKS)]
    if axis.kind == "loguniform":
        return [axis.low * (axis.high / axis.low) ** (i / 4) for i in range(5)]
    return [axis.low + (axis.high - axis.low) * i / 4 for i in range(5)]


def _scale(plot: Axes, place: int, ticks: Sequence[tuple[float, Any]]) -> None:
    """A vertical line with values beside it."""
    plot.plot([place, place], [0, 1], color="0.4", linewidth=0.8)
    for height, value in ticks:
        text = shown(value)
        short = text if len(text) <= 24 else f"...{text[-21:]}"
        plot.text(place + 0.03, height, short, fontsize=8, va="center", color="0.2")
