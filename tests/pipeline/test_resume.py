"""Exact resume: a run killed anywhere ends as if it had not been, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.data import Batch
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import debug
from tests.pipeline.loop import LocalRun
from tests.pipeline.test_pretrain import assert_same_state

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_STEPS, EVERY = 12, 5
Moment = tuple[str, int]
"""Where a run is killed: a hook, or "batch" in the middle of a step, and the step."""


class KilledError(Exception):
    """Stands for the death of the process."""


@dataclass
class MortalRun(LocalRun):
    """A run that dies when told to."""

    dies: Moment = ("never", 0)

    def _die_in(self, place: str, step: int) -> None:
        if self.dies == (place, step):
            raise KilledError

    def _on_start(self, step: int) -> None:
        super()._on_start(step)
        self._die_in("start", step)

    def _on_metrics(self, step: int, metrics: dict[str, float]) -> bool:
        wish = super()._on_metrics(step, metrics)
        self._die_in("metrics", step)
        return wish

    def _on_checkpoint(self, step: int, metrics: dict[str, float]) -> None:
        super()._on_checkpoint(step, metrics)
        self._die_in("checkpoint", step)


@pytest.fixture(scope="module")
def whole(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> LocalRun:
    """The uninterrupted run: 12 steps of 4 over 24 images, two micro-batches each."""
    settings = {
        "run.checkpoint_every_steps": EVERY,
        "run.evaluate_every_steps": 6,
        "data.path": str(image_folder),
        "data.image_size": 32,
        "data.global_batch_size": 4,
        "data.num_eval_crops": 4,
        "scaling.max_batch_size_per_worker": 2,
        "optim.num_steps": NUM_STEPS,
        "optim.clip_grad_norm": 1.0,
    }
    folder = tmp_path_factory.mktemp("whole")
    run = LocalRun(apply_overrides(debug(), settings), folder)
    run()
    return run


def final_state(run: LocalRun) -> dict[str, Any]:
    newest = run.checkpointer.latest()
    assert newest is not None
    return load_state(newest)


def live(config: PretrainConfig, folder: Path, *deaths: Moment) -> list[LocalRun]:
    """Run, dying at each moment in turn, then to the end."""
    runs: list[LocalRun] = []
    for moment in (*deaths, None):
        run = MortalRun(config, folder)
        runs.append(run)
        if moment is None:
            run()
            continue
        place, last = moment
        if place == "batch":
            run.change_batch = die_at_step(last)
        else:
            run.dies = moment
        with pytest.raises(KilledError):
            run()
    return runs


def die_at_step(last: int) -> Any:
    batches = iter(range(2))

    def change(step: int, batch: Batch) -> Batch:
        if step == last and next(batches):  # after the first of its two micro-batches
            raise KilledError
        return batch

    return change


def assert_same_run(runs: list[LocalRun], whole: LocalRun) -> None:
    """The final state and every record ever made are the same, and none is missing."""
    assert_same_state(final_state(runs[-1]), final_state(whole))
    expected = whole.history()
    for run in runs:
        for step, record in run.history().items():
            assert record == expected[step], f"step {step}"
    assert set().union(*(run.records for run in runs)) == set(whole.records)


def test_a_run_killed_at_every_step_in_turn_ends_bit_for_bit_like_an_uninterrupted_one(
    whole: LocalRun, tmp_path: Path
) -> None:
    """Each time right before the step's checkpoint: at 1; again from 0, at 2; and so on."""
    runs = live(whole.config, tmp_path, *(("metrics", step) for step in range(1, NUM_STEPS + 1)))
    last_saved = [max(0, last - 1) // EVERY * EVERY for last in range(NUM_STEPS + 1)]
    assert [run.started_at for run in runs] == last_saved
    assert_same_run(runs, whole)


@pytest.mark.parametrize(
    ("deaths", "starts"),
    [
        ([("checkpoint", 5)], [0, 5]),
        ([("checkpoint", 12)], [0, 12]),
        ([("batch", 0), ("start", 0)], [0, 0, 0]),
        ([("batch", 5), ("batch", 11)], [0, 5, 10]),
        ([("metrics", 7), ("metrics", 6)], [0, 5, 5]),
        ([("metrics", 4), ("checkpoint", 10), ("batch", 10)], [0, 0, 10, 10]),
        ([("batch", 8), ("start", 5), ("checkpoint", 12)], [0, 5, 5, 12]),
    ],
    ids=str,
)
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_an_uninterrupted_one(
    whole: LocalRun, tmp_path: Path, deaths: list[Moment], starts: list[int]
) -> None:
    runs = live(whole.config, tmp_path, *deaths)
    assert [run.started_at for run in runs] == starts
    assert_same_run(runs, whole)


def test_checkpoints_asked_for_in_between_change_nothing_but_where_a_run_goes_on(
    whole: LocalRun, tmp_path: Path
) -> None:
    """As a clock or a node about to go ask for them, through `wants_checkpoint`."""
    first = MortalRun(whole.config, tmp_path, save_at=(2, 5, 7), dies=("metrics", 9))
    with pytest.raises(KilledError):
        first()
    assert first.saved == [2, 5, 7], "no second one where one was due"
    resumed = LocalRun(whole.config, tmp_path, save_at=(9,))
    resumed()
    assert resumed.started_at == 7 and resumed.saved == [9, 10, 12]
    assert_same_run([first, resumed], whole)


def test_checkpoints_are_asked_for_at_log_steps_only(whole: LocalRun, tmp_path: Path) -> None:
    config = apply_overrides(whole.config, {"run.log_every_steps": 4, "optim.num_steps": 9})
    run = LocalRun(config, tmp_path, save_at=tuple(range(1, 10)))
    run()
    assert run.saved == [4, 5, 6, 8, 9], "log, checkpoint and evaluation steps"


@pytest.mark.parametrize("stops", [(3, 8), (5, 6), (1, 11)], ids=str)
def test_stops_save_where_they_happen_and_change_no_result(
    whole: LocalRun, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    runs = []
    for stop_at in (*stops, -1):
        run = LocalRun(whole.config, tmp_path, stop_at=stop_at)
        summary = run()
        assert summary["is_stopped"] == (stop_at > 0)
        assert summary["steps"] == (stop_at if stop_at > 0 else NUM_STEPS)
        assert run.saved[-1] == summary["steps"]
        runs.append(run)
    assert [run.started_at for run in runs] == [0, *stops]
    assert_same_run(runs, whole)
    assert list(chain(*(run.seen for run in runs))) == whole.seen, "no sample twice, none left out"


def test_a_stop_and_a_checkpoint_asked_for_together_save_once_and_stop(
    whole: LocalRun, tmp_path: Path
) -> None:
    run = LocalRun(whole.config, tmp_path, stop_at=3, save_at=(3,))
    assert run()["is_stopped"] and run.saved == [3]
