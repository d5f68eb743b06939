"""Every metric of a run in one table: last, lowest and highest value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.html_report.number_format import number
from pipeline.metrics_file import Record

MAX_METRICS = 200


@dataclass(frozen=True)
class MetricRow:
    """A metric and what became of it."""

    name: str
    last: str
    at_step: str
    lowest: str
    highest: str


def metric_table(records: Sequence[Record]) -> list[MetricRow]:
    """One row a metric, by name; values that are not finite count for the last one alone."""
    values: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if "/" in key and isinstance(value, int | float):
                values.setdefault(key, []).append((record["step"], float(value)))
    rows = []
    for name in sorted(values)[:MAX_METRICS]:
        step, last = values[name][-1]
        finite = [value for _, value in values[name] if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (None, None)
        rows.append(MetricRow(name, number(last, 4), number(step), number(low, 4), number(high, 4)))
    return rows
