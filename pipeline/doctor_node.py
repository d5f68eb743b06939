"""What `jobs/doctor.py` looks at on one node: facts, not verdicts. Runs inside every node.

Surprising: nothing here raises. A check that cannot be made says why, as text, because the others
should still be made; `doctor_findings.py` decides what is wrong with it.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pipeline import storage
from pipeline.mlflow_delivery import connect
from pipeline.reproducibility import environment

REPO_ROOT = Path(__file__).resolve().parents[1]
DOCTOR_EXPERIMENT = "itpn-doctor"
"""MLflow experiment of the runs that are created to see whether one can be."""
_READ_PAUSE_S = 0.25
_MATMUL_SIDE = 256


def node_facts(folders: tuple[str, ...]) -> dict[str, Any]:
    """Versions, devices, limits and room of this node.

    Args:
        folders: whose free space is wanted; those that do not exist are looked at where they would
            be made.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "versions": {k: v for k, v in environment().items() if k not in ("host", "platform")},
        "code": code_digest(),
        "host": environment()["host"],
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "shm_bytes": _size_of("/dev/shm"),
        "open_files": soft,
        "disk_free_bytes": {folder: _free(folder) for folder in folders},
        "gpus": gpus(),
        "decoder": _problem_of(_try_decoder),
    }


def code_digest(root: Path = REPO_ROOT) -> str:
    """Short digest of our own Python files: the commit is not known in an uploaded working_dir."""
    digest = hashlib.sha256()
    for room in ("models", "pipeline", "jobs"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def gpus() -> list[dict[str, Any]]:
    """Each GPU torch sees: name, memory, and why a small product on it is wrong, if it is."""
    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        facts: dict[str, Any] = {"problem": _problem_of(partial(_try_gpu, number))}
        if not facts["problem"]:
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            facts |= {"name": name, "memory_bytes": total, "memory_free_bytes": free}
        found.append(facts)
    return found


def _try_gpu(number: int) -> None:
    ones = torch.ones(_MATMUL_SIDE, _MATMUL_SIDE, device=f"cuda:{number}")
    product = float((ones @ ones)[0, 0])
    if product != _MATMUL_SIDE:
        raise RuntimeError(f"a product of ones gives {product}, not {_MATMUL_SIDE}")


def _try_decoder() -> None:
    import cykooz_resizer  # noqa: F401
    import simplejpeg

    grey = np.full((16, 16, 3), 128, np.uint8)
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(grey, quality=90))
    if abs(decoded.astype(int) - 128).max() > 4:
        raise RuntimeError("a grey JPEG does not come back grey")


def write_mark(folder: str, token: str, node_id: str) -> str:
    """Write this node's file where all nodes should see it; why not, or empty."""

    def write() -> None:
        marks = mark_folder(folder, token)
        marks.mkdir(parents=True, exist_ok=True)
        (marks / node_id).write_text(f"{token} {node_id}")

    return _problem_of(write)


def read_marks(folder: str, token: str, node_ids: list[str], timeout_s: float) -> dict[str, Any]:
    """Read the files of these nodes; those that do not come in time, and how long it took."""
    start = time.monotonic()
    missing = {node_id: "no such file" for node_id in node_ids}
    while missing:
        for node_id in list(missing):
            try:
                text = (mark_folder(folder, token) / node_id).read_text()
            except OSError as error:
                missing[node_id] = f"{type(error).__name__}: {error}"
                continue
            if text == f"{token} {node_id}":
                del missing[node_id]
        if missing and time.monotonic() - start > timeout_s:
            break
        if missing:
            time.sleep(_READ_PAUSE_S)  # file systems over networks may show files late
    return {"missing": missing, "wait_s": time.monotonic() - start}


def remove_marks(folder: str, token: str) -> None:
    """Leave nothing behind."""
    shutil.rmtree(mark_folder(folder, token), ignore_errors=True)


def mark_folder(folder: str, token: str) -> Path:
    """Where the nodes' files are."""
    return Path(folder).absolute() / f".doctor-{token}"


def try_data(path: str) -> str:
    """Read the beginning of the first file of a data set; why that fails, or empty."""

    def read() -> None:
        filesystem, inner = storage.resolve(path)
        files = storage.list_files(filesystem, inner)
        if not files:
            raise FileNotFoundError("there is no file")
        with filesystem.open_input_file(files[0].path) as file:
            file.read(1024)

    return _problem_of(read)


def try_checkpoints(path: str) -> str:
    """Write, read and delete a file there; why that fails, or empty."""

    def write() -> None:
        filesystem, inner = storage.resolve(path)
        file = f"{inner}/.doctor-{uuid.uuid4().hex}"
        storage.write_bytes(filesystem, file, b"doctor")
        try:
            if storage.read_bytes(filesystem, file) != b"doctor":
                raise OSError("what was written is not what is read")
        finally:
            filesystem.delete_file(file)

    return _problem_of(write)


def try_mlflow(uri: str) -> str:
    """Create a run, log a metric and a file, delete it; why that fails, or empty."""

    def write() -> None:
        client = connect(uri)
        found = client.get_experiment_by_name(DOCTOR_EXPERIMENT)
        experiment_id = found.experiment_id if found else _new_experiment(client)
        run_id = client.create_run(experiment_id, run_name="doctor").info.run_id
        try:
            client.log_metric(run_id, "doctor", 1.0)
            client.log_text(run_id, "doctor", "doctor.txt")
        finally:
            client.delete_run(run_id)

    return _problem_of(write)


def _new_experiment(client: Any) -> str:
    try:
        return str(client.create_experiment(DOCTOR_EXPERIMENT))
    except Exception:
        found = client.get_experiment_by_name(DOCTOR_EXPERIMENT)
        if found is None:
            raise
        return str(found.experiment_id)  # another node was quicker


def _problem_of(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _free(folder: str) -> int | None:
    path = Path(folder).absolute()
    existing = next((p for p in (path, *path.parents) if p.exists()), None)
    return None if existing is None else psutil.disk_usage(str(existing)).free


def _size_of(folder: str) -> int | None:
    return psutil.disk_usage(folder).total if Path(folder).exists() else None
