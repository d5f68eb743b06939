"""Charts as inline SVG: lines over steps. Drawn by us, so that the report needs no script.

Everything put into the markup goes through `Markup.format`, which escapes it. Surprising: colours
and sizes of text are the style sheet's business (classes s0, s1, ...), which makes one drawing fit
light and dark pages, phones and paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from pipeline.html_report.axes import Axis, step_ticks, tick_labels, value_axis
from pipeline.html_report.bars import WIDTH, bar_height, bars
from pipeline.html_report.number_format import number
from pipeline.html_report.series import NOISY_POINTS, Point, Series, thin, trend

TOTAL = "total"
"""Label of the line that is the sum of the others."""
HEIGHT = 252
NUM_COLOURS = 6
_LEFT, _TOP, _BOTTOM = 52, 16, 40
_CHAR_PX = 7.4  # of a label on a phone, where letters are largest
_LINE_PX = 16
_MAX_DOTS = 60


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """A chart over the steps of a run."""

    title: str
    series: list[Series]
    unit: str = ""
    """What the values are in, such as %."""
    note: str = ""
    """How to read it."""
    from_zero: bool = False
    may_be_log: bool = False
    line_at: float | None = None
    """A horizontal line that means something."""
    line_label: str = ""
    restarts: Sequence[float] = ()
    """Steps at which the run was resumed."""

    @property
    def is_noisy(self) -> bool:
        """Whether lines are drawn with their trend."""
        return any(len(series.points) > NOISY_POINTS for series in self.series)

    @property
    def is_moment(self) -> bool:
        """Whether there is one step only: bars say more than dots."""
        points = [point for series in self.series for point in series.points]
        is_whole = all(value >= 0 for _, value in points) and not any(
            series.non_finite for series in self.series
        )
        return is_whole and len({step for step, _ in points}) == 1

    @property
    def is_log(self) -> bool:
        """Whether the value axis is logarithmic."""
        return self._value_axis(0, 1).is_log

    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        unit = f" {self.unit}" if self.unit else ""
        parts = []
        for series in self.series:
            if not series.points:
                parts.append(f"{series.label}: no finite value")
                continue
            (first, start), (last, end) = series.points[0], series.points[-1]
            values = [value for _, value in series.points]
            if len(series.points) == 1:
                parts.append(f"{series.label}: {number(end)}{unit} at step {number(last)}")
                continue
            parts.append(
                f"{series.label}: {number(start)}{unit} at step {number(first)}, {number(end)}"
                f"{unit} at step {number(last)}, lowest {number(min(values))}, highest "
                f"{number(max(values))}"
            )
        return f"{self.title} over steps. " + "; ".join(parts)

    def svg(self) -> Markup:
        """The drawing: lines, or bars where there is one step only."""
        if self.is_moment:
            return self._frame(bar_height(len(self.series)), self._bars())
        return self._frame(HEIGHT, self._drawn_lines())

    def _frame(self, height: int, content: Markup) -> Markup:
        return Markup(
            '<svg class="chart" role="img" viewBox="0 0 {} {}" preserveAspectRatio="xMidYMid meet" '
            'aria-label="{}">{}</svg>'
        ).format(WIDTH, height, self.description(), content)

    def _bars(self) -> Markup:
        rows = [
            (s.label, s.points[-1][1], f"{number(s.points[-1][1])} {self.unit}".rstrip())
            for s in self.series
            if s.points
        ]
        end = 100.0 if self.unit == "%" else self.line_at
        return bars(rows, self._colours(), step=self.series[0].points[0][0], end=end)

    def _drawn_lines(self) -> Markup:
        labels = [self._end_label(series) for series in self.series]
        right = 14 + _CHAR_PX * max((len(label) for label in labels), default=0)
        steps = [p[0] for s in self.series for p in s.points] + [
            step for s in self.series for step in s.non_finite
        ]
        first = 0.0 if min(steps) <= 0.25 * max(steps) else min(steps)
        x = Axis(first, max(steps), _LEFT, WIDTH - right)
        y = self._value_axis(HEIGHT - _BOTTOM, _TOP)
        parts = [_grid(x, y)]
        parts += [self._restart(x, step) for step in self.restarts if x.low <= step <= x.high]
        parts += [self._reference(x, y)]
        colours = self._colours()
        parts += [_line(s, c, x, y, self.unit) for s, c in zip(self.series, colours, strict=True)]
        parts += [_non_finite(s, x) for s in self.series]
        ends = [y(s.points[-1][1]) if s.points else _TOP for s in self.series]
        places = spread(ends, _LINE_PX, _TOP, HEIGHT - _BOTTOM)
        for i, (label, place) in enumerate(zip(labels, places, strict=True)):
            parts.append(
                Markup('<text class="label t{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
                    colours[i], x.last_px + 8, place + 4, label
                )
            )
        return Markup("").join(parts)

    def _value_axis(self, first_px: float, last_px: float) -> Axis:
        values = [value for s in self.series for _, value in s.points] or [0.0]
        if self.line_at is not None:
            values.append(self.line_at)
        return value_axis(
            values, first_px, last_px, from_zero=self.from_zero, may_be_log=self.may_be_log
        )

    def _colours(self) -> list[int]:
        """Ink for a total, colours for its parts: the same part has the same one in all charts."""
        first = 0 if self.series[0].label == TOTAL else 1
        return [first + i % (NUM_COLOURS - first) for i in range(len(self.series))]

    def _end_label(self, series: Series) -> str:
        value = number(series.points[-1][1]) if series.points else "not finite"
        unit = f" {self.unit}" if self.unit and len(self.unit) <= 3 else ""
        return f"{series.label} {value}{unit}" if len(self.series) > 1 else f"{value}{unit}"

    def _restart(self, x: Axis, step: float) -> Markup:
        return Markup(
            '<line class="restart" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}">'
            "<title>resumed at step {3}</title></line>"
        ).format(x(step), _TOP, HEIGHT - _BOTTOM, number(step))

    def _reference(self, x: Axis, y: Axis) -> Markup:
        if self.line_at is None:
            return Markup("")
        return Markup(
            '<line class="reference" x1="{0:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}"/>'
            '<text class="tick" x="{3:.1f}" y="{4:.1f}">{5}</text>'
        ).format(
            x.first_px, x.last_px, y(self.line_at), x.first_px + 6, y(self.line_at) + 14,
            self.line_label,
        )  # fmt: skip


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places of labels apart, as little as needed, within [low, high].

    Args:
        places: where the labels would like to be.
        gap: least distance of two.
        low: least place.
        high: greatest place; exceeded only when there are too many.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    previous = low - gap
    for i in order:
        moved[i] = previous = max(places[i], previous + gap)
    following = high + gap
    for i in reversed(order):
        moved[i] = following = min(moved[i], following - gap)
    return moved


def with_restarts(charts: Sequence[LineChart], restarts: Sequence[float]) -> list[LineChart]:
    """The charts, with a mark where the run was resumed."""
    return [replace(chart, restarts=restarts) for chart in charts]


def _grid(x: Axis, y: Axis) -> Markup:
    parts = []
    ticks = y.ticks()
    for tick, text in zip(ticks, tick_labels(ticks, is_log=y.is_log), strict=True):
        parts.append(
            Markup(
                '<line class="grid" x1="{0:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}"/>'
                '<text class="tick end" x="{3:.1f}" y="{4:.1f}">{5}</text>'
            ).format(x.first_px, x.last_px, y(tick), x.first_px - 7, y(tick) + 4, text)
        )
    for tick in step_ticks(x.low, x.high) or [x.low]:
        parts.append(
            Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(
                x(tick), HEIGHT - _BOTTOM + 17, number(tick)
            )
        )
    middle = (x.first_px + x.last_px) / 2
    parts.append(
        Markup('<text class="tick middle" x="{:.1f}" y="{}">step</text>').format(middle, HEIGHT - 5)
    )
    return Markup("").join(parts)


def _line(series: Series, colour: int, x: Axis, y: Axis, unit: str) -> Markup:
    shown = thin(series.points)
    places = [f"{x(step):.1f},{y(value):.1f}" for step, value in shown]
    smooth = trend(series.points)
    kind = " noisy" if smooth else ""
    line = Markup('<polyline class="line s{}{}" points="{}"/>').format(
        colour, kind, " ".join(places)
    )
    dotted = shown if len(shown) <= _MAX_DOTS else _remarkable(series.points)
    size = 3.2 if len(shown) <= 12 else 2.0 if len(shown) <= _MAX_DOTS else 2.6
    if smooth:
        middle = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in smooth)
        line += Markup('<polyline class="line s{}" points="{}"/>').format(colour, middle)
    return line + Markup("").join(
        Markup(
            '<circle class="dot f{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
        ).format(
            colour,
            x(step),
            y(value),
            size,
            f"{series.label}, step {number(step)}: {number(value, 4)} {unit}".rstrip(),
        )
        for step, value in dotted
    )


def _remarkable(points: Sequence[Point]) -> list[Point]:
    """The lowest, the highest and the last of many points."""
    chosen = {min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1]), points[-1]}
    return sorted(chosen)


def _non_finite(series: Series, x: Axis) -> Markup:
    """A cross at the top for each value that is no number."""
    return Markup("").join(
        Markup('<text class="bad middle" x="{:.1f}" y="{}">&#215;<title>{}</title></text>').format(
            x(step), _TOP - 2, f"{series.label} is not finite at step {number(step)}"
        )
        for step in series.non_finite[:_MAX_DOTS]
    )
