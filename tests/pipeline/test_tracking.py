"""Tracking: metrics.jsonl and its copy in MLflow, also when the server is late."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import tracking


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return tracking.default_tracking_uri(tmp_path)


def open_run(uri: str, tmp_path: Path, run_id: str | None = None) -> str:
    return tracking.open_run(
        uri,
        experiment="tests",
        artifact_folder=tmp_path / "artifacts",
        name="run",
        run_id=run_id,
        params={"optim.lr": 1e-3, "long": "x" * 10_000},
        tags={"git_commit": "abc"},
    )


def tracker(uri: str, tmp_path: Path, run_id: str, *, start_step: int = 0) -> tracking.Tracker:
    return tracking.Tracker(
        tmp_path, uri=uri, run_id=run_id, start_step=start_step, system_metrics=False
    )


def test_a_resumed_run_stays_one_run_with_every_step_once(uri: str, tmp_path: Path):
    run_id = open_run(uri, tmp_path)
    first = tracker(uri, tmp_path, run_id)
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": 10.0 - step})
    first.close()

    assert open_run(uri, tmp_path, run_id) == run_id
    second = tracker(uri, tmp_path, run_id, start_step=2)  # killed at 4, checkpoint of step 2
    for step in (3, 4, 5):
        second.log(step, {"train/loss": 10.0 - step})
    second.close()
    tracking.close_run(uri, run_id, "FINISHED", [tmp_path / "metrics.jsonl"])

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    client = MlflowClient(uri)
    history = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, 10.0 - s) for s in range(1, 6)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(run_id)] == ["metrics.jsonl"]


def test_records_a_killed_worker_had_not_delivered_are_delivered_on_resume(
    uri: str, tmp_path: Path
):
    run_id = open_run(uri, tmp_path)
    lines = [{"step": s, "time": 1.0 + s, "train/loss": 0.5 * s} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    tracker(uri, tmp_path, run_id, start_step=2).close()
    history = MlflowClient(uri).get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(1, 0.5, 2000), (2, 1.0, 3000)]


def test_half_a_line_left_by_a_kill_is_dropped(uri: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "a": 1}\n{"step": 2, "a"')
    tracker(uri, tmp_path, open_run(uri, tmp_path), start_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "time": 0, "a": 1}\n'


def test_a_late_server_loses_nothing_and_never_blocks_the_loop(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run_id = open_run(uri, tmp_path)
    log_batch = MlflowClient.log_batch
    failures = iter([True, True])

    def flaky(self: MlflowClient, *args: object, **kwargs: object) -> None:
        if next(failures, False):
            raise ConnectionError("server is down")
        log_batch(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    monkeypatch.setattr(tracking, "_RETRY_S", 0.05)
    late = tracker(uri, tmp_path, run_id)
    start = time.perf_counter()
    for step in range(1, 51):
        late.log(step, {"train/loss": float(step)})
    assert time.perf_counter() - start < 1.0, "logging waits for nobody"
    late.close()
    history = MlflowClient(uri).get_metric_history(run_id, "train/loss")
    assert [m.step for m in history] == list(range(1, 51))
    warnings = [r for r in caplog.records if "server is down" in r.message]
    assert len(warnings) == 1, "warned once"


def test_pictures_and_system_metrics_arrive(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "_SYSTEM_METRICS_S", 0.2)
    run_id = open_run(uri, tmp_path)
    with_system = tracking.Tracker(
        tmp_path, uri=uri, run_id=run_id, start_step=0, system_metrics=True
    )
    path = with_system.log_picture(7, b"png bytes")
    time.sleep(2.0)
    with_system.close()
    assert path.read_bytes() == b"png bytes"
    client = MlflowClient(uri)
    pictures = [a.path for a in client.list_artifacts(run_id, "reconstructions")]
    assert pictures == ["reconstructions/step_00000007.png"]
    assert "system/cpu_utilization_percentage" in client.get_run(run_id).data.metrics


def test_params_are_logged_once_and_long_ones_cut(uri: str, tmp_path: Path):
    run_id = open_run(uri, tmp_path)
    open_run(uri, tmp_path, run_id)
    params = MlflowClient(uri).get_run(run_id).data.params
    assert params["optim.lr"] == "0.001" and len(params["long"]) == 6000
