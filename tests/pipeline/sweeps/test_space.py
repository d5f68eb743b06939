"""Search spaces: what their texts mean, and which values a trial gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config_values import apply_overrides
from pipeline.finetune_config import ClassifyConfig
from pipeline.finetune_recipes import FINETUNE_RECIPES, small_classify
from pipeline.sweeps.space import (
    Axis,
    check_space,
    grid_trials,
    parse_axis,
    parse_space,
    random_trial,
)
from pipeline.sweeps.space_recipes import SPACES, get_space

LR = parse_axis("optim.lr", "loguniform:1e-5:1e-2")
DECAY = parse_axis("optim.layer_decay", "choice:0.55,0.65,0.75")
STEPS = parse_axis("optim.num_steps", "int:3:5")


def config() -> ClassifyConfig:
    return apply_overrides(small_classify(), {"init.path": "scratch"})


@given(st.floats(0, 1, exclude_max=True))
def test_values_stay_within_their_axis(share: float):
    assert 1e-5 * (1 - 1e-12) <= LR.at(share) < 1e-2
    assert DECAY.at(share) in (0.55, 0.65, 0.75)
    assert STEPS.at(share) in (3, 4, 5) and isinstance(STEPS.at(share), int)
    assert 0.1 <= parse_axis("optim.min_lr", "uniform:0.1:0.2").at(share) <= 0.2


def test_equal_shares_of_a_log_range_are_equal_factors():
    middle = [LR.at(share) for share in (0.0, 1 / 3, 2 / 3)]
    assert [math.log10(value) for value in middle] == pytest.approx([-5, -4, -3])


def test_every_value_of_a_choice_is_as_likely():
    counts = {value: 0 for value in DECAY.values}
    for number in range(600):
        counts[random_trial((DECAY,), 0, number)["optim.layer_decay"]] += 1
    assert all(140 < count < 260 for count in counts.values()), counts


def test_a_trial_is_a_function_of_seed_and_number_and_axes_do_not_move_each_other():
    first = random_trial((LR, DECAY), 0, 3)
    assert first == random_trial((LR, DECAY), 0, 3) != random_trial((LR, DECAY), 0, 4)
    assert first["optim.lr"] != random_trial((LR, DECAY), 1, 3)["optim.lr"]
    assert random_trial((STEPS, LR), 0, 3)["optim.lr"] == first["optim.lr"]


def test_a_grid_has_every_combination_once():
    trials = grid_trials((DECAY, parse_axis("run.seed", "grid:0,1")))
    assert len(trials) == 6 == len({tuple(trial.values()) for trial in trials})
    assert trials[:2] == [
        {"optim.layer_decay": 0.55, "run.seed": 0},
        {"optim.layer_decay": 0.55, "run.seed": 1},
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("choice:1e-3,2", (1e-3, 2)),
        ("choice:runs/a,scratch", ("runs/a", "scratch")),
        ("choice:true,false", (True, False)),
        ("grid:[0.5,1.0],[0.7,1.0]", ([0.5, 1.0], [0.7, 1.0])),
    ],
)
def test_values_are_read_as_the_config_has_them(text: str, values: tuple[Any, ...]):
    assert parse_axis("key", text).values == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("normal:0:1", "is none of: choice:A,B"),
        ("1e-3", "is none of"),
        ("choice:", "needs values"),
        ("choice:1,1", "each once"),
        ("uniform:1", "needs two numbers: uniform:LOW:HIGH"),
        ("uniform:a:b", "needs two numbers"),
        ("uniform:2:1", "must satisfy LOW < HIGH"),
        ("loguniform:0:1", "must satisfy 0 < LOW < HIGH"),
        ("int:1:2.5", "needs whole numbers"),
        ("uniform:0:nan", "LOW < HIGH"),
    ],
)
def test_what_is_no_axis_says_why(text: str, said: str):
    with pytest.raises(ValueError, match=r"space\.optim\.lr=") as caught:
        parse_axis("optim.lr", text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "needs something to vary"),
        ({"optim.learning_rate": "uniform:0:1"}, "unknown setting"),
        ({"optim.layer_decay": "choice:0.5,1.5"}, "must lie in (0, 1]"),
        ({"optim.lr": "uniform:-1:1"}, "optim.lr"),
        ({"run.name": "choice:a,b"}, "a sweep sets it for each trial"),
    ],
    ids=["empty", "unknown", "choice out of range", "range out of range", "not theirs"],
)
def test_a_space_is_tried_on_the_config_before_anything_starts(texts: dict[str, str], said: str):
    with pytest.raises(ValueError) as caught:
        check_space(parse_space(texts), config())
    assert said in str(caught.value)


def test_a_range_is_no_grid():
    with pytest.raises(ValueError, match=r"optim.lr is a range \(loguniform\).*grid:1e-05,0.01"):
        grid_trials((DECAY, LR))


def test_axes_of_a_space_keep_their_order():
    space = parse_space({"optim.lr": "uniform:0.1:1", "run.seed": "choice:0,1"})
    assert [axis.key for axis in space] == ["optim.lr", "run.seed"]
    assert all(isinstance(axis, Axis) for axis in space)


@pytest.mark.parametrize("name", SPACES)
def test_named_spaces_fit_the_recipes(name: str):
    for task, recipes in FINETUNE_RECIPES.items():
        for recipe in recipes.values():
            base = recipe()
            assert base.task == task
            check_space(parse_space(get_space(name)), base)


def test_an_unknown_space_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'lr-decay'"):
        get_space("lr_decay")
