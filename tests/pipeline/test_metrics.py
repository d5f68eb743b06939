"""The meter, under a clock the tests turn themselves."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline import metrics
from pipeline.metrics import Meter, peak_memory_gib


class Clock:
    """Stands still unless told to pass."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def passes(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=clock))
    return clock


def take_step(meter: Meter, clock: Clock, *, wait_s: float, work_s: float) -> None:
    with meter.waiting():
        clock.passes(wait_s)
    clock.passes(work_s)
    meter.step_done()


def test_metrics_count_images_waiting_and_seconds_since_the_last_call(clock: Clock) -> None:
    meter = Meter(images_per_step=32)
    for _ in range(4):
        take_step(meter, clock, wait_s=0.5, work_s=1.5)
    expected = {"perf/images_per_s": 16.0, "perf/data_wait_frac": 0.25, "perf/step_s": 2.0}
    assert meter.metrics() == pytest.approx(expected)
    take_step(meter, clock, wait_s=0.0, work_s=1.0)
    expected = {"perf/images_per_s": 32.0, "perf/data_wait_frac": 0.0, "perf/step_s": 1.0}
    assert meter.metrics() == pytest.approx(expected)


def test_paused_time_counts_nowhere(clock: Clock) -> None:
    meter = Meter(images_per_step=32)
    for _ in range(12):
        take_step(meter, clock, wait_s=0.5, work_s=1.5)
        with meter.paused():
            clock.passes(100)
    assert meter.metrics()["perf/images_per_s"] == pytest.approx(16)
    assert meter.totals() == pytest.approx({"images_per_s": 16.0, "data_wait_frac": 0.25})


def test_totals_exclude_the_first_ten_steps(clock: Clock) -> None:
    meter = Meter(images_per_step=10)
    for step in range(15):
        is_early = step < 10
        take_step(meter, clock, wait_s=50 if is_early else 0.5, work_s=50 if is_early else 1.5)
    assert meter.totals() == pytest.approx({"images_per_s": 5.0, "data_wait_frac": 0.25})


def test_totals_of_a_short_run_count_all_of_it(clock: Clock) -> None:
    meter = Meter(images_per_step=10)
    for _ in range(4):
        take_step(meter, clock, wait_s=1, work_s=1)
    assert meter.totals() == pytest.approx({"images_per_s": 5.0, "data_wait_frac": 0.5})


def test_calls_without_time_or_steps_between_them_are_finite(clock: Clock) -> None:
    meter = Meter(images_per_step=10)
    expected = {"perf/images_per_s": 0.0, "perf/data_wait_frac": 0.0, "perf/step_s": 0.0}
    # abs: the shortest span is taken as 1e-9 s.
    assert meter.metrics() == pytest.approx(expected, abs=1e-9)


def test_peak_memory_of_a_process_is_at_least_what_it_holds() -> None:
    held = torch.ones(2**25)  # 128 MiB
    resident_gib = psutil.Process().memory_info().rss / 2**30
    peak_gib = peak_memory_gib(held.device)["memory/peak_gib"]
    # The two counters of the kernel are updated at different moments: 5% apart at most.
    assert 0.95 * resident_gib <= peak_gib < 64
