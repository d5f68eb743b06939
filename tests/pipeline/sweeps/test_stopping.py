"""Verdicts depend on the values alone: not on who reports when."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from pipeline.sweeps.stopping import (
    OrderedStopping,
    create_stopping,
    halving,
    median_rule,
    rungs_of,
)

STEPS = 27
VALUES = st.lists(st.lists(st.integers(0, 8), min_size=9, max_size=9), min_size=1, max_size=7)
"""Of each trial at 3, 6, ... 27 steps."""


def run_in_order(stopping: OrderedStopping, curves: list[list[int]]) -> set[int]:
    """One trial after the other; those that were given up."""
    given_up = set()
    for number, curve in enumerate(curves):
        for i, value in enumerate(curve, 1):
            stopping.report(number, 3 * i / STEPS, value)
            if stopping.is_hopeless(number) and i < len(curve):
                given_up.add(number)
                break
        stopping.end(number)
    return given_up


@settings(deadline=None)
@given(VALUES, st.randoms(use_true_random=False), st.sampled_from(["asha", "median"]))
def test_any_order_of_reports_gives_the_same_verdicts(
    curves: list[list[int]], random: Any, scheduler: Any
):
    expected = run_in_order(create_stopping(scheduler, 1 / 9, 3.0), curves)
    stopping = create_stopping(scheduler, 1 / 9, 3.0)
    done = [0] * len(curves)
    given_up: set[int] = set()
    running = set(range(len(curves)))
    while running:
        number = random.choice(sorted(running))
        done[number] += 1
        stopping.report(number, 3 * done[number] / STEPS, curves[number][done[number] - 1])
        if done[number] == 9 or (stopping.is_hopeless(number) and random.random() < 0.7):
            running.discard(number)
            stopping.end(number)
    given_up = {number for number in range(len(curves)) if stopping.is_hopeless(number)}
    assert given_up == expected


@settings(deadline=None)
@given(VALUES)
def test_halving_in_order_is_rays_asha(curves: list[list[int]]):
    asha = AsyncHyperBandScheduler(
        time_attr="step",
        metric="value",
        mode="max",
        max_t=STEPS,
        grace_period=3,
        reduction_factor=3,
        stop_last_trials=False,
    )
    expected = set()
    for number, curve in enumerate(curves):
        trial = type("Trial", (), {"trial_id": str(number)})()
        asha.on_trial_add(cast(Any, None), trial)
        for i, value in enumerate(curve[:-1], 1):  # Ray has a rung at the end, too
            result = {"step": 3 * i, "value": value}
            if asha.on_trial_result(cast(Any, None), trial, result) == TrialScheduler.STOP:
                expected.add(number)
                break
    assert run_in_order(create_stopping("asha", 1 / 9, 3.0), curves) == expected


def test_a_verdict_waits_for_those_before_and_not_for_those_after():
    stopping = OrderedStopping([0.1], halving(3.0))
    stopping.report(1, 0.1, 1.0)
    stopping.report(2, 0.1, 3.0)
    assert not stopping.is_hopeless(1)  # 0 may be worse still
    stopping.report(0, 0.1, 2.0)
    assert [stopping.is_hopeless(i) for i in range(3)] == [False, True, False]


def test_a_trial_that_ends_early_keeps_nobody_waiting():
    stopping = OrderedStopping([0.1, 0.3], halving(3.0))
    for number, value in enumerate((5.0, 4.0, 1.0)):
        stopping.report(number, 0.2, value)
    assert stopping.is_hopeless(1)
    stopping.end(1)
    stopping.report(0, 0.3, 6.0)
    stopping.report(2, 0.3, 9.0)
    assert stopping.is_hopeless(2)  # by the first rung, where it was judged once and for all


def test_a_failed_trial_counts_only_where_it_got_to():
    stopping = OrderedStopping([0.1, 0.3], halving(2.0))
    stopping.report(0, 0.1, 5.0)
    stopping.end(0)
    stopping.report(1, 0.1, 5.0)
    stopping.report(1, 0.3, 0.0)
    assert not stopping.is_hopeless(1)
    stopping.report(2, 0.1, 4.0)
    assert stopping.is_hopeless(2)


def test_the_first_report_after_a_rung_counts_there():
    stopping = OrderedStopping([0.1, 0.3], halving(2.0))
    stopping.report(0, 0.05, -1.0)
    stopping.report(0, 0.35, 5.0)
    stopping.report(0, 0.9, 100.0)
    stopping.report(1, 0.12, 5.0)
    stopping.report(1, 0.3, 4.9)
    assert stopping.is_hopeless(1)


@pytest.mark.parametrize(
    ("mine", "others", "is_hopeless"),
    [
        ([1.0, 2.0], [[9.0], [9.0]], False),  # two others are too few
        ([1.0, 2.0], [[1.0, 3.0], [2.0, 4.0], [9.0, 9.0]], True),  # means 2, 3, 9
        ([3.0, 0.0], [[1.0, 3.0], [2.0, 4.0], [9.0, 9.0]], False),  # its best is the median
    ],
)
def test_the_median_rule(mine: list[float], others: list[list[float]], is_hopeless: bool):
    assert median_rule(mine, others) is is_hopeless


def test_rungs_lie_below_the_end():
    assert rungs_of("asha", 1 / 9, 3.0) == pytest.approx((1 / 9, 1 / 3))
    assert rungs_of("asha", 0.1, 3.0) == pytest.approx((0.1, 0.3, 0.9))
    assert rungs_of("median", 0.25, 3.0) == pytest.approx((0.25, 0.5, 0.75))
    assert rungs_of("none", 0.25, 3.0) == ()
    for grace in np.linspace(0.01, 0.99, 50):
        for scheduler in ("asha", "median"):
            rungs = rungs_of(cast(Any, scheduler), grace, 2.0)
            assert rungs[0] == grace and max(rungs) < 1 and not math.isnan(sum(rungs))
