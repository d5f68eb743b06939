"""Delivery to MLflow by a thread of its own, over outages of the server.

Surprising: after each failure MLflow is asked anew what it has, because a server that did not
answer may have taken what it was sent. mlflow is imported where it is used: it takes seconds, which
worker 0 spends in the background.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.metrics_file import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
_HTTP_ENV = {
    # MLflow's own: one call to a dead server takes minutes. Its retries would also send a batch
    # again without asking whether it has arrived; ours ask.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_MAX_METRICS = 1000  # MLflow's own limit on a batch
_CLOSE_TIMEOUT_S = 60.0
_CLOSE_GRACE_S = 10.0  # for a server that fails at the end; the driver delivers the rest
_SYSTEM_METRICS_S = 5.0
_SYSTEM_PREFIX = "system/"
_RETRY_S = 2.0


class Point(NamedTuple):
    """One value of a metric; the fields of `mlflow.entities.Metric`, in its order."""

    key: str
    value: float
    time_ms: int
    step: int


def connect(uri: str) -> MlflowClient:
    """A client whose calls fail soon; the environment may say otherwise."""
    for name, value in _HTTP_ENV.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def points_of(record: Record) -> list[Point]:
    """The metrics of a line of metrics.jsonl; the same ones each time it is read."""
    time_ms = int(record["time"] * 1000)
    metrics = {key: value for key, value in record.items() if key not in ("step", "time")}
    return [Point(key, value, time_ms, record["step"]) for key, value in metrics.items()]


def reason(error: BaseException) -> str:
    """The operating system's error at the root of a failed call, which says it best, or itself."""
    root = error
    while (before := root.__cause__ or root.__context__) is not None:
        root = before
    shown = root if isinstance(root, OSError) else error
    return f"{type(shown).__name__}: {shown}"


class KnownSteps:
    """The steps of each metric that MLflow has: asked once, then brought up to date.

    One call tells the last step of every metric, and later ones are sure to be new. Of a metric
    with earlier ones the history is read, 25000 steps a call: after a restart there may be gaps
    before the last step.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        run = client.get_run(run_id)
        self.status: str = run.info.status
        self.last: dict[str, int] = {m.key: m.step for m in run.data._metric_objs}
        self._earlier: dict[str, set[int]] = {}

    def has(self, point: Point) -> bool:
        """Whether MLflow has a value of this metric at this step."""
        key = point.key
        if point.step > self.last.get(key, -1):
            return False
        if key not in self._earlier:
            history = self._client.get_metric_history(self._run_id, key)
            self._earlier[key] = {metric.step for metric in history}
        return point.step in self._earlier[key]

    def send(self, points: list[Point]) -> None:
        """Log the points MLflow lacks, in large batches; what is done is taken off the list."""
        from mlflow.entities import Metric

        while points:
            batch = points[:_MAX_METRICS]
            new = [point for point in batch if not self.has(point)]
            if new:
                metrics = [Metric(*point) for point in new]
                self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            for point in new:
                self.last[point.key] = max(point.step, self.last.get(point.key, -1))
            del points[: len(batch)]
        self._earlier.clear()  # what comes now is later


class MlflowDelivery:
    """Takes metrics and files at once and delivers them in the background.

    Metrics go first: an artifact store that fails does not hold them up. A failure is told once
    and tried again until it works.

    Args:
        uri: MLflow tracking URI.
        run_id: MLflow run to write into.
        system_metrics: also log host CPU, memory and GPU use.
        warn: told when the server is lost, and when it is back.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        system_metrics: bool,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self._uri = uri
        self._run_id = run_id
        self._warn = warn
        self._queue: queue.Queue[list[Point] | tuple[Path, str] | None] = queue.Queue()
        self._points: list[Point] = []
        self._artifacts: list[tuple[Path, str]] = []
        self._client: MlflowClient | None = None
        self._known: KnownSteps | None = None  # None: MLflow must be asked
        self._sampler = _SystemSampler() if system_metrics else None
        self._has_met = False
        self._is_failing = False
        self._is_closing = False
        self._stop_by = float("inf")
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def log_record(self, record: Record) -> None:
        """Deliver the metrics of a step, unless MLflow has them."""
        self._queue.put(points_of(record))

    def log_artifact(self, path: Path, artifact_folder: str) -> None:
        """Deliver a file."""
        self._queue.put((path, artifact_folder))

    def close(self) -> None:
        """Wait for what is under way: a minute, or ten seconds for a server that fails."""
        self._stop_by = time.monotonic() + _CLOSE_GRACE_S
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        if self._sampler is not None:
            self._sampler.start()
        while not self._is_closing or self._backlog:
            self._collect()
            try:
                self._deliver()
            except Exception as error:
                self._known = None
                if not self._is_failing:
                    self._warn(
                        f"MLflow at {self._uri}: {reason(error)}; training goes on, retrying"
                    )
                self._is_failing = True
                if self._is_closing and time.monotonic() > self._stop_by:
                    self._warn(
                        f"MLflow at {self._uri}: {len(self._points)} values and "
                        f"{len(self._artifacts)} files are not delivered yet"
                    )
                    break
                time.sleep(_RETRY_S)
                continue
            if self._is_failing:
                self._warn(f"MLflow at {self._uri} is back and has everything")
            self._is_failing = False
        if self._sampler is not None:
            self._sampler.stop()

    @property
    def _backlog(self) -> bool:
        return bool(self._points or self._artifacts)

    def _collect(self) -> None:
        """Take everything from the queue; waits for it when there is nothing else to do."""
        timeout_s = _SYSTEM_METRICS_S if self._sampler is not None else None
        while True:
            try:
                must_wait = not self._backlog and not self._is_closing
                item = self._queue.get(must_wait, timeout_s)
            except queue.Empty:
                return
            if item is None:
                self._is_closing = True
            elif isinstance(item, list):
                self._points += item
            else:
                self._artifacts.append(item)

    def _deliver(self) -> None:
        if self._client is None:
            self._client = connect(self._uri)
        client = self._client
        if self._known is None:
            known = KnownSteps(client, self._run_id)
            if not self._has_met and not self._is_closing and known.status != "RUNNING":
                client.update_run(self._run_id, status="RUNNING")  # resumed in an outage
            self._has_met = True
            self._known = known
        if self._sampler is not None:
            self._points += self._sampler.take(self._known.last)
        self._known.send(self._points)
        while self._artifacts:
            path, artifact_folder = self._artifacts[0]
            if path.is_file():
                client.log_artifact(self._run_id, str(path), artifact_folder)
            del self._artifacts[0]


class _SystemSampler:
    """Samples CPU, memory and GPU use of the host in a thread.

    Of MLflow's monitor only the sensors are used: the monitor itself ends at the first call that
    fails, and asks the server for the run before each sample.
    """

    def __init__(self) -> None:
        self._samples: queue.Queue[tuple[int, dict[str, float]]] = queue.Queue()
        self._next_step: int | None = None  # None until the server told what it has
        self._is_stopped = threading.Event()

    def start(self) -> None:
        """Start sampling; without any sensor it warns and samples nothing."""
        try:
            # Not in the thread: two that import mlflow at a time meet half of it.
            sensors = _sensors()
        except Exception as error:
            logger.warning("no system metrics: %s", error)
            return
        threading.Thread(
            target=self._sample, args=(sensors,), name="system-metrics", daemon=True
        ).start()

    def stop(self) -> None:
        """Take no more samples."""
        self._is_stopped.set()

    def take(self, last: dict[str, int]) -> list[Point]:
        """The samples since the last call, numbered on from what MLflow has."""
        if self._next_step is None:
            steps = [step for key, step in last.items() if key.startswith(_SYSTEM_PREFIX)]
            self._next_step = max(steps, default=-1) + 1
        points = []
        while not self._samples.empty():
            time_ms, sample = self._samples.get()
            points += [Point(k, v, time_ms, self._next_step) for k, v in sample.items()]
            self._next_step += 1
        return points

    def _sample(self, sensors: list[Any]) -> None:
        try:
            while not self._is_stopped.is_set():
                for sensor in sensors:
                    sensor.collect_metrics()
                self._is_stopped.wait(_SYSTEM_METRICS_S)
                sample: dict[str, float] = {}
                for sensor in sensors:
                    metrics = sensor.aggregate_metrics().items()
                    sample |= {_SYSTEM_PREFIX + key: value for key, value in metrics}
                    sensor.clear_metrics()
                self._samples.put((int(time.time() * 1000), sample))
        except Exception as error:
            logger.warning("system metrics end here: %s", error)


def _sensors() -> list[Any]:
    """MLflow's sensors for what this host has."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    sensors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for gpu in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # neither the library nor the device need be there
            return [*sensors, gpu()]
    return sensors
