"""Tracking: metrics.jsonl and its copy in MLflow, also when the server is late."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from pipeline import mlflow_delivery, tracking
from tests.pipeline.mlflow_stores import dead_uri, steps_of, write_metrics

__all__ = ["dead_uri"]  # a fixture


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: setting up MLflow's tables takes two seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking.default_tracking_uri(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tracking.default_tracking_uri(tmp_path)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_delivery, "_RETRY_S", 0.05)
    monkeypatch.setattr(mlflow_delivery, "_CLOSE_GRACE_S", 2.0)
    monkeypatch.setattr(tracking, "_CLOSE_PAUSES_S", (0.05,))


def open_run(uri: str, tmp_path: Path, run_id: str | None = None, key: str | None = None) -> str:
    return tracking.open_run(
        uri,
        experiment="tests",
        artifact_folder=tmp_path / "artifacts",
        name="run",
        run_id=run_id,
        key=key or tracking.new_key(),
        params={"optim.lr": 1e-3, "long": "x" * 10_000},
        tags={"git_commit": "abc"},
    )


def tracker(uri: str, tmp_path: Path, run_id: str, *, start_step: int = 0) -> tracking.Tracker:
    return tracking.Tracker(
        tmp_path, uri=uri, run_id=run_id, start_step=start_step, system_metrics=False
    )


def close_run(uri: str, run_id: str, tmp_path: Path, **more: Any) -> str | None:
    files = [tmp_path / "metrics.jsonl", tmp_path / "absent.json"]
    return tracking.close_run(uri, run_id, "FINISHED", run_dir=tmp_path, files=files, **more)


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
    assert close_run(uri, run_id, tmp_path) is None

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    client = MlflowClient(uri)
    history = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, 10.0 - s) for s in range(1, 6)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(run_id)] == ["metrics.jsonl"]


def test_two_runs_that_begin_at_once_share_the_experiment_both_wanted_to_create(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = open_run(uri, tmp_path)
    real, answers = MlflowClient.get_experiment_by_name, [None]
    monkeypatch.setattr(  # the other run creates it right after this one has looked
        MlflowClient,
        "get_experiment_by_name",
        lambda self, name: answers.pop() if answers else real(self, name),
    )
    second = open_run(uri, tmp_path)
    runs = [MlflowClient(uri).get_run(run) for run in (first, second)]
    assert not answers and first != second
    assert runs[0].info.experiment_id == runs[1].info.experiment_id


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
    monkeypatch.setattr(mlflow_delivery, "_SYSTEM_METRICS_S", 0.2)
    run_id = open_run(uri, tmp_path)
    with_system = tracking.Tracker(
        tmp_path, uri=uri, run_id=run_id, start_step=0, system_metrics=True
    )
    path = with_system.log_picture(7, "reconstructions", b"png bytes")
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


def test_what_a_server_took_without_saying_so_is_not_sent_again(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """MLflow drops what is the same to the millisecond; what is sent must not rely on that."""
    run_id = open_run(uri, tmp_path)
    log_batch = MlflowClient.log_batch
    sent: Counter[tuple[str, int]] = Counter()
    is_lost = [True, False, True, True]

    def take_and_hang_up(
        self: MlflowClient, *args: Any, metrics: list[Metric], **more: Any
    ) -> None:
        sent.update((metric.key, metric.step) for metric in metrics)
        log_batch(self, *args, metrics=metrics, **more)
        if is_lost and is_lost.pop(0):
            raise ConnectionResetError("no answer")

    monkeypatch.setattr(MlflowClient, "log_batch", take_and_hang_up)
    ours = tracker(uri, tmp_path, run_id)
    step, deadline = 0, time.monotonic() + 30
    while is_lost and time.monotonic() < deadline:
        step += 1
        ours.log(step, {"train/loss": 1.0, "optim/lr": 2.0})
        time.sleep(0.01)
    ours.close()
    assert not is_lost, "all of them were met"
    expected = {(key, s) for key in ("train/loss", "optim/lr") for s in range(1, step + 1)}
    assert set(sent) == expected and set(sent.values()) == {1}


def test_a_long_backlog_is_delivered_in_few_large_batches(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keys = tuple(f"train/loss_{i}" for i in range(7))
    write_metrics(tmp_path, range(1, 501), keys)
    run_id = open_run(uri, tmp_path)
    log_batch = MlflowClient.log_batch
    sizes: list[int] = []

    def counted(self: MlflowClient, *args: Any, metrics: list[Metric], **more: Any) -> None:
        sizes.append(len(metrics))
        log_batch(self, *args, metrics=metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    tracker(uri, tmp_path, run_id, start_step=500).close()
    assert sum(sizes) == 3500 and max(sizes) <= 1000 and len(sizes) <= 6
    assert all(steps_of(uri, run_id, key) == list(range(1, 501)) for key in keys)


def test_a_gap_before_the_last_step_mlflow_has_is_filled(uri: str, tmp_path: Path):
    """A checkpoint computed again may be told of a step earlier than the first time."""
    run_id = open_run(uri, tmp_path)
    for step in (1, 3):
        MlflowClient(uri).log_metric(run_id, "train/loss", 0.5 * step, 1500 + 1000 * step, step)
    write_metrics(tmp_path, range(1, 5))
    ours = tracker(uri, tmp_path, run_id, start_step=2)
    ours.close()
    assert sorted(steps_of(uri, run_id)) == [1, 2, 3]
    write_metrics(tmp_path, range(1, 5))
    assert close_run(uri, run_id, tmp_path) is None
    assert sorted(steps_of(uri, run_id)) == [1, 2, 3, 4]


def test_artifacts_that_cannot_be_stored_hold_up_no_metrics(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("bucket is read-only")

    run_id = open_run(uri, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_artifact", refuse)
        ours = tracker(uri, tmp_path, run_id)
        ours.log_picture(1, "reconstructions", b"png bytes")
        ours.log(1, {"train/loss": 1.0})
        ours.close()
        problem = close_run(uri, run_id, tmp_path)
    assert steps_of(uri, run_id) == [1]
    assert problem == "PermissionError: bucket is read-only"
    client = MlflowClient(uri)
    assert client.get_run(run_id).info.status == "FINISHED", "although artifacts are missing"
    assert close_run(uri, run_id, tmp_path) is None
    pictures = client.list_artifacts(run_id, "reconstructions")
    assert [a.path for a in pictures] == ["reconstructions/step_00000001.png"]


def test_a_new_run_needs_its_server_and_says_so_at_once(dead_uri: str, tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"tracking\.uri='http://127.* takes no new run") as error:
        open_run(dead_uri, tmp_path)
    assert time.monotonic() - start < 10, "no minutes of HTTP retries"
    assert "Connection refused" in str(error.value)
    assert "start the server, or pass --tracking.uri ''" in str(error.value)


def test_a_run_that_cannot_be_described_is_not_left_behind(uri: str, tmp_path: Path):
    with pytest.raises(ValueError, match="takes no new run"):
        tracking.open_run(
            uri,
            experiment="tests",
            artifact_folder=tmp_path,
            name="run",
            run_id=None,
            key=tracking.new_key(),
            params={"no?key": 1},
            tags={},
        )
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None and not client.search_runs([experiment.experiment_id])


def test_a_resumed_run_goes_on_without_its_server(
    dead_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert open_run(dead_uri, tmp_path, "0123456789abcdef") == "0123456789abcdef"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "the run goes on, metrics are delivered when it is back" in warning


def test_a_run_the_server_does_not_know_is_the_users_to_solve(uri: str, tmp_path: Path):
    open_run(uri, tmp_path)
    with pytest.raises(
        ValueError, match=r"has no run 0123, .* take mlflow_run_id out of its state"
    ):
        open_run(uri, tmp_path, "0123")


def test_the_end_is_delivered_later_and_never_twice(uri: str, dead_uri: str, tmp_path: Path):
    run_id = open_run(uri, tmp_path)
    write_metrics(tmp_path, range(1, 4))
    early = tracker(uri, tmp_path, run_id, start_step=3)
    early.close()
    write_metrics(tmp_path, range(1, 8))  # the server went away after step 3
    pictures, checkpoint = tmp_path / "reconstructions", tmp_path / "step_00000007"
    for folder, name in ((pictures, "step_00000007.png"), (checkpoint, "state.pt")):
        folder.mkdir()
        (folder / name).write_bytes(b"content")
    (pictures / ".step_00000009.png.part").write_bytes(b"killed here")

    end = {"checkpoint": checkpoint, "tags": {"git_commit": "def"}, "ended_at_s": 1e9}
    problem = close_run(dead_uri, run_id, tmp_path, **end)
    assert problem is not None and "Connection refused" in problem
    for _ in range(2):
        assert close_run(uri, run_id, tmp_path, **end) is None
    assert steps_of(uri, run_id) == list(range(1, 8))
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", int(1e12))
    assert run.data.tags["git_commit"] == "def"
    for folder, expected in (
        ("", {"checkpoints", "metrics.jsonl", "reconstructions"}),
        ("reconstructions", {"reconstructions/step_00000007.png"}),
        ("checkpoints/step_00000007", {"checkpoints/step_00000007/state.pt"}),
    ):
        assert {a.path for a in client.list_artifacts(run_id, folder)} == expected


def test_a_dead_server_costs_the_loop_nothing_and_the_end_little(
    dead_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    start = time.monotonic()
    late = tracking.Tracker(
        tmp_path, uri=dead_uri, run_id="0123", start_step=0, system_metrics=True
    )
    for step in range(1, 51):
        late.log(step, {"train/loss": float(step)})
    late.close()
    assert time.monotonic() - start < 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 50
    messages = [r.getMessage() for r in caplog.records if r.name == "pipeline.tracking"]
    assert len(messages) == 2 and "training goes on, retrying" in messages[0]
    assert "50 values and 0 files are not delivered yet" in messages[1]


def test_a_run_resumed_in_an_outage_is_running_again_once_the_server_is_back(
    uri: str, tmp_path: Path
):
    run_id = open_run(uri, tmp_path)
    client = MlflowClient(uri)
    client.set_terminated(run_id, status="KILLED")
    resumed = tracker(uri, tmp_path, run_id)
    resumed.log(1, {"train/loss": 1.0})
    deadline = time.monotonic() + 20
    while client.get_run(run_id).info.status != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.get_run(run_id).info.status == "RUNNING"
    resumed.close()


def test_a_picture_without_room_leaves_nothing_behind(uri: str, tmp_path: Path):
    ours = tracker(uri, tmp_path, open_run(uri, tmp_path))
    pictures = tmp_path / "reconstructions"
    pictures.mkdir()
    os.symlink("/dev/full", pictures / ".step_00000007.png.part")
    with pytest.raises(OSError, match="No space left on device"):
        ours.log_picture(7, "reconstructions", b"png bytes")
    assert not list(pictures.iterdir())
    assert ours.log_picture(8, "reconstructions", b"png bytes").read_bytes() == b"png bytes"
    ours.close()


def test_a_run_that_was_created_just_before_a_kill_is_taken_and_not_doubled(
    uri: str, tmp_path: Path
):
    key = tracking.new_key()
    ids = {open_run(uri, tmp_path, key=key) for _ in range(2)}
    other = open_run(uri, tmp_path)
    assert len(ids) == 1 and other not in ids
    client = MlflowClient(uri)
    (run_id,) = ids
    assert client.get_run(run_id).data.params["optim.lr"] == "0.001"
    experiment = client.get_experiment_by_name("tests")
    assert {r.info.run_id for r in client.search_runs([experiment.experiment_id])} == {
        run_id,
        other,
    }
