"""What the pictures of a sweep show, and what decides about its metric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.sweeps.importance import compared_at, importances, values_at
from pipeline.sweeps.pictures import draw_pictures, metric_over_time, parallel_coordinates
from pipeline.sweeps.report import TrialRow
from pipeline.sweeps.space import parse_axis, random_trial

AXES = (
    parse_axis("optim.lr", "loguniform:1e-5:1e-2"),
    parse_axis("optim.layer_decay", "choice:0.55,0.65,0.75"),
    parse_axis("init.path", "choice:scratch,runs/demo"),
)


def rows(count: int, value_of: Any, *, curve_of: Any = None) -> list[TrialRow]:
    found = []
    for number in range(count):
        overrides = random_trial(AXES, 0, number)
        value = value_of(overrides)
        curve = curve_of(number, value) if curve_of else ((90, value),)
        step = curve[-1][0] if curve else 0
        outcome: Any = "finished" if step == 90 else "stopped early"
        last = curve[-1][1] if curve else None
        found.append(TrialRow(f"t{number}", overrides, outcome, step, 90, last, 1.0, "", "", curve))
    return found


def test_the_setting_that_decides_is_the_important_one():
    by_lr = importances(rows(40, lambda o: -abs(math.log10(o["optim.lr"]) + 3)), AXES)
    assert max(by_lr, key=by_lr.__getitem__) == "optim.lr" and by_lr["optim.lr"] > 0.8
    by_init = importances(rows(40, lambda o: float(o["init.path"] == "scratch")), AXES)
    assert by_init["init.path"] > 0.8
    assert sum(by_lr.values()) == pytest.approx(1) == pytest.approx(sum(by_init.values()))


def test_trials_are_compared_where_all_have_been():
    curves = [((10, 1.0), (30, 2.0), (90, 9.0)), ((10, 1.5), (30, 4.0)), ()]
    found = rows(3, lambda o: 0.0, curve_of=lambda number, value: curves[number])
    assert compared_at(found) == pytest.approx(1 / 3)
    assert values_at(found, 1 / 3) == [2.0, 4.0, None]


@pytest.mark.parametrize("count", [0, 3, 8])
def test_too_few_trials_or_no_difference_is_no_importance(count: int):
    assert importances(rows(count, lambda o: 1.0), AXES) == {}


@pytest.mark.parametrize("count", [0, 1, 12])
def test_pictures_are_drawn_of_any_number_of_trials(count: int, tmp_path: Path):
    found = rows(count, lambda o: math.log10(o["optim.lr"]))
    paths = draw_pictures(tmp_path, found, AXES, "val/top1")
    assert [path.name for path in paths] == [
        *("parallel_coordinates.png", "metric_over_time.png", "importance.png"),
    ]
    for path in paths:
        assert np.asarray(Image.open(path)).std() > 0


def test_a_line_goes_through_the_settings_of_its_trial():
    found = rows(6, lambda o: 100 * o["optim.lr"])
    lines = {
        tuple(np.round(line.get_ydata(), 6))
        for line in parallel_coordinates(found, AXES, "top1").axes[0].lines
        if len(line.get_ydata()) == 4
    }
    values = [row.value or 0.0 for row in found]
    for row in found:
        lr = math.log(row.overrides["optim.lr"] / 1e-5) / math.log(1e3)
        decay = (0.55, 0.65, 0.75).index(row.overrides["optim.layer_decay"]) / 2
        init = float(row.overrides["init.path"] == "runs/demo")
        metric = ((row.value or 0.0) - min(values)) / (max(values) - min(values))
        assert tuple(np.round((lr, decay, init, metric), 6)) in lines


def test_the_best_is_named_and_those_given_up_are_dotted():
    curves = [((10, 1.0), (90, 9.0)), ((10, 1.5), (30, 4.0)), ((10, 3.0), (90, 8.0))]
    found = rows(3, lambda o: 0.0, curve_of=lambda number, value: curves[number])
    plot = metric_over_time(found, "top1").axes[0]
    assert [text.get_text() for text in plot.get_legend().get_texts()] == ["t0"]
    styles = {tuple(line.get_ydata()): line.get_linestyle() for line in plot.lines}
    assert styles == {(1.0, 9.0): "-", (1.5, 4.0): ":", (3.0, 8.0): "-"}
