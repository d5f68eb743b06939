"""Ray nodes as processes of this machine, started with commands that are meant for containers."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.docker.linters import BIN


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths must be short; nothing that runs in it is left."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    try:
        yield folder
    finally:
        left = processes_of(folder)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes whose command line or environment names the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            texts = [*process.cmdline(), process.environ().get("RAY_TMPDIR", "")]
            if any(str(folder) in text for text in texts) and process.pid != os.getpid():
                found.append(process)
    return found


def write_token(path: Path) -> Path:
    """A new token, readable by its owner only."""
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def node_env(token: Path, folder: Path, **others: str) -> dict[str, str]:
    """Environment of a node, and of who wants to talk to it."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder)}
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    return {**kept, **ours, "RAY_USAGE_STATS_ENABLED": "0", "PATH": path, **others}


def wait_for(command: list[str], env: dict[str, str], *, timeout_s: float = 60) -> None:
    """Run a command until it succeeds, as a health check does."""
    deadline = time.monotonic() + timeout_s
    while True:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(0.5)
