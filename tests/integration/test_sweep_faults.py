"""Sweeps that are killed, squeezed, submitted and looked at; each a command in a process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.sweeps.trials import TrialBook
from tests.conftest import REPO_ROOT
from tests.pipeline.labelled_sets import write_labelled_set

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1200)]
WAIT_S = 400.0
NUM_TRIALS = 4


class SweepJob:
    """`python -m jobs.sweep` on a tiny data set, in a process."""

    def __init__(self, data: Path, storage: Path, *more: str, address: str | None = None) -> None:
        self.folder = storage / "sweep"
        self.storage = storage
        self.output = storage / "output.log"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        if address is not None:
            self.environment |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        self.arguments = [
            *("classify", "small-classify", "--init", "scratch", "--model.name", "itpn_debug"),
            *("--data.path", str(data / "train"), "--data.val-path", str(data / "val")),
            *("--data.num-cpus", "0", "--data.global-batch-size", "8"),
            *("--optim.num-steps", "18", "--run.log-every-steps", "1"),
            *("--run.checkpoint-every-steps", "3"),
            *("--run.storage-path", str(storage), "--run.name", "sweep"),
            *("--space.optim.lr", "loguniform:1e-5:1e-1", "--num-trials", str(NUM_TRIALS), *more),
        ]

    def start(self) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "jobs.sweep", *self.arguments],
                cwd=REPO_ROOT,
                stdout=output,
                stderr=output,
                env=self.environment,
            )

    def finish(self) -> dict[str, Any]:
        """Run the command to its end; the summary it leaves."""
        assert self.start().wait(WAIT_S) == 0, self.output.read_text()[-4000:]
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def runs(self) -> list[Any]:
        client = MlflowClient(f"sqlite:///{self.storage / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("itpn-finetune")
        return list(client.search_runs([experiment.experiment_id]))


def facts(job: SweepJob) -> dict[str, Any]:
    """What a kill must not change."""
    book = TrialBook(job.folder)
    summary = json.loads((job.folder / "summary.json").read_text())
    return {
        "trials": book.trials,
        "outcomes": {number: ending.outcome for number, ending in book.endings.items()},
        "best": (summary["best_trial"], summary["best_metric"]),
    }


def assert_tracked_once(job: SweepJob) -> None:
    """One parent, one run for each trial, nothing that still seems to run."""
    runs = job.runs()
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["sweep"]
    trials = [run for run in runs if run not in parents]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parents[0].info.run_id}
    names = Counter(run.info.run_name for run in trials)
    assert names == {trial.name: 1 for trial in TrialBook(job.folder).trials}
    assert "RUNNING" not in {run.info.status for run in runs}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_labelled_set(folder / "train", "classify", num_samples=24)
    write_labelled_set(folder / "val", "classify", num_samples=41, seed=1)
    return folder


@pytest.fixture(scope="module")
def calm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepJob, float]:
    """A sweep nothing happens to, and its seconds."""
    job = SweepJob(data, tmp_path_factory.mktemp("calm"))
    start = time.monotonic()
    job.finish()
    return job, time.monotonic() - start


def test_an_undisturbed_sweep_gives_up_some_trials_and_finishes_others(
    calm: tuple[SweepJob, float],
):
    job, _ = calm
    outcomes = Counter(facts(job)["outcomes"].values())
    assert outcomes["finished"] >= 1 and outcomes["stopped early"] >= 1
    assert sum(outcomes.values()) == NUM_TRIALS
    assert_tracked_once(job)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sweep_killed_at_a_random_moment_ends_like_an_undisturbed_one(
    calm: tuple[SweepJob, float], data: Path, tmp_path: Path, seed: int
):
    calm_job, seconds = calm
    job = SweepJob(data, tmp_path)
    process = job.start()
    time.sleep(random.Random(seed).uniform(0.15, 0.9) * seconds)
    process.kill()
    process.wait()
    job.finish()
    assert facts(job) == facts(calm_job)
    assert_tracked_once(job)


def test_ctrl_c_saves_every_trial_and_the_same_command_goes_on(
    calm: tuple[SweepJob, float], data: Path, tmp_path: Path
):
    job = SweepJob(data, tmp_path)
    process = job.start()
    deadline = time.monotonic() + WAIT_S
    while not list(job.folder.glob("trial_*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, job.output.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 130
    assert "the same command goes on" in job.output.read_text()
    assert {run.info.status for run in job.runs()} <= {"KILLED", "FINISHED"}
    job.finish()
    assert facts(job) == facts(calm[0])
    assert_tracked_once(job)


def test_all_trials_failing_is_an_error_with_the_reason(data: Path, tmp_path: Path):
    job = SweepJob(data, tmp_path, "--num-trials", "2")
    job.arguments[job.arguments.index("loguniform:1e-5:1e-1")] = "uniform:1e30:2e30"
    assert job.start().wait(WAIT_S) == 1
    output = job.output.read_text()
    assert "error: none of 2 trials finished" in output and "finite" in output


@pytest.fixture
def busy_cluster() -> Iterator[str]:
    """Two CPUs, one of which somebody else has taken for good."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    code = "import ray, time; ray.init(); ray.remote(num_cpus=1)(lambda: time.sleep(9e9)).remote();"
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    holder = subprocess.Popen([sys.executable, "-c", f"{code} time.sleep(9e9)"], env=environment)
    time.sleep(10)
    yield cluster.address
    holder.kill()
    cluster.shutdown()


def test_one_cpu_left_is_slow_but_no_deadlock(data: Path, tmp_path: Path, busy_cluster: str):
    """The sweep counts on two trials at a time, and only ever gets one."""
    job = SweepJob(data, tmp_path, "--num-trials", "3", address=busy_cluster)
    summary = job.finish()
    assert summary["num_trials"] == 3 and summary["num_failed"] == 0
    assert "2 trials at a time" in job.output.read_text()


def test_ray_job_submit_runs_a_population(data: Path, tmp_path: Path, ray_cluster: str):
    job = SweepJob(data, tmp_path, "--num-trials", "4", "--scheduler", "pbt", "--grace", "0.5")
    job.arguments += ["--max-concurrent-trials", "2"]
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_cluster),
        *("--working-dir", ".", "--", sys.executable, "jobs/sweep.py", *job.arguments),
    ]
    done = subprocess.run(
        command,
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "goes on from trial" in done.stdout
    summary = json.loads((job.folder / "summary.json").read_text())
    assert summary["num_finished"] == 4
    assert (
        summary["best_command"] == f"python -m jobs.evaluate {job.folder / summary['best_trial']}"
    )
    (copy,) = TrialBook(job.folder).copies
    steps = [
        json.loads(line)["step"]
        for line in (job.folder / f"trial_{copy.number:04d}" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    assert steps == list(range(1, 19))
    assert_tracked_once(job)
