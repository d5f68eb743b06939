"""Trials that were over when a kill came: their MLflow runs do not stay open."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient

from pipeline.finetune_config import FinetuneConfig
from pipeline.mlflow_run import MlflowRun
from pipeline.run_folder import RunFolder
from pipeline.sweep import settle_trials
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.state import SweepState
from tests.pipeline.sweeps.test_tuner import plan


def opened(config: FinetuneConfig) -> str:
    return MlflowRun(config, RunFolder(config)).open(num_samples=24)


def test_runs_of_trials_that_are_over_are_closed_and_others_are_left_alone(tmp_path: Path):
    made = plan(
        tmp_path,
        SweepConfig(num_trials=4, searcher="grid"),
        {"optim.layer_decay": "choice:0.65,0.8,0.9,2.0"},
    )
    before = SweepState(made)
    trials = [before.next_trial() for _ in range(4)]
    over, closed, going = (made.config_of(trial) for trial in trials[:3] if trial is not None)
    ids = [opened(config) for config in (over, closed, going)]
    MlflowRun(closed, RunFolder(closed)).close(ids[1], "FAILED")
    before.end(0, "stopped early")
    before.end(1, "failed", "as it was")
    # a kill: trial 0 is over in the record, its run is not in MLflow
    settle_trials(SweepState(made))
    client = MlflowClient(MlflowRun(over, RunFolder(over)).uri)
    assert [client.get_run(id_).info.status for id_ in ids] == ["KILLED", "FAILED", "RUNNING"]
