"""Bars side by side: what a chart shows of values that exist for one step only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.html_report.axes import Axis
from pipeline.html_report.number_format import number

WIDTH = 440
"""Of every chart, in its own pixels."""
_ROW, _TOP, _BOTTOM, _LEFT, _RIGHT = 34, 8, 24, 92, 84


def bar_height(num_rows: int) -> int:
    """Height of a drawing of so many bars."""
    return _TOP + _ROW * num_rows + _BOTTOM


def bars(
    rows: Sequence[tuple[str, float, str]],
    colours: Sequence[int],
    *,
    step: float,
    end: float | None,
) -> Markup:
    """Draw the bars, from 0.

    Args:
        rows: name, value and the value as text.
        colours: number of the colour of each.
        step: at which the values were found.
        end: what the longest possible bar stands for; None for the largest value.
    """
    values = [max(value, 0.0) for _, value, _ in rows if math.isfinite(value)]
    x = Axis(0.0, max(*values, end or 0.0, 1e-300), _LEFT, WIDTH - _RIGHT)
    parts = []
    for i, ((name, value, text), colour) in enumerate(zip(rows, colours, strict=True)):
        middle = _TOP + _ROW * i + _ROW / 2
        width = max(x(max(value, 0.0)) - x(0.0), 2.0)
        parts.append(
            Markup(
                '<text class="tick end" x="{0}" y="{1:.1f}">{2}</text>'
                '<rect class="track" x="{3}" y="{4:.1f}" width="{5}" height="12" rx="3"/>'
                '<rect class="dot f{6}" x="{3}" y="{4:.1f}" width="{7:.1f}" height="12" rx="3"/>'
                '<text class="label t{6}" x="{8}" y="{1:.1f}">{9}</text>'
            ).format(
                *(_LEFT - 10, middle + 4, name, _LEFT, middle - 6, WIDTH - _LEFT - _RIGHT),
                *(colour, width, WIDTH - _RIGHT + 8, text),
            )
        )
    note = Markup('<text class="tick" x="{}" y="{}">at step {}</text>').format(
        _LEFT, _TOP + _ROW * len(rows) + 16, number(step)
    )
    return Markup("").join([*parts, note])
