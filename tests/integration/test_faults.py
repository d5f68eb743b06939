"""Whole runs that lose workers, nodes, the head, their driver, and end as if they had not."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from benchmarks.chaos import compare
from benchmarks.simulated_cluster import Job, SimulatedCluster
from pipeline.checkpoint import Checkpointer, load_state
from pipeline.tracking import default_tracking_uri

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_S = 240.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # Frequent, so that a test need not wait for the news of a drained node.
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        with SimulatedCluster(2) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def settings(images: Path, *more: str, num_steps: int = 30, checkpoint_every: int = 5) -> list[str]:
    return [
        *("--data.path", str(images), "--optim.num-steps", str(num_steps)),
        *("--run.checkpoint-every-steps", str(checkpoint_every)),
        *("--run.picture-every-steps", "1000", *more),
    ]


def on_nodes(num_workers: str = "2") -> list[str]:
    numbers = num_workers.split()
    return ["--scaling.num-workers", *numbers, "--scaling.worker-resource", "trainer"]


@pytest.fixture(scope="module")
def calm(cluster: SimulatedCluster, storage: Path, image_folder: Path) -> Job:
    """30 undisturbed steps on two workers."""
    job = Job(storage, "calm", settings(image_folder, *on_nodes()), cluster.address)
    job.start()
    assert job.wait(WAIT_S) == 0, job.output.read_text()[-4000:]
    return job


def last_state(job: Job) -> dict[str, Any]:
    newest = Checkpointer(job.folder / "checkpoints", keep=1, facts={}).latest()
    assert newest is not None
    return load_state(newest)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def test_a_run_that_loses_a_worker_a_node_and_its_driver_ends_bit_identical(
    calm: Job, cluster: SimulatedCluster, storage: Path, image_folder: Path
) -> None:
    job = Job(storage, "stormy", settings(image_folder, *on_nodes()), cluster.address)
    job.start()
    job.wait_for_step(7, WAIT_S)
    cluster.training_workers()[0].kill()
    wait_until(lambda: len(job.events("resume")) == 2, "the restart after a lost worker")
    job.wait_for_step(13, WAIT_S)
    cluster.kill_node(0)
    cluster.add_node()
    wait_until(lambda: len(job.events("resume")) == 3, "the restart after a lost node")
    job.wait_for_step(22, WAIT_S)
    job.signal(signal.SIGKILL)
    job.start()
    assert job.wait(WAIT_S) == 0, job.output.read_text()[-4000:]

    verdict = compare(calm, job)
    assert verdict["bit_identical"] and verdict["steps"] == 30
    assert verdict["missing_metrics"] == verdict["duplicate_metrics"] == 0
    assert verdict["lost_steps"] > 0 and verdict["max_lost_steps"] <= 5, "the checkpoint interval"
    faults = job.metrics()[-1]
    assert faults["fault/restarts"] == 3 and faults["fault/lost_steps"] == verdict["lost_steps"]
    client = MlflowClient(default_tracking_uri(storage))
    (experiment,) = client.search_experiments(filter_string="name = 'itpn-pretrain'")
    runs = client.search_runs([experiment.experiment_id])
    stormy = [run for run in runs if run.info.run_name == "stormy"]
    assert [run.info.status for run in stormy] == ["FINISHED"], "one run over all restarts"


def test_two_workers_then_one_then_two_train_as_two_all_along(
    cluster: SimulatedCluster, storage: Path, image_folder: Path
) -> None:
    # Ray needs half a minute to make use of a new node; a checkpoint each 5 steps lasts 2 s here.
    num_steps = 200
    more = [*on_nodes("1 2"), "--scaling.resize-check-s", "2"]
    plan = settings(image_folder, *more, num_steps=num_steps)
    job = Job(storage, "elastic", plan, cluster.address)
    job.start()
    job.wait_for_step(6, WAIT_S)
    cluster.kill_node(0)
    wait_until(lambda: len(job.events("resume")) == 2, "the restart with one worker")
    job.wait_for_step(int(job.events("resume")[-1]["step"]) + 3, WAIT_S)
    cluster.add_node()
    assert job.wait(WAIT_S) == 0, job.output.read_text()[-4000:]

    sizes = [event["num_workers"] for event in job.events("start")]
    assert sizes == [2, 1, 2], sizes
    plan = settings(image_folder, *on_nodes(), num_steps=num_steps, checkpoint_every=num_steps)
    steady = Job(storage, "steady", plan, cluster.address)
    steady.start()
    assert steady.wait(WAIT_S) == 0, steady.output.read_text()[-4000:]
    ours, fixed = ({r["step"]: r for r in j.metrics()} for j in (job, steady))
    assert list(ours) == list(fixed) == list(range(1, num_steps + 1)), "none missed, none twice"
    assert {ours[step]["scaling/num_workers"] for step in ours} == {1.0, 2.0}
    for step, record in fixed.items():  # a step's loss tells which samples it saw
        assert ours[step]["train/loss"] == pytest.approx(record["train/loss"], rel=1e-5), step
    weights, expected = last_state(job)["model"], last_state(steady)["model"]
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-5, atol=1e-7, msg=key)


def test_a_node_about_to_be_taken_away_gets_a_checkpoint_first(
    cluster: SimulatedCluster, storage: Path, image_folder: Path
) -> None:
    """Nothing but the drain notice asks for a checkpoint here, and it is no failure."""
    plan = settings(
        *(image_folder, *on_nodes(), "--run.max-failures", "0"),
        num_steps=300,
        checkpoint_every=100_000,
    )
    job = Job(storage, "preempted", plan, cluster.address)
    job.start()
    job.wait_for_step(8, WAIT_S)
    cluster.drain_node(0, deadline_s=20)
    wait_until(lambda: job.events("checkpoint"), "the checkpoint before the node goes", 60)
    saved = job.events("checkpoint")[0]["step"]
    assert job.events("preemption")[0]["step"] == saved >= 8
    wait_until(lambda: job.last_step() > saved, "the step after it")
    cluster.kill_node(0)
    cluster.add_node()
    wait_until(lambda: len(job.events("resume")) == 2, "the restart")
    assert job.events("resume")[-1]["step"] == saved
    assert job.signal(signal.SIGTERM) == 130


def test_sigterm_saves_and_leaves_and_a_lost_head_loses_nothing(
    calm: Job, storage: Path, image_folder: Path
) -> None:
    """First the run is told to go; then the cluster of the second attempt dies as a whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with SimulatedCluster(2) as doomed:
            plan = settings(image_folder, *on_nodes())
            job = Job(storage, "headless", plan, doomed.address)
            job.start()
            job.wait_for_step(6, WAIT_S)
            assert job.signal(signal.SIGTERM) == 130
            assert job.state()["status"] == "KILLED"
            last = job.metrics()[-1]["step"]
            assert last_state(job)["step"] == last, "saved on leaving"
            job.start()
            job.wait_for_step(last + 6, WAIT_S)
        # Its driver must notice, not hang.
        assert job.wait(WAIT_S) != 0
        with SimulatedCluster(2) as cluster:
            job.address = cluster.address
            job.start()
            assert job.wait(WAIT_S) == 0, job.output.read_text()[-4000:]
    verdict = compare(calm, job)
    assert verdict["bit_identical"] and verdict["missing_metrics"] == 0
    assert verdict["duplicate_metrics"] == 0 and verdict["max_lost_steps"] <= 5
