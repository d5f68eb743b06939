"""A small pre-training under random kills of workers, nodes and the driver, against a calm one.

    python benchmarks/chaos.py --kills 20 --seed 0

Two CPU cores, about half a minute a kill, most of it Ray starting processes. Expected: the last
line, JSON, says `"bit_identical": true` (weights, teacher and optimiser of the last checkpoint, and
every logged loss) and counts no missing and no doubled metric row, in metrics.jsonl or in MLflow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mlflow import MlflowClient

from benchmarks.simulated_cluster import Job, SimulatedCluster
from pipeline.checkpoint import Checkpointer, load_state
from pipeline.demo_data import write_demo_photos
from pipeline.tracking import default_tracking_uri

KINDS = ("worker", "driver", "node")
CHECKPOINT_EVERY = 5
STEPS_PER_KILL = 8
_TIMEOUT_S = 240.0


def main() -> None:
    """Run the command line; prints one line a kill and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # nothing outside this machine joins
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        storage = Path(folder)
        write_demo_photos(str(storage / "photos"))
        settings = _settings(storage, num_steps=STEPS_PER_KILL * (args.kills + 1))
        with SimulatedCluster(2) as cluster:
            stormy = Job(storage, "stormy", settings, cluster.address)
            kills = torment(stormy, cluster, args.kills, random.Random(args.seed))
            calm = Job(storage, "calm", settings, cluster.address)
            calm.start()
            assert calm.wait(_TIMEOUT_S * 4) == 0, calm.output.read_text()[-4000:]
        verdict = compare(calm, stormy)
        print(json.dumps({"kills": sum(kills.values()), "kinds": kills, **verdict}))


def _settings(storage: Path, num_steps: int) -> list[str]:
    return [
        *("--data.path", str(storage / "photos" / "train")),
        *("--optim.num-steps", str(num_steps), "--run.evaluate-every-steps", "20"),
        *("--run.picture-every-steps", "100000"),
        *("--run.checkpoint-every-steps", str(CHECKPOINT_EVERY)),
        # Here somebody kills faster than checkpoints are due, which no crashing program would.
        *("--run.max-failures", "100000"),
        *("--scaling.num-workers", "2", "--scaling.worker-resource", "trainer"),
    ]


def torment(
    job: Job, cluster: SimulatedCluster, num_kills: int, chance: random.Random
) -> dict[str, int]:
    """Run a job to its end through so many kills; returns how many there were of each kind."""
    counts = dict.fromkeys(KINDS, 0)
    job.start()
    for number in range(num_kills):
        # Any step from the first after the newest start on; the storm must not outlast the run.
        first = _first_step_of_attempt(job, number)
        target = min(first + chance.randint(0, STEPS_PER_KILL), STEPS_PER_KILL * (number + 1))
        job.wait_for_step(max(target, first), _TIMEOUT_S)
        time.sleep(chance.random() * 0.3)
        kind = chance.choice(KINDS)
        _kill(kind, job, cluster, chance)
        counts[kind] += 1
        print(f"kill {number + 1}/{num_kills}: {kind} at step {job.last_step()}", flush=True)
    assert job.wait(_TIMEOUT_S * 2) == 0, job.output.read_text()[-4000:]
    return counts


def _first_step_of_attempt(job: Job, num_kills: int) -> int:
    """Wait until the loop runs again after so many kills; the step after the one it resumed at."""
    deadline = time.monotonic() + _TIMEOUT_S
    while len(resumes := job.events("resume")) <= num_kills:
        assert job.process is not None, "started by the caller"
        if job.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no restart after a kill:\n{job.output.read_text()[-4000:]}")
        time.sleep(0.05)
    return int(resumes[-1]["step"]) + 1


def _kill(kind: str, job: Job, cluster: SimulatedCluster, chance: random.Random) -> None:
    if kind == "worker":
        workers = cluster.training_workers()
        assert workers, "the loop is running, so there are workers"
        chance.choice(workers).kill()
    elif kind == "node":
        cluster.kill_node(chance.randrange(len(cluster.nodes)))
        cluster.add_node()
    else:
        job.signal(signal.SIGKILL)
        job.start()


def compare(calm: Job, stormy: Job) -> dict[str, Any]:
    """The verdict: is the stormy run what the calm one is, to the last bit and row?"""
    states = [_last_state(job) for job in (calm, stormy)]
    histories = [_history(job) for job in (calm, stormy)]
    steps = [[record["step"] for record in job.metrics()] for job in (calm, stormy)]
    delivered = _mlflow_steps(stormy)
    lost = [event["lost_steps"] for event in stormy.events("resume")]
    runs = {event["num_workers"] for event in stormy.events("start")}
    return {
        "bit_identical": _equal(*states) and histories[0] == histories[1],
        "steps": len(steps[0]),
        "lost_steps": sum(lost),
        "max_lost_steps": max(lost),
        "checkpoint_every_steps": CHECKPOINT_EVERY,
        "missing_metrics": len(set(steps[0]) - set(steps[1])) + len(set(steps[0]) - set(delivered)),
        "duplicate_metrics": len(steps[1])
        - len(set(steps[1]))
        + len(delivered)
        - len(set(delivered)),
        "num_workers": sorted(runs),
    }


def _last_state(job: Job) -> dict[str, Any]:
    newest = Checkpointer(job.folder / "checkpoints", keep=1, facts={}).latest()
    assert newest is not None, "the last step always writes one"
    return load_state(newest)


def _history(job: Job) -> list[dict[str, Any]]:
    """What must not depend on the clock or on faults."""
    timeless = ("step", "train/", "val/", "optim/", "data/")
    return [
        {key: value for key, value in record.items() if key.startswith(timeless)}
        for record in job.metrics()
    ]


def _mlflow_steps(job: Job) -> list[int]:
    client = MlflowClient(default_tracking_uri(job.folder.parent))
    history = client.get_metric_history(job.state()["mlflow_run_id"], "train/loss")
    return [metric.step for metric in history]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


if __name__ == "__main__":
    main()
