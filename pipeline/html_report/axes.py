"""Axes of a chart: which values get a tick, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.html_report.number_format import grouped, number

_LOG_RANGE = 30.0  # largest over smallest value above which a linear axis hides the small ones


@dataclass(frozen=True)
class Axis:
    """Maps values from [low, high] to pixels."""

    low: float
    high: float
    first_px: float
    last_px: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; what lies outside is put on the edge."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.first_px + share * (self.last_px - self.first_px)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the axis."""
        if self.is_log:
            found = _log_ticks(self.low, self.high)
            if len(found) >= 2:
                return found
        return nice_ticks(self.low, self.high, count)


def value_axis(
    values: Sequence[float], first_px: float, last_px: float, *, from_zero: bool, may_be_log: bool
) -> Axis:
    """An axis for these values, a little wider than they are.

    Args:
        values: at least one, finite.
        first_px: where the lowest goes.
        last_px: where the highest goes.
        from_zero: begin at 0 where all values are 0 or more.
        may_be_log: take logarithms where the values differ a lot and are all above 0.
    """
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low > _LOG_RANGE:
        return Axis(low / 1.15, high * 1.15, first_px, last_px, is_log=True)
    if from_zero and low >= 0:
        return Axis(0.0, high * 1.08 or 1.0, first_px, last_px)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = low - pad
    return Axis(0.0 if bottom < 0 <= low else bottom, high + pad, first_px, last_px)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def step_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """As `nice_ticks`, whole numbers only: there are no half steps."""
    return sorted(
        {float(round(tick)) for tick in nice_ticks(low, high, count) if tick >= low - 0.5}
    )


def tick_labels(ticks: Sequence[float], *, is_log: bool = False) -> list[str]:
    """Numbers of an axis with as many decimals each as the finest of them needs."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if is_log or (largest > 0 and largest < 1e-3) or largest >= 1e9:
        return ["0" if tick == 0 else number(tick, 2, is_exact=True) for tick in ticks]
    for decimals in range(7):
        if all(abs(round(tick, decimals) - tick) < 1e-9 + 1e-6 * abs(tick) for tick in ticks):
            break
    return [grouped(tick, 0 if tick == 0 else decimals) for tick in ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [m * 10.0**k for k in range(first, last + 1) for m in factors]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks[:: max(1, len(ticks) // 6)]
