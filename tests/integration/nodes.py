"""Ray clusters of several nodes on one machine, in a process of their own.

The session's cluster is in this process already, and a process knows one cluster; so the tests run
scripts, against nodes that `Cluster` starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

from pipeline.cluster import PRIVATE_ENV, QUIET_ENV
from tests.conftest import REPO_ROOT

_STORE = 100 * 2**20


@contextmanager
def nodes(*kinds: dict[str, Any]) -> Iterator[tuple[Cluster, dict[str, str]]]:
    """A head without CPUs and these nodes; yields it, and the environment of those who join."""
    environment = {**QUIET_ENV, **PRIVATE_ENV, "PYTHONPATH": str(REPO_ROOT)}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,  # the state API asks it
            "dashboard_port": 0,
            "object_store_memory": _STORE,
        },
    )
    try:
        for kind in kinds:
            cluster.add_node(object_store_memory=_STORE, **kind)
        cluster.wait_for_nodes()
        yield cluster, {**os.environ, "RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def run_script(script: str, environment: dict[str, str], timeout_s: float = 240) -> str:
    """Run Python in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPO_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout
