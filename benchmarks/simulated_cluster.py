"""A Ray cluster of several nodes on this machine, and a pre-training job on it, both killable.

The head takes no training worker: they need the resource `trainer`, one of which each other node
offers. Surprising: everything that is killed here is a real process that gets a real SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

REPO_ROOT = Path(__file__).resolve().parents[1]
_STORE_BYTES = 150 * 2**20


class SimulatedCluster:
    """A head for driver and decoding, and nodes with room for one training worker each.

    Args:
        num_trainer_nodes: nodes besides the head.
    """

    def __init__(self, num_trainer_nodes: int) -> None:
        self.num_trainer_nodes = num_trainer_nodes

    def __enter__(self) -> SimulatedCluster:
        head = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        for _ in range(self.num_trainer_nodes):
            self.add_node()
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()

    @property
    def address(self) -> str:
        """What RAY_ADDRESS must be for a job to join."""
        address: str = self.cluster.address
        return address

    def add_node(self) -> None:
        """One more node with room for a training worker."""
        resources = {"trainer": 1}
        node = self.cluster.add_node(
            num_cpus=1, resources=resources, object_store_memory=_STORE_BYTES
        )
        self.nodes.append(node)

    def kill_node(self, index: int) -> None:
        """Every process of a node is gone at once, without a word."""
        self.cluster.remove_node(self.nodes.pop(index), allow_graceful=False)

    def drain_node(self, index: int, deadline_s: float) -> None:
        """Announce that a node will be taken away, as a cloud does with spot machines."""
        client = GcsClient(address=self.address)
        preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + deadline_s) * 1000)
        node_id = self.nodes[index].node_id
        is_accepted, why = client.drain_node(node_id, preemption, "spot reclaim", deadline_ms)
        assert is_accepted, why

    def training_workers(self) -> list[psutil.Process]:
        """Processes of Ray Train's workers on this cluster."""
        raylets = [
            info.process.pid for node in self.nodes for info in node.all_processes.get("raylet", [])
        ]
        found = []
        for pid in raylets:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(pid).children()
                found += [p for p in children if "RayTrainWorker" in " ".join(p.cmdline())]
        return found


class Job:
    """`python -m jobs.pretrain debug`, its folder, and its process while it lives.

    Args:
        storage: run.storage_path.
        name: run.name.
        settings: further command-line arguments.
        address: the cluster it joins; None for a private one.
    """

    def __init__(self, storage: Path, name: str, settings: list[str], address: str | None) -> None:
        self.folder = storage / name
        self.address = address
        self.output = storage / f"{name}.log"
        self.command = [
            *(sys.executable, "-m", "jobs.pretrain", "debug"),
            *("--run.storage-path", str(storage), "--run.name", name, *settings),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run the command; its output is appended to a file beside the run's folder."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        if self.address is not None:
            environment |= {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=REPO_ROOT, stdout=output, stderr=output, env=environment
            )

    def signal(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        assert self.process is not None, "start it first"
        self.process.send_signal(number)
        return self.process.wait(timeout=180)

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; returns the exit status."""
        assert self.process is not None, "start it first"
        return self.process.wait(timeout_s)

    def wait_for_step(self, step: int, timeout_s: float) -> None:
        """Wait until the metrics of a step are there.

        Raises:
            RuntimeError: the job ended before, or took too long.
        """
        deadline = time.monotonic() + timeout_s
        while self.last_step() < step:
            assert self.process is not None, "start it first"
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self.output.read_text()[-4000:]
                raise RuntimeError(f"{self.folder.name} did not reach step {step}:\n{tail}")
            time.sleep(0.05)

    def last_step(self) -> int:
        """Step of the newest metrics, 0 before the first."""
        records = self.metrics()
        return int(records[-1]["step"]) if records else 0

    def metrics(self) -> list[dict[str, Any]]:
        """Content of metrics.jsonl."""
        return _read_lines(self.folder / "metrics.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind in the logbook."""
        return [e for e in _read_lines(self.folder / "events.jsonl") if e["event"] == kind]

    def state(self) -> dict[str, Any]:
        """Content of state.json."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that another process may be writing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
