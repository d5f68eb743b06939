"""Steps that overflow: skipped by all workers together, counted, and at last the end of the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.data import Batch
from pipeline.nonfinite import NonFiniteLossError
from pipeline.pretrain_config import PretrainConfig
from pipeline.replay import replay
from tests.pipeline.loop import LocalRun
from tests.pipeline.overflows import (
    BATCH,
    overflowing_config,
    paint_white,
    write_dump,
    write_images,
)
from tests.pipeline.test_pretrain import assert_same_state
from tests.pipeline.two_trainers import skip_together

pytestmark = pytest.mark.usefixtures("one_thread")
BRIGHT = 5
PARTS = ("model", "teacher", "optimizer")


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """A run over 24 images, one of which overflows."""
    write_images(tmp_path / "images", bright=(BRIGHT,))
    return overflowing_config(tmp_path / "images")


@pytest.fixture
def dark_config(tmp_path: Path) -> PretrainConfig:
    """A run over images none of which overflows."""
    write_images(tmp_path / "dark", bright=())
    return overflowing_config(tmp_path / "dark")


def painted(config: PretrainConfig, folder: Path, steps: tuple[int, ...]) -> LocalRun:
    """A run whose batches of these steps (the first is 0) hold a white image."""

    def paint(step: int, batch: Batch) -> Batch:
        return paint_white(batch) if step in steps else batch

    return LocalRun(config, folder, change_batch=paint)


def saved_state(run: LocalRun, step: int) -> dict[str, Any]:
    return load_state(run.checkpointer.fetch(step))


def trained_parts(state: dict[str, Any]) -> dict[str, Any]:
    """What a skipped step must not touch; the learning rate is set before every step."""
    groups = [{**group, "lr": None} for group in state["optimizer"]["param_groups"]]
    optimizer = {**state["optimizer"], "param_groups": groups}
    return {k: dict(v) for k, v in {**state, "optimizer": optimizer}.items() if k in PARTS}


def is_changed(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return any(not torch.equal(before[key], after[key]) for key in before)


def test_only_the_steps_that_hold_the_overflowing_image_are_skipped(
    config: PretrainConfig, tmp_path: Path
) -> None:
    run = LocalRun(config, tmp_path / "run")
    summary = run()
    steps = [run.rows[BATCH * step : BATCH * (step + 1)] for step in range(6)]
    guilty = [step + 1 for step, rows in enumerate(steps) if BRIGHT in rows]
    assert len(guilty) == 2, "once an epoch"
    assert summary["steps"] == 6 and summary["skipped_steps"] == 2 and not summary["is_stopped"]
    skipped = 0
    for step in range(2, 7):
        before, after = (trained_parts(saved_state(run, s)) for s in (step - 1, step))
        if step in guilty:
            assert_same_state(before, after)
        else:
            assert is_changed(before["model"], after["model"])
            assert is_changed(before["teacher"], after["teacher"])
    for step, record in run.records.items():
        skipped += step in guilty
        assert record["train/skipped_steps"] == skipped
        assert ("train/loss" in record) == ("train/grad_norm" in record) == (step not in guilty)
        assert all(map(math.isfinite, record.values()))
    last = max(set(run.records) - set(guilty))
    assert summary["metrics"]["train/loss"] == run.records[last]["train/loss"]


def test_a_skipped_step_does_not_count_in_adams_bias_correction(
    dark_config: PretrainConfig, tmp_path: Path
) -> None:
    run = painted(dark_config, tmp_path / "run", (0, 2))
    run()
    updates = [saved_state(run, step)["optimizer"]["state"] for step in range(1, 7)]
    assert updates[0] == {}
    assert [float(update[0]["step"]) for update in updates[1:]] == [1, 1, 2, 3, 4]


def test_more_overflows_in_a_row_than_allowed_end_the_run_before_an_update(
    dark_config: PretrainConfig, tmp_path: Path
) -> None:
    run = painted(dark_config, tmp_path / "run", (1, 3, 4, 5))
    message = (
        r"step 6: loss (inf|nan) with gradient norm (inf|nan) is not finite, the 3\. such step in "
        r"a row; stopped before an update \(last logged loss "
    )
    with pytest.raises(NonFiniteLossError, match=message) as error:
        run()
    assert f"(last logged loss {run.records[3]['train/loss']:.6g})" in str(error.value)
    assert "optim.lr" in str(error.value) and "--run.allow-config-change" in str(error.value)
    assert max(run.records) == 5 and run.saved == [1, 2, 3, 4, 5]
    newest = saved_state(run, 5)
    assert (newest["skipped_steps"], newest["skipped_in_a_row"]) == (3, 2)
    assert_same_state(trained_parts(newest), trained_parts(saved_state(run, 3)))
    assert (run.dump["step"], run.dump["skipped_in_a_row"]) == (3, 0)
    assert [part["step"] for part in run.dump["streak"]] == [3, 4, 5]
    assert_same_state(
        {k: dict(run.dump[k]) for k in ("model", "teacher")},
        {k: newest[k] for k in ("model", "teacher")},
    )
    fed = [micro["row"] for part in run.dump["streak"] for micro in part["micro_batches"]]
    assert fed == [run.rows[BATCH * step : BATCH * (step + 1)] for step in (3, 4, 5)]


def test_finite_steps_in_between_start_the_count_again(
    dark_config: PretrainConfig, tmp_path: Path
) -> None:
    run = painted(dark_config, tmp_path / "run", (0, 1, 3, 4))
    assert run()["skipped_steps"] == 4 and not run.dump
    state = saved_state(run, 6)
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (4, 0)


def test_none_may_be_skipped_when_the_limit_is_0(
    dark_config: PretrainConfig, tmp_path: Path
) -> None:
    config = apply_overrides(dark_config, {"optim.max_skipped_steps": 0})
    with pytest.raises(NonFiniteLossError, match=r"step 3: .* the 1\. such step in a row"):
        painted(config, tmp_path / "run", (2,))()


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4])
def test_a_run_killed_in_a_streak_counts_on_and_ends_like_one_that_was_not(
    dark_config: PretrainConfig, tmp_path: Path, kill_at: int
) -> None:
    config = apply_overrides(dark_config, {"run.evaluate_every_steps": 100})
    steps = (1, 2, 4)
    whole = painted(config, tmp_path / "whole", steps)
    whole()
    killed = painted(config, tmp_path / "killed", steps)
    paint = killed.change_batch

    def die(step: int, batch: Batch) -> Batch:
        if step == kill_at:
            raise KeyboardInterrupt
        return paint(step, batch)

    killed.change_batch = die
    with pytest.raises(KeyboardInterrupt):
        killed()
    resumed = painted(config, tmp_path / "killed", steps)
    summary = resumed()
    assert resumed.started_at == kill_at and summary["skipped_steps"] == 3
    assert_same_state(saved_state(resumed, 6), saved_state(whole, 6))
    records = {step: record["train/skipped_steps"] for step, record in resumed.records.items()}
    assert records == {s: whole.records[s]["train/skipped_steps"] for s in range(kill_at + 1, 7)}


def test_a_streak_over_a_restart_ends_the_run_at_the_same_step(
    dark_config: PretrainConfig, tmp_path: Path
) -> None:
    stopped = painted(dark_config, tmp_path / "run", (2, 3, 4))
    stopped.stop_at = 4
    assert stopped()["is_stopped"]
    resumed = painted(dark_config, tmp_path / "run", (2, 3, 4))
    with pytest.raises(NonFiniteLossError, match=r"step 5: .* the 3\. such step"):
        resumed()
    assert [part["step"] for part in resumed.dump["streak"]] == [4], "what this process has seen"


def test_two_workers_skip_together_although_only_one_of_them_overflows(
    config: PretrainConfig, tmp_path: Path
) -> None:
    """And both are, bit for bit, what one worker with the same micro-batches is."""
    pair = apply_overrides(config, {"scaling.num_workers": 2})
    arguments = (str(tmp_path / "init"), str(tmp_path), pair)
    multiprocessing.spawn(skip_together, args=arguments, nprocs=2)
    alone = LocalRun(pair, tmp_path / "alone")
    summary = alone()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert sum(result["rows"].count(BRIGHT) for result in results) == 2
    for result in results:
        assert result["skipped_steps"] == summary["skipped_steps"] == 2
        assert_same_state(
            trained_parts(result["state"]), trained_parts(saved_state(alone, 6)), "worker"
        )
    # Where none may be skipped both end at once; worker 0 leaves a dump of both workers' shares.
    errors = {result["error"].split(":")[0] for result in results}
    assert len(errors) == 1 and errors.pop().startswith("step ")
    dump = results[0]["dump"]
    assert [part["rank"] for part in dump["streak"]] == [0, 1] and results[1]["dump"] == {}
    assert [step.bad_samples for step in replay(write_dump(pair, dump))] == [
        [f"{config.data.path}/{BRIGHT:02d}.png"]
    ]
