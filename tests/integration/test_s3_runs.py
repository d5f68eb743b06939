"""Whole runs of the jobs with data, checkpoints and artifacts on a real S3 server in bad weather.

The jobs are processes of their own with the settings users have; the proxy's faults hit the
driver's and the workers' requests, pyarrow's and boto3's.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from benchmarks.simulated_cluster import Job
from pipeline.checkpoint import Checkpointer, load_state
from pipeline.quarantine import read_quarantine
from pipeline.tracking import default_tracking_uri
from tests.conftest import REPO_ROOT
from tests.pipeline.inference_runs import pretrained_run
from tests.s3_proxy import FaultProxy, Kind, seeded
from tests.s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_S = 400.0
STORM: dict[Kind, float] = {"503": 0.08, "500": 0.02, "reset": 0.04, "lost_answer": 0.02}
STORM |= {"truncated": 0.04, "slow": 0.05}


def settings(data: str, *more: str) -> list[str]:
    return [
        *("--data.path", data, "--optim.num-steps", "12", "--run.log-every-steps", "1"),
        *("--run.checkpoint-every-steps", "4", "--run.picture-every-steps", "6"),
        *("--data.num-cpus", "1", "--tracking.no-system-metrics", *more),
    ]


def weights_of(location: str | Path) -> dict[str, torch.Tensor]:
    checkpointer = Checkpointer(location, keep=1, facts={})
    newest = checkpointer.latest()
    assert newest is not None
    state: dict[str, torch.Tensor] = load_state(newest)["model"]
    return state


def losses(job: Job) -> dict[int, float]:
    """Loss by step; a step that is there twice fails."""
    records = job.metrics()
    assert [record["step"] for record in records] == list(range(1, 13)), "each row once"
    return {record["step"]: record["train/loss"] for record in records}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Job:
    """The same run on local disks, undisturbed."""
    storage = tmp_path_factory.mktemp("calm")
    job = Job(storage, "run", settings(str(image_folder)), None)
    job.start()
    assert job.wait(WAIT_S) == 0, job.output.read_text()[-4000:]
    return job


def test_a_run_on_s3_in_a_storm_killed_and_resumed_ends_as_the_undisturbed_local_one(
    calm: Job, image_folder: Path, tmp_path: Path, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    data = s3.put_folder(image_folder, "storm/data")
    where = [
        *("--run.checkpoint-path", f"s3://{BUCKET}/storm/checkpoints"),
        *("--tracking.artifact-root", f"s3://{BUCKET}/storm/mlflow"),
    ]
    faulty_s3.rule = seeded(STORM, seed=11)
    job = Job(tmp_path, "run", settings(data, *where), None)
    job.start()
    job.wait_for_step(6, WAIT_S)
    assert job.process is not None
    job.process.send_signal(signal.SIGKILL)
    job.process.wait(30)
    job.start()
    assert job.wait(WAIT_S) == 0, job.output.read_text()[-6000:]

    ours = weights_of(f"s3://{BUCKET}/storm/checkpoints/run")
    expected = weights_of(calm.folder / "checkpoints")
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), f"{key} is not bit-identical"
    assert losses(job) == losses(calm)
    quarantine = job.folder / "quarantine.parquet"
    assert not quarantine.exists() or read_quarantine(str(quarantine)) == []
    assert json.loads((job.folder / "summary.json").read_text())["bad_samples"] == []

    client = MlflowClient(default_tracking_uri(tmp_path))
    run = client.get_run(job.state()["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, 13)), "nothing twice"
    artifacts = s3.objects(f"storm/mlflow/{run.info.run_id}/artifacts")
    for name in ("metrics.jsonl", "summary.json", "encoder.safetensors"):
        assert artifacts[name] == (job.folder / name).read_bytes(), name
    pictures = sorted(name for name in artifacts if name.startswith("reconstructions/"))
    assert [Path(name).name for name in pictures] == ["step_00000006.png", "step_00000012.png"]
    assert set(faulty_s3.met) == set(STORM), f"every kind of fault was met: {faulty_s3.met}"
    kept = {name.split("/")[0] for name in s3.objects("storm/checkpoints/run")}
    assert kept == {"step_00000008", "step_00000012"}
    total = len(faulty_s3.requests)
    print(f"\n{faulty_s3.met.total()} of {total} requests failed: {dict(faulty_s3.met)}")


def run_job(name: str, *arguments: str) -> str:
    """Run a job as a user does; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *arguments],
        cwd=REPO_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def comparable(objects: dict[str, bytes]) -> dict[str, bytes]:
    """Without where the source was."""
    for name, content in objects.items():
        if name.endswith("_manifest.json"):
            manifest: dict[str, Any] = json.loads(content)
            del manifest["preparation"]["settings"]["source"]
            objects[name] = json.dumps(manifest).encode()
    return objects


def test_preparing_and_training_go_from_s3_to_s3_in_a_storm(
    image_folder: Path, tmp_path: Path, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    source = s3.put_folder(image_folder, "chain/images")
    faulty_s3.rule = seeded(STORM, seed=12)
    base = f"s3://{BUCKET}/chain"
    how = ("--shard-mb", "0.02", "--num-cpus", "2")
    run_job("prepare_data", "--source", source, "--out", f"{base}/prepared", *how)
    run_job("prepare_data", "--source", str(image_folder), "--out", str(tmp_path / "out"), *how)
    s3.put_folder(tmp_path / "out", "chain/local")
    assert comparable(s3.objects("chain/prepared")) == comparable(s3.objects("chain/local"))

    trained = {}
    for name, data in (
        ("remote", f"{base}/prepared/train"),
        ("local", str(tmp_path / "out" / "train")),
    ):
        job = Job(tmp_path, name, settings(data, "--optim.num-steps", "12"), None)
        job.start()
        assert job.wait(WAIT_S) == 0, job.output.read_text()[-4000:]
        trained[name] = weights_of(job.folder / "checkpoints")
    for key, tensor in trained["local"].items():
        assert torch.equal(trained["remote"][key], tensor), f"{key} is not bit-identical"
    assert faulty_s3.met.total() > 20


def test_embedding_goes_from_s3_to_s3_in_a_storm_each_row_once(
    image_folder: Path, tmp_path: Path, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    run, _ = pretrained_run(tmp_path / "run")
    images = s3.put_folder(image_folder, "embed/images")
    faulty_s3.rule = seeded(STORM, seed=13)
    out = f"s3://{BUCKET}/embed/out"
    run_job("embed", str(run), "--images", images, "--out", out)
    run_job("embed", str(run), "--images", str(image_folder), "--out", str(tmp_path / "out"))
    s3.put_folder(tmp_path / "out", "embed/local")
    ours, local = s3.objects("embed/out"), s3.objects("embed/local")
    assert set(ours) == set(local)
    tables = [pq.read_table(io.BytesIO(o["embeddings-00000.parquet"])) for o in (ours, local)]
    assert tables[0].num_rows == 24 and tables[0].drop(["path"]) == tables[1].drop(["path"])
    assert json.loads(ours["_finished.json"])["num_bad"] == 0
    assert faulty_s3.met.total() > 5
