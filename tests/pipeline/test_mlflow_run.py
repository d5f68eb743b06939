"""The MLflow run of a run folder: started, ended and delivered late by the same command."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import tracking
from pipeline.checkpoint import ENCODER_FILE
from pipeline.config_values import apply_overrides
from pipeline.mlflow_run import MlflowRun
from pipeline.pretrain_config import PretrainConfig
from pipeline.run_folder import RunFolder
from tests.pipeline.mlflow_stores import dead_uri, steps_of, write_metrics

__all__ = ["dead_uri"]  # a fixture


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_CLOSE_PAUSES_S", (0.05,))


def test_a_new_run_without_a_server_leaves_a_folder_that_blocks_no_other_command(
    debug_config: PretrainConfig, dead_uri: str
):
    config = apply_overrides(debug_config, {"tracking.uri": dead_uri})
    with pytest.raises(ValueError, match="takes no new run"):
        MlflowRun(config, RunFolder(config)).open(num_samples=24)
    folder = RunFolder(debug_config)  # with --tracking.uri ''
    folder.check()
    run_id = MlflowRun(debug_config, folder).open(num_samples=24)
    assert folder.state["mlflow_run_id"] == run_id


def test_a_finished_run_remembers_what_mlflow_lacks_until_it_is_delivered(
    debug_config: PretrainConfig, dead_uri: str, tmp_path: Path
):
    folder = RunFolder(debug_config)
    run_id = MlflowRun(debug_config, folder).open(num_samples=24)
    (tmp_path / ENCODER_FILE).write_bytes(b"weights")
    write_metrics(folder.path, range(1, 6))
    folder.finish({"steps": 5}, tmp_path)
    away = MlflowRun(apply_overrides(debug_config, {"tracking.uri": dead_uri}), folder)
    away.close(run_id, "FINISHED")
    assert folder.state["mlflow_pending"] and folder.state["status"] == "FINISHED"
    with pytest.raises(
        ValueError, match=r"'debug' is finished .* still lacks .* start that server"
    ):
        away.deliver_late()
    there = MlflowRun(debug_config, folder)
    there.deliver_late()
    assert not folder.state["mlflow_pending"]
    run = MlflowClient(there.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time == int(folder.state["ended_at"] * 1000)
    assert steps_of(there.uri, run_id) == [1, 2, 3, 4, 5]
    away.deliver_late()  # nothing is left to do


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_run_given_up_by_a_killed_driver_is_settled_once(
    debug_config: PretrainConfig, tmp_path: Path, is_finished: bool
):
    folder = RunFolder(debug_config)
    run = MlflowRun(debug_config, folder)
    run.settle()  # it has not begun
    run_id = run.open(num_samples=24)
    write_metrics(folder.path, range(1, 4))
    if is_finished:
        (tmp_path / ENCODER_FILE).write_bytes(b"weights")
        folder.finish({"steps": 3}, tmp_path)
    run.settle()
    expected = "FINISHED" if is_finished else "KILLED"
    there = MlflowClient(run.uri).get_run(run_id)
    assert there.info.status == folder.state["status"] == expected
    assert steps_of(run.uri, run_id) == [1, 2, 3]
    ended_at = folder.state["ended_at"]
    run.settle()
    assert folder.state["ended_at"] == ended_at
