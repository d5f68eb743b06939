"""Charts of the HTML report: no extreme is lost, no label covers another, axes are readable."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.html_report.axes import nice_ticks, tick_labels, value_axis
from pipeline.html_report.charts import HEIGHT, WIDTH, LineChart, spread
from pipeline.html_report.series import MAX_POINTS, Series, series_of, thin, trend
from pipeline.html_report.timeline import attempts, timeline_rows, timeline_svg
from tests.pipeline.reported_runs import NASTY


def chart(points: list[tuple[float, float]], label: str = "loss", **how: bool) -> LineChart:
    return LineChart(title="A chart", series=[Series(label, points, [])], **how)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5000), st.integers(10, 500))
def test_thinned_lines_keep_the_ends_and_every_extreme(
    values: list[float], max_points: int
) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(points, max_points)
    assert len(kept) <= max(max_points, 3) and set(kept) <= set(points)
    assert kept == sorted(kept) and kept[0] == points[0] and kept[-1] == points[-1]
    assert {min(v for _, v in kept), max(v for _, v in kept)} == {min(values), max(values)}


def test_a_spike_of_one_step_in_100000_is_drawn() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    svg = chart(points).svg()
    line, _ = re.findall(r'points="([^"]*)"', svg)  # the second is the trend
    heights = [float(place.split(",")[1]) for place in line.split()]
    assert len(heights) <= MAX_POINTS
    assert min(heights) < HEIGHT / 4, "the spike"
    assert "step 77\u202f777: 50" in svg, "and its value"


def test_a_point_lies_where_its_value_says() -> None:
    drawn = chart([(0.0, 0.0), (50.0, 1.0), (100.0, 2.0)], from_zero=True).svg()
    xs = [float(x) for x in re.findall(r'cx="([^"]*)"', drawn)]
    ys = [float(y) for y in re.findall(r'cy="([^"]*)"', drawn)]
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2, abs=0.1)
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.1)
    assert ys[0] > ys[1] > ys[2], "larger is higher"
    assert all(0 < x < WIDTH for x in xs) and all(0 < y < HEIGHT for y in ys)


def test_very_different_values_get_a_logarithmic_axis() -> None:
    points = [(1.0, 1000.0), (2.0, 10.0), (3.0, 0.1)]
    assert chart(points, may_be_log=True).is_log and not chart(points).is_log
    assert not chart([(1.0, 1000.0), (2.0, 0.0)], may_be_log=True).is_log, "no logarithm of 0"
    ys = [float(y) for y in re.findall(r'cy="([^"]*)"', chart(points, may_be_log=True).svg())]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0], [1e-12], [1e15, 2e15]])
def test_any_values_give_a_drawing(values: list[float]) -> None:
    svg = chart([(float(i), v) for i, v in enumerate(values)], may_be_log=True).svg()
    assert "nan" not in svg and svg.count('class="dot') == len(values)
    svg = chart([(float(i), v) for i, v in enumerate(values)], from_zero=True).svg()
    assert "nan" not in svg


def test_a_series_knows_which_values_are_no_numbers() -> None:
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": math.nan}, {"step": 3}, {"step": 4, "a": 2}]
    series = series_of(rows, "a", "A", scale=10.0)
    assert series == Series("A", [(1.0, 10.0), (4.0, 20.0)], [2.0])
    assert series_of(rows, "b", "B") is None


@given(st.lists(st.floats(0, 200), min_size=1, max_size=6))
def test_labels_at_the_ends_of_lines_never_overlap(places: list[float]) -> None:
    moved = spread(places, 16, 0, 200)
    assert all(b - a >= 16 - 1e-6 for a, b in pairwise(sorted(moved)))
    assert min(moved) >= -1e-6 and max(moved) <= 200 + 1e-6
    for (a, x), (b, y) in pairwise(sorted(zip(places, moved, strict=True))):
        assert a == b or x < y, "and keep their order"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_on_the_axis(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 1 <= len(ticks) <= 8
    slack = 1e-6 * (span + abs(low))
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)


def test_numbers_of_an_axis_have_the_same_decimals() -> None:
    assert tick_labels([0.0, 0.5, 1.0, 1.5]) == ["0", "0.5", "1.0", "1.5"]
    assert tick_labels([0.0, 2e-4, 4e-4]) == ["0", "2e\u22124", "4e\u22124"]
    assert tick_labels([0.0, 100.0, 20000.0]) == ["0", "100", "20\u202f000"]
    axis = value_axis([0.1, 1000.0], 200, 10, from_zero=False, may_be_log=True)
    assert tick_labels(axis.ticks(), is_log=True) == ["0.1", "1", "10", "100", "1000"]


def test_labels_are_escaped() -> None:
    """On lines and on bars; in the drawing and in its description."""
    for last in (1.0, 2.0):
        points = [(1.0, 2.0), (last, 3.0)]
        lines = LineChart(title=NASTY, series=[Series(NASTY, points, []), Series("b", points, [])])
        svg = lines.svg()
        assert lines.is_moment == (last == 1.0)
        assert "<script" not in svg and "<img" not in svg
        assert svg.count("&lt;script") >= 3, "title, description, label"


EVENTS = [
    {"event": "submit", "time": 100.0, "num_workers": [2, 8]},
    {"event": "start", "time": 110.0, "num_workers": 8},
    {"event": "resume", "time": 111.0, "step": 0, "lost_steps": 0, "num_workers": 8},
    {"event": "checkpoint", "time": 200.0, "step": 10, "bytes": 1024},
    {"event": "crash", "time": 300.0, "rank": 3, "error": "boom <b>"},
    {"event": "submit", "time": 9000.0, "num_workers": 8},
    {"event": "resume", "time": 9010.0, "step": 10, "lost_steps": 5, "num_workers": 8},
    {"event": "something new", "time": 9500.0},
    {"event": "end", "time": 9600.0, "status": "FAILED", "error": "too bad"},
]


def test_the_timeline_has_a_mark_for_every_event_and_a_bar_for_every_attempt() -> None:
    svg = timeline_svg(EVENTS)
    assert svg.count('class="mark') == len(EVENTS) and svg.count('class="attempt"') == 2
    assert attempts(EVENTS) == [(100.0, 300.0), (9000.0, 9600.0)]
    assert "boom &lt;b&gt;" in svg and svg.count('class="mark fault"') == 1
    assert "hours since" in svg


def test_the_table_of_events_tells_what_went_wrong() -> None:
    rows, left_out = timeline_rows(EVENTS)
    told = [(row.after, row.title, row.text, row.is_fault) for row in rows]
    assert told == [
        ("start", "submitted", "for 2 to 8 workers", False),
        ("11 s", "training began", "with 8 workers", False),
        ("3 min 20 s", "worker 3 crashed", "boom <b>", True),
        ("2 h 28 min", "submitted", "for 8 workers", False),
        ("2 h 28 min", "resumed", "at step 10, 5 steps to compute again", False),
        ("2 h 36 min", "something new", "", False),
        ("2 h 38 min", "ended: failed", "too bad", True),
    ]
    assert left_out == 0
    rows, left_out = timeline_rows([EVENTS[0]] + [EVENTS[4]] * 500 + [EVENTS[-1]])
    assert len(rows) + left_out == 502 and rows[-1].title == "ended: failed"


def test_many_noisy_points_get_their_trend_drawn_over_them() -> None:
    noisy = [(float(step), step / 100 + (-1) ** step) for step in range(6000)]
    middle = trend(noisy)
    assert len(middle) < 100 and all(abs(v - step / 100) < 1.2 for step, v in middle)
    assert chart(noisy).is_noisy and chart(noisy).svg().count("<polyline") == 2
    assert trend(noisy[:100]) == [] and chart(noisy[:100]).svg().count("<polyline") == 1


def test_values_of_one_step_are_bars_as_long_as_they_are_large() -> None:
    series = [Series("AP", [(64.0, 20.0)], []), Series("AP50", [(64.0, 40.0)], [])]
    svg = LineChart(title="Box AP", series=series, unit="%").svg()
    full, *rest = [float(w) for w in re.findall(r'class="track"[^>]* width="([^"]*)"', svg)]
    widths = [float(w) for w in re.findall(r'class="dot [^>]* width="([^"]*)"', svg)]
    assert widths == pytest.approx([0.2 * full, 0.4 * full], abs=0.1) and rest == [full]
    assert "at step 64" in svg and "<polyline" not in svg
