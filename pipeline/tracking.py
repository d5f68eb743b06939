"""Tracking: metrics.jsonl and MLflow.

`metrics.jsonl` is the record; MLflow gets a copy (`mlflow_delivery.py`), so that a slow or dead
tracking server never holds up a step. Surprising: the driver opens and closes the MLflow run,
worker 0 only writes into it. So one run survives restarts of workers, and its end status is the
driver's, which then also delivers what worker 0 could not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact_store import require_client
from pipeline.credentials import require_no_password
from pipeline.metrics_file import MetricsFile, read_records
from pipeline.mlflow_delivery import KnownSteps, MlflowDelivery, connect, points_of, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
_MAX_PARAM_CHARS = 6000  # MLflow's own limit on parameter values
PICTURE_FOLDERS = ("reconstructions", "predictions", "confusion")
"""Kinds of pictures a run may draw; folders of the run and of its artifacts."""
PROFILES = "profiles"
"""Likewise, of profiles."""
_CLOSE_PAUSES_S = (1.0, 3.0)
_KEY_TAG = "itpn_key"
URI_VARIABLE = "MLFLOW_TRACKING_URI"


class _ArtifactLocationError(ValueError):
    """Artifacts cannot go where they should."""


def default_tracking_uri(storage_path: Path) -> str:
    """SQLite file under the run storage."""
    return f"sqlite:///{storage_path.absolute() / 'mlflow.db'}"


def tracking_uri(given: str, storage_path: Path) -> str:
    """The URI that was given, or that of the environment, or a SQLite file under the run storage.

    Raises:
        ValueError: the one of the environment holds a password.
    """
    uri = given or os.environ.get(URI_VARIABLE, "")
    require_no_password(URI_VARIABLE, uri)
    return uri or default_tracking_uri(storage_path)


def new_key() -> str:
    """What a run is known by before MLflow has given it an id."""
    return uuid.uuid4().hex


def open_run(
    uri: str,
    *,
    experiment: str,
    artifact_folder: Path,
    name: str,
    run_id: str | None,
    key: str,
    params: dict[str, Any],
    tags: dict[str, str],
    artifact_root: str = "",
) -> str:
    """Create an MLflow run, or reopen one; returns its id.

    A run that is continued needs no server: what it logs is delivered when there is one.

    Args:
        uri: tracking URI.
        experiment: created on first use.
        artifact_folder: where a local experiment keeps artifacts (servers decide themselves).
        name: run name.
        run_id: run to continue; None for a new one.
        key: of the run, from `new_key`, written down before: one that was created with it just
            before a kill is taken instead of a second one.
        params: configuration, logged once.
        tags: facts that may change between restarts.
        artifact_root: where the experiment keeps artifacts instead; a folder or a URI.

    Raises:
        ValueError: a new run cannot be created, or MLflow does not know the one to continue.
    """
    if run_id is not None:
        _reopen(uri, run_id, tags)
        return run_id
    try:
        location = artifact_folder.absolute().as_uri() if uri.startswith("sqlite:") else None
        if artifact_root:
            is_folder = "://" not in artifact_root
            location = Path(artifact_root).absolute().as_uri() if is_folder else artifact_root
        return _create(uri, experiment, location, bool(artifact_root), name, key, params, tags)
    except Exception as error:
        if isinstance(error, _ArtifactLocationError):
            raise
        way_out = "start the server, or pass --tracking.uri '' to log into SQLite"
        if uri.startswith("sqlite:"):
            way_out = "make that file writable and give it room, or choose another --tracking.uri"
        raise ValueError(
            f"tracking.uri='{uri}' takes no new run: {reason(error)}; a run starts only "
            f"where it can be logged: {way_out}"
        ) from error


def _create(
    uri: str,
    experiment: str,
    location: str | None,
    is_location_given: bool,
    name: str,
    key: str,
    params: dict[str, Any],
    tags: dict[str, str],
) -> str:
    from mlflow.entities import Param

    client = connect(uri)
    experiment_id = _experiment_id(client, experiment, location, is_location_given)
    runs = client.search_runs([experiment_id], f"tags.{_KEY_TAG} = '{key}'", max_results=1)
    if not runs:
        runs = [client.create_run(experiment_id, run_name=name, tags={_KEY_TAG: key})]
    run_id = str(runs[0].info.run_id)
    try:
        entries = [Param(key, str(value)[:_MAX_PARAM_CHARS]) for key, value in params.items()]
        client.log_batch(run_id, params=entries)
        _set_tags(client, run_id, tags)
        try:
            require_client(str(client.get_run(run_id).info.artifact_uri))
        except ValueError as error:
            raise _ArtifactLocationError(str(error)) from error
    except BaseException:
        with contextlib.suppress(Exception):  # nobody will come back to half a run
            client.delete_run(run_id)
        raise
    return run_id


def _experiment_id(
    client: MlflowClient, name: str, location: str | None, is_location_given: bool
) -> str:
    """Of the experiment of this name, which is created where there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            # A run that began at the same moment was quicker.
    kept_in = str(found.artifact_location).rstrip("/")
    if is_location_given and location is not None and kept_in != location.rstrip("/"):
        raise _ArtifactLocationError(
            f"tracking.artifact_root='{location}', but the experiment '{name}' keeps its artifacts "
            f"in {kept_in}; leave it out, or give another --tracking.experiment"
        )
    return str(found.experiment_id)


def _reopen(uri: str, run_id: str, tags: dict[str, str]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        client.update_run(run_id, status="RUNNING")
        _set_tags(client, run_id, tags)
    except Exception as error:
        code = error.error_code if isinstance(error, MlflowException) else None
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise ValueError(
                f"tracking.uri='{uri}' has no run {run_id}, which this run was logged to so far; "
                "pass the URI it was started with, or take mlflow_run_id out of its state.json to "
                "begin a new one"
            ) from error
        logger.warning(
            "MLflow at %s: %s; the run goes on, metrics are delivered when it is back",
            *(uri, reason(error)),
        )


def _set_tags(client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def close_run(
    uri: str,
    run_id: str,
    status: str,
    *,
    run_dir: Path,
    files: list[Path],
    checkpoint: Path | None = None,
    tags: dict[str, str] | None = None,
    ended_at_s: float | None = None,
) -> str | None:
    """Deliver what MLflow lacks of a run and end it; may be repeated, doubles nothing.

    Args:
        uri: tracking URI.
        run_id: MLflow run.
        status: FINISHED, FAILED or KILLED.
        run_dir: the run's folder: metrics and pictures worker 0 could not deliver are there.
        files: last files, logged anew each time; those that do not exist are passed over.
        checkpoint: checkpoint folder to log.
        tags: facts to set again, in case the run was resumed while there was no server.
        ended_at_s: when the run ended, seconds since 1970; None for now.

    Returns:
        Why MLflow still lacks something, or None.
    """
    ended_at_ms = int((ended_at_s or time.time()) * 1000)
    for pause_s in (*_CLOSE_PAUSES_S, None):
        try:
            client = connect(uri)
            known = KnownSteps(client, run_id)
            records = read_records(run_dir / "metrics.jsonl")
            known.send([p for record in records for p in points_of(record) if not known.has(p)])
            try:
                _log_artifacts(client, run_id, run_dir, files, checkpoint)
            finally:  # artifacts may lie on another server
                _set_tags(client, run_id, tags or {})
                client.set_terminated(run_id, status=status, end_time=ended_at_ms)
            return None
        except Exception as error:
            problem = reason(error)
        if pause_s is not None:
            time.sleep(pause_s)
    return problem


def _log_artifacts(
    client: MlflowClient, run_id: str, run_dir: Path, files: list[Path], checkpoint: Path | None
) -> None:
    for file in files:
        if file.is_file():
            client.log_artifact(run_id, str(file))
    # These never change once they are written.
    for kind in (*PICTURE_FOLDERS, PROFILES):
        _log_missing(client, run_id, run_dir / kind, kind)
    if checkpoint is not None:
        _log_missing(client, run_id, checkpoint, f"checkpoints/{checkpoint.name}")


def _log_missing(client: MlflowClient, run_id: str, folder: Path, artifact_folder: str) -> None:
    """Log the files of a folder that are not there yet, or not with their size."""
    if not folder.is_dir():
        return
    there = {info.path: info.file_size for info in client.list_artifacts(run_id, artifact_folder)}
    for file in sorted(folder.iterdir()):
        is_partial = file.name.startswith(".")
        if not is_partial and there.get(f"{artifact_folder}/{file.name}") != file.stat().st_size:
            client.log_artifact(run_id, str(file), artifact_folder)


class Tracker:
    """Writes the metrics and pictures of a run; used by worker 0 only.

    Args:
        run_dir: the run's folder.
        uri: MLflow tracking URI.
        run_id: MLflow run to write into.
        start_step: records of later steps, left by a killed run, are removed first.
        system_metrics: also log host CPU, memory and GPU use.
        warn: told of full disks and lost servers, neither of which stops anything.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str,
        run_id: str,
        start_step: int,
        system_metrics: bool,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self.run_dir = run_dir
        self.run_id = run_id
        self._file = MetricsFile(run_dir / "metrics.jsonl", start_step=start_step, warn=warn)
        self.lost_steps = max(0, self._file.last_step - start_step)
        """Steps logged before a kill that this attempt computes again."""
        self._mlflow = MlflowDelivery(uri, run_id, system_metrics=system_metrics, warn=warn)
        for record in self._file.kept:  # what a killed worker had written but not yet delivered
            self._mlflow.log_record(record)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        record = {"step": step, "time": round(time.time(), 3), **metrics}
        self._file.append(record)
        self._mlflow.log_record(record)

    def log_picture(self, step: int, kind: str, png: bytes) -> Path:
        """Save a picture in the folder of its kind and as an artifact.

        Raises:
            OSError: it cannot be saved; nothing of it is left.
        """
        path = self.run_dir / kind / f"step_{step:08d}.png"
        partial = path.with_name(f".{path.name}.part")
        path.parent.mkdir(exist_ok=True)
        try:
            partial.write_bytes(png)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self.log_artifact(path, kind)
        return path

    def log_artifact(self, path: Path, artifact_folder: str) -> None:
        """Copy a file to the run's artifacts, in the background."""
        self._mlflow.log_artifact(path, artifact_folder)

    def close(self) -> None:
        """Flush; waits up to a minute for a slow tracking server."""
        self._mlflow.close()
        self._file.close()
