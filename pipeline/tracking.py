"""Tracking: metrics.jsonl and MLflow.

`metrics.jsonl` is the record; MLflow gets a copy from a thread of its own, so that a slow or dead
tracking server never holds up a step. Surprising: the driver opens and closes the MLflow run,
worker 0 only writes into it. So one run survives restarts of workers, and its end status is the
driver's. mlflow is imported where it is used: it takes seconds, which worker 0 spends in the
background.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
_MAX_PARAM_CHARS = 6000  # MLflow's own limit on parameter values
_DELIVERY_TIMEOUT_S = 60.0
_SYSTEM_METRICS_S = 5.0
_RETRY_S = 2.0


def default_tracking_uri(storage_path: Path) -> str:
    """SQLite file under the run storage."""
    return f"sqlite:///{storage_path.absolute() / 'mlflow.db'}"


def open_run(
    uri: str,
    *,
    experiment: str,
    artifact_folder: Path,
    name: str,
    run_id: str | None,
    params: dict[str, Any],
    tags: dict[str, str],
) -> str:
    """Create an MLflow run, or reopen one; returns its id.

    Args:
        uri: tracking URI.
        experiment: created on first use.
        artifact_folder: where a local experiment keeps artifacts (servers decide themselves).
        name: run name.
        run_id: run to continue; None for a new one.
        params: configuration, logged once.
        tags: facts that may change between restarts.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunTag

    client = MlflowClient(uri)
    if run_id is None:
        found = client.get_experiment_by_name(experiment)
        local = uri.startswith("sqlite:")
        location = artifact_folder.absolute().as_uri() if local else None
        experiment_id = (
            found.experiment_id
            if found
            else client.create_experiment(experiment, artifact_location=location)
        )
        run_id = client.create_run(experiment_id, run_name=name).info.run_id
        entries = [Param(key, str(value)[:_MAX_PARAM_CHARS]) for key, value in params.items()]
        client.log_batch(run_id, params=entries)
    else:
        client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    assert run_id is not None
    return str(run_id)


def close_run(
    uri: str, run_id: str, status: str, files: list[Path], checkpoint: Path | None = None
) -> None:
    """Log last files and a checkpoint folder; end the run as FINISHED, FAILED or KILLED."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    for file in files:
        if file.is_file():
            client.log_artifact(run_id, str(file))
    if checkpoint is not None:
        client.log_artifacts(run_id, str(checkpoint), f"checkpoints/{checkpoint.name}")
    client.set_terminated(run_id, status=status)


class Tracker:
    """Writes the metrics and pictures of a run; used by worker 0 only.

    Args:
        run_dir: the run's folder.
        uri: MLflow tracking URI.
        run_id: MLflow run to write into.
        start_step: records of later steps, left by a killed run, are removed first.
        system_metrics: also log host CPU, memory and GPU use.
    """

    def __init__(
        self, run_dir: Path, *, uri: str, run_id: str, start_step: int, system_metrics: bool
    ) -> None:
        self.run_dir = run_dir
        self.run_id = run_id
        self._path = run_dir / "metrics.jsonl"
        kept, last_step = _truncate_after(self._path, start_step)
        self.lost_steps = max(0, last_step - start_step)
        """Steps logged before a kill that this attempt computes again."""
        self._file = self._path.open("a", buffering=1)
        self._mlflow = _MlflowThread(uri, run_id, system_metrics=system_metrics)
        for record in kept:  # what a killed worker had written but not yet delivered
            self._deliver(record)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        record = {"step": step, "time": round(time.time(), 3), **metrics}
        self._file.write(json.dumps(record) + "\n")
        self._deliver(record)

    def _deliver(self, record: dict[str, Any]) -> None:
        metrics = {k: v for k, v in record.items() if k not in ("step", "time")}
        self._mlflow.log_metrics(record["step"], record["time"], metrics)

    def log_picture(self, step: int, png: bytes) -> Path:
        """Save a picture under reconstructions/ and as an artifact."""
        path = self.run_dir / "reconstructions" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
        self.log_artifact(path, "reconstructions")
        return path

    def log_artifact(self, path: Path, artifact_folder: str) -> None:
        """Copy a file to the run's artifacts, in the background."""
        self._mlflow.log_artifact(path, artifact_folder)

    def close(self) -> None:
        """Flush; waits up to a minute for a slow tracking server."""
        self._file.close()
        self._mlflow.close()


def _truncate_after(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Drop records past a step, which the resumed run writes again.

    Returns:
        The records kept, and the last step there was.
    """
    if not path.exists():
        return [], 0
    complete = [line for line in path.read_text().splitlines() if line.endswith("}")]
    records = [json.loads(line) for line in complete]
    kept = [record for record in records if record["step"] <= step]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return kept, records[-1]["step"] if records else 0


class _MlflowThread:
    """Delivers to MLflow in order; on failure warns once and keeps trying."""

    def __init__(self, uri: str, run_id: str, *, system_metrics: bool) -> None:
        self._uri = uri
        self._run_id = run_id
        self._system_metrics = system_metrics
        self._queue: queue.Queue[Callable[[MlflowClient], None] | None] = queue.Queue()
        self._delivered: dict[str, int] = {}  # metric -> last step MLflow already has
        self._stop_by = float("inf")
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, time_s: float, metrics: dict[str, float]) -> None:
        def deliver(client: MlflowClient) -> None:
            from mlflow.entities import Metric

            new = [
                Metric(key, value, int(time_s * 1000), step)
                for key, value in metrics.items()
                if step > self._last_step(client, key)
            ]
            if new:
                client.log_batch(self._run_id, metrics=new)
            self._delivered |= {metric.key: step for metric in new}

        self._queue.put(deliver)

    def log_artifact(self, path: Path, artifact_folder: str) -> None:
        def deliver(client: MlflowClient) -> None:
            client.log_artifact(self._run_id, str(path), artifact_folder)

        self._queue.put(deliver)

    def close(self) -> None:
        self._stop_by = time.monotonic() + _DELIVERY_TIMEOUT_S
        self._queue.put(None)
        self._thread.join(_DELIVERY_TIMEOUT_S)

    def _last_step(self, client: MlflowClient, key: str) -> int:
        """Last step MLflow has of a metric, so that a resumed run doubles nothing."""
        if key not in self._delivered:
            history = client.get_metric_history(self._run_id, key)
            self._delivered[key] = max((metric.step for metric in history), default=-1)
        return self._delivered[key]

    def _run(self) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(self._uri)
        monitor = self._start_system_metrics() if self._system_metrics else None
        has_warned = False
        while (deliver := self._queue.get()) is not None:
            while True:
                try:
                    deliver(client)
                    break
                except Exception as error:
                    if not has_warned:
                        logger.warning(
                            "MLflow at %s: %s; training goes on, retrying", self._uri, error
                        )
                        has_warned = True
                    if isinstance(error, FileNotFoundError) or time.monotonic() > self._stop_by:
                        break
                    time.sleep(_RETRY_S)
        if monitor is not None:
            monitor.finish()

    def _start_system_metrics(self) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            self._run_id,
            sampling_interval=_SYSTEM_METRICS_S,
            resume_logging=True,
            tracking_uri=self._uri,
        )
        monitor.start()
        return monitor
