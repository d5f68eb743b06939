"""MLflow servers that really die under real runs: none of their metrics lost, none doubled."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from pipeline.config_values import apply_overrides
from pipeline.metrics_file import read_records
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import run_pretraining
from pipeline.run_folder import RunFolder
from pipeline.trainer import RunFailedError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]
_START_TIMEOUT_S = 120.0


class MlflowServer:
    """`mlflow server` on a port of its own; dies by SIGKILL, may be started again.

    Args:
        folder: for its files.
        store: database it writes to; empty: SQLite.
        environment: of its process, besides this one's.
    """

    def __init__(
        self, folder: Path, store: str = "", environment: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._store = store or f"sqlite:///{folder / 'server.db'}"
        self._environment = environment or {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self._store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its children can be killed with it
                env={
                    **os.environ,
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    **self._environment,
                },
            )
        wait_until(self._answers, _START_TIMEOUT_S, "the MLflow server answers")

    def kill(self) -> None:
        """SIGKILL to it and its children, wherever they are in what they do."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "see server.log"
        try:
            return requests.get(f"{self.uri}/health", timeout=2).ok
        except requests.RequestException:
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def config(debug_config: PretrainConfig, server: MlflowServer) -> PretrainConfig:
    return apply_overrides(
        debug_config,
        {"data.synthetic": True, "optim.num_steps": 60, "tracking.uri": server.uri},
    )


def wait_until(is_true: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"after {timeout_s} s it is still not so that {what}"
        time.sleep(0.05)


def last_step(config: PretrainConfig) -> int:
    steps = [record["step"] for record in read_records(RunFolder(config).path / "metrics.jsonl")]
    return max(steps, default=0)


def slowly(before_step: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The training worker, with steps that can be watched.

    Args:
        before_step: Python that is run at the end of each step; sees `step`.
    """

    def worker(job: dict[str, Any]) -> dict[str, Any]:
        import time

        from pipeline import tracking, train_worker

        log = tracking.Tracker.log

        def log_slowly(self: Any, step: int, metrics: dict[str, float]) -> None:
            log(self, step, metrics)
            time.sleep(0.1)
            exec(before_step, {"step": step})

        tracking.Tracker.log = log_slowly  # type: ignore[method-assign]
        return train_worker.train_worker(job)

    return worker


def assert_mlflow_has_it_all_once(config: PretrainConfig, recomputed: range = range(0)) -> None:
    """Every value of metrics.jsonl and every file, and a finished run.

    Args:
        config: the run.
        recomputed: steps that were logged, lost and computed again. How long their checkpoints took
            depends on the day, also which of them says so; MLflow keeps what it was told first.
    """
    folder = RunFolder(config)
    client = MlflowClient(config.tracking.uri)
    run = client.get_run(folder.state["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    records = list(read_records(folder.path / "metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(1, 61))
    written = {(k, r["step"]) for r in records for k in r if k not in ("step", "time")}
    keys = {key for key in run.data.metrics if not key.startswith("system/")}
    there = Counter(
        (key, metric.step)
        for key in keys
        for metric in client.get_metric_history(run.info.run_id, key)
    )
    assert written <= set(there), "none lost"
    for key, step in set(there) - written:
        assert key.startswith("checkpoint/") and step in recomputed, "none invented"
    assert set(there.values()) == {1}, "none doubled"
    pictures = client.list_artifacts(run.info.run_id, "reconstructions")
    names = {Path(artifact.path).name for artifact in pictures}
    assert names == {path.name for path in (folder.path / "reconstructions").iterdir()}
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"summary.json", "metrics.jsonl", "encoder.safetensors", "checkpoints"} <= artifacts
    assert not folder.state["mlflow_pending"]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_a_server_killed_and_restarted_in_mid_run_has_every_metric_once(
    config: PretrainConfig,
    server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Steps 1 to 40 go on whatever the server does; 41 waits, so that it is back in mid-run."""
    config = apply_overrides(config, {"tracking.system_metrics": True})
    is_back = tmp_path / "is_back"
    wait = (
        "import os, time\nuntil = time.monotonic() + 180\n"
        f"while step == 41 and not os.path.exists({str(is_back)!r}) and time.monotonic() < until:\n"
        "    time.sleep(0.05)"
    )
    monkeypatch.setattr("pipeline.trainer.train_worker", slowly(wait))
    with ThreadPoolExecutor(1) as driver:
        run: Future[dict[str, Any]] = driver.submit(run_pretraining, config)
        try:
            wait_until(lambda: run.done() or last_step(config) >= 8, 240, "8 steps are done")
            assert not run.done(), run.exception()
            server.kill()
            killed_at = last_step(config)
            wait_until(lambda: last_step(config) >= 41, 120, "training goes on in the outage")
            assert killed_at <= 25, "many steps were done without a server"
            server.start()
        finally:
            is_back.touch()
        summary = run.result(240)
    assert summary["steps"] == 60 and summary["restarts"] == 0
    assert_mlflow_has_it_all_once(config)
    client = MlflowClient(server.uri)
    system = client.get_metric_history(
        summary["mlflow_run_id"], "system/cpu_utilization_percentage"
    )
    assert [metric.step for metric in system] == list(range(len(system)))
    assert system, "sampled every 10 seconds"
    said = capsys.readouterr().out
    assert said.count("training goes on, retrying") == 1
    assert said.count(f"MLflow at {server.uri} is back") == 1


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_resumed_and_finished_in_an_outage_is_delivered_by_the_same_command(
    config: PretrainConfig, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
):
    config = apply_overrides(config, {"run.max_failures": 0})
    folder = RunFolder(config)
    with monkeypatch.context() as broken:
        crash = "if step == 23: raise RuntimeError('a worker crashes')"
        broken.setattr("pipeline.trainer.train_worker", slowly(crash))
        with pytest.raises(RunFailedError, match="a worker crashes"):
            run_pretraining(config)
    client = MlflowClient(server.uri)
    run_id = folder.state["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FAILED" and not folder.state["mlflow_pending"]

    server.kill()
    summary = run_pretraining(config)
    assert summary["steps"] == 60 and summary["mlflow_run_id"] == run_id
    assert json.loads(folder.summary_file.read_text()) == summary
    assert folder.state["mlflow_pending"] and folder.state["status"] == "FINISHED"
    with pytest.raises(ValueError, match=r"is finished .* but MLflow .* still lacks something"):
        run_pretraining(config)

    server.start()
    for _ in range(2):  # the second time there is nothing left to deliver
        with pytest.raises(ValueError, match=r"run\.name='debug' is finished .* another name"):
            run_pretraining(config)
        assert_mlflow_has_it_all_once(config, recomputed=range(21, 24))
    ended_at_ms = client.get_run(run_id).info.end_time
    assert ended_at_ms == int(folder.state["ended_at"] * 1000), "not the time of the delivery"


def test_a_new_run_without_its_server_starts_nothing_and_blocks_nothing(
    debug_config: PretrainConfig, tmp_path: Path
):
    uri = MlflowServer(tmp_path).uri  # never started
    config = apply_overrides(debug_config, {"data.synthetic": True, "tracking.uri": uri})
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"takes no new run: .* pass --tracking\.uri ''"):
        run_pretraining(config)
    assert time.monotonic() - start < 60, "no minutes of HTTP retries"
    assert not RunFolder(config).events_file.exists()
    RunFolder(apply_overrides(config, {"tracking.uri": ""})).check()
