"""Pages of a private run are for this machine: what listens, and where."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipeline.cluster import joined_cluster
from tests.conftest import REPO_ROOT
from tests.docker.ray_nodes import free_port

LOOPBACK = {"127.0.0.1", "::1"}


def test_a_private_cluster_has_no_dashboard(monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **kwargs: given.update(kwargs))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with joined_cluster(2):
        pass
    assert given["address"] == "local" and given["include_dashboard"] is False


def test_who_wants_a_token_on_a_private_cluster_gets_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **kwargs: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with joined_cluster(2):
        assert os.environ["RAY_AUTH_MODE"] == "token", "docs/security.md says how to set it"


def listening(process: psutil.Process) -> set[str]:
    """Addresses at which a process or one of its own accepts connections."""
    family = [process, *process.children(recursive=True)]
    return {
        connection.laddr.ip
        for member in family
        for connection in member.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.slow
def test_make_mlflow_listens_on_this_machine_only(tmp_path: Path):
    found = re.search(r"^mlflow: .*\n\t(.*)$", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    command = found[1].replace("$(BIN)", str(Path(sys.executable).parent)).split()
    (tmp_path / "runs").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command += ["--port", str(free_port()), "--workers", "1"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        process = psutil.Process(server.pid)
        try:
            deadline = time.monotonic() + 90
            while not (addresses := listening(process)):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
            assert addresses <= LOOPBACK
        finally:
            family = [process, *process.children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            server.wait(timeout=30)
            psutil.wait_procs(family, timeout=10)
