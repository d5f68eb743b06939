"""Looks at every node of a cluster before a run does; see docs/clusters.md.

An actor on each alive node gathers facts, all of them at the same time. Surprising: what cannot be
looked at, because a node does not answer, is a finding like any other, and never an exception.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import doctor_node
from pipeline.cluster import QUIET_ENV, joined_cluster
from pipeline.config import require_positive
from pipeline.credentials import require_no_password
from pipeline.doctor_findings import (
    Finding,
    judge_clock,
    judge_gpus_wanted,
    judge_node,
    measure_clock,
    overall,
    verdict,
)

logger = logging.getLogger(__name__)
_READ_S = 10.0
Answers = dict[str, Any]
"""Node id -> what its actor returned, or the exception that came instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """What to look at."""

    storage_path: str = "runs"
    """Folder of all runs; every node has to see what the others write there."""
    checkpoint_path: str = ""
    """Where checkpoints are to go, if not there; a path or URI."""
    data: str = ""
    """Data set to read; a path or URI."""
    tracking_uri: str = ""
    """MLflow to write to; empty: none is looked at."""
    use_gpu: bool = False
    """GPUs are wanted: none at all is a failure."""
    json: str = ""
    """File to write the findings to."""
    timeout_s: float = 60.0
    """How long a node may take for its answer."""

    def __post_init__(self) -> None:
        require_positive("timeout_s", self.timeout_s)
        for key in ("checkpoint_path", "data", "tracking_uri"):
            require_no_password(key, getattr(self, key))


class _NodeDoctor:
    """Sits on a node; what it does is in `doctor_node.py`."""

    def ask(self, name: str, *args: Any) -> Any:
        """Call a function there; `write_mark` is told which node this is."""
        if name == "write_mark":
            args = (*args, ray.get_runtime_context().get_node_id())
        return getattr(doctor_node, name)(*args)

    def time_s(self) -> float:
        return time.time()


class _Ward:
    """The actors of all alive nodes."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        alive = [node for node in ray.nodes() if node["Alive"]]
        self.offers = {node["NodeID"]: node["Resources"] for node in alive}
        self.names = {
            node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})" for node in alive
        }
        make = ray.remote(_NodeDoctor)
        self._actors = {
            node["NodeID"]: make.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                # Without a GPU of its own an actor would be shown none.
                runtime_env={"env_vars": QUIET_ENV},
            ).remote()
            for node in alive
        }

    def ask(self, name: str, *args: Any) -> Answers:
        """One function of `doctor_node` on all nodes that answer, at the same time."""
        refs = {id_: actor.ask.remote(name, *args) for id_, actor in self._actors.items()}
        deadline = time.monotonic() + self.timeout_s
        answers: Answers = {}
        for node_id, ref in refs.items():
            try:
                answers[node_id] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
            except Exception as error:
                answers[node_id] = error
                self._actors.pop(node_id)  # its next answers would be waited for, too
        return answers

    def clock(self, node_id: str) -> Callable[[], float]:
        """Asks a node for its time."""
        actor = self._actors[node_id]
        return lambda: ray.get(actor.time_s.remote(), timeout=self.timeout_s)

    @property
    def answering(self) -> list[str]:
        """Nodes that have answered so far."""
        return list(self._actors)


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at every node of the cluster, or of a private one; writes the JSON file if asked."""
    with joined_cluster(1):
        findings = list(_examine(config, _Ward(config.timeout_s)))
    if config.json:
        content = {"status": overall(findings), "findings": [asdict(f) for f in findings]}
        Path(config.json).write_text(json.dumps(content, indent=1))
    return findings


def _examine(config: DoctorConfig, ward: _Ward) -> Iterator[Finding]:
    folders = (str(Path(config.storage_path).absolute()), "/tmp")
    driver = doctor_node.node_facts(folders)
    for node_id, facts in ward.ask("node_facts", folders).items():
        name = ward.names[node_id]
        if isinstance(facts, Exception):
            yield _silent(name, facts)
        else:
            yield from judge_node(name, facts, driver, ward.offers[node_id])
    if config.use_gpu:
        yield judge_gpus_wanted(ward.offers)
    for node_id in ward.answering:
        yield judge_clock(ward.names[node_id], *measure_clock(ward.clock(node_id), time.time))
    yield from _examine_storage(str(Path(config.storage_path).absolute()), ward)
    yield from _examine_services(config, ward)


def _examine_storage(folder: str, ward: _Ward) -> Iterator[Finding]:
    """Each node writes a file, then every node reads the files of all."""
    token = uuid.uuid4().hex
    check = f"shared {folder}"
    fix = "mount the same folder, writable for this user, on all nodes, or choose another"
    try:
        written = ward.ask("write_mark", folder, token)
        writers = [node_id for node_id, problem in written.items() if not problem]
        for node_id, problem in written.items():
            if isinstance(problem, Exception):
                yield _silent(ward.names[node_id], problem)
            elif problem:
                yield verdict(check, ward.names[node_id], f"cannot write: {problem}", "", fix)
        for node_id, read in ward.ask("read_marks", folder, token, writers, _READ_S).items():
            name = ward.names[node_id]
            if isinstance(read, Exception):
                yield _silent(name, read)
                continue
            unseen = [f"the file of {ward.names[k]}: {v}" for k, v in read["missing"].items()]
            problem = f"cannot read {'; '.join(unseen)}" if unseen else ""
            if problem or not written.get(node_id):
                seen = f"written, all {len(writers)} read after {read['wait_s']:.1f} s"
                yield verdict(check, name, problem, seen, fix)
    finally:
        ward.ask("remove_marks", folder, token)  # on all: the folder may not be a shared one


def _examine_services(config: DoctorConfig, ward: _Ward) -> Iterator[Finding]:
    """What every node has to reach: data, checkpoints, MLflow."""
    wanted: Mapping[str, tuple[str, str, str]] = {
        f"data {config.data}": (
            *("try_data", config.data),
            "make it readable from all nodes: mount it, or give them credentials and an address",
        ),
        f"checkpoints {config.checkpoint_path}": (
            *("try_checkpoints", config.checkpoint_path),
            "make it writable from all nodes: mount it, or give them credentials and an address",
        ),
        f"MLflow {config.tracking_uri}": (
            *("try_mlflow", config.tracking_uri),
            "start the server, open its port to all nodes, and give them user and password in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
    }
    for check, (function, target, fix) in wanted.items():
        if not target:
            continue
        for node_id, problem in ward.ask(function, target).items():
            name = ward.names[node_id]
            if isinstance(problem, Exception):
                yield _silent(name, problem)
            else:
                yield verdict(check, name, problem, "works", fix)


def _silent(node: str, error: Exception) -> Finding:
    cause = str(error).strip().splitlines() or [""]
    return verdict(
        *("answers", node, f"{type(error).__name__}: {cause[-1]}", ""),
        "see Ray's log on that node; it has to reach the others, and to import our code",
    )
