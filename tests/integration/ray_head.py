"""A Ray head with a job server that asks for a token, as on a cluster, and jobs submitted to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import REPO_ROOT

_RAY = str(Path(sys.executable).parent / "ray")
_START_TIMEOUT_S = 150.0
TOKEN = "0123456789abcdef" * 4


class RayHead:
    """`ray start --head` with token authentication, on ports of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.ports = [_free_port() for _ in range(4)]
        self.address = f"http://127.0.0.1:{self.ports[1]}"
        command = [_RAY, "start", "--head", "--block", "--num-cpus=8", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self.ports[0]}"]
        command += [f"--dashboard-port={self.ports[1]}", f"--temp-dir={self.folder}"]
        # Their defaults belong to the cluster of the session, and an agent without its port
        # lives, but takes no jobs.
        command += [f"--dashboard-agent-listen-port={self.ports[2]}"]
        command += [f"--ray-client-server-port={self.ports[3]}"]
        command += [f"--object-store-memory={300 * 2**20}"]
        with (self.folder / "start.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=self.environment(TOKEN),
                start_new_session=True,
            )
        try:
            self._wait_for_agent()
        except BaseException:
            self.stop()
            raise

    def _wait_for_agent(self) -> None:
        """Return when a job runs: the head answers before its agent is there, which starts jobs."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while (tried := self.ray("job", "submit", "--", "true")).returncode:
            told = (self.folder / "start.log").read_text() + tried.stdout + tried.stderr
            assert self._process.poll() is None and time.monotonic() < deadline, told
            time.sleep(0.5)

    def environment(self, token: str | None) -> dict[str, str]:
        """Of somebody who has this token, or none; nothing of Ray is inherited."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))
        }
        given = {} if token is None else {"RAY_AUTH_TOKEN": token}
        # A home of its own: ~/.ray/auth_token would be found otherwise.
        return {**inherited, "RAY_AUTH_MODE": "token", "HOME": str(self.folder), **given}

    def ray(
        self, *arguments: str, token: str | None = TOKEN, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """`ray job ...` against this head, from the repository root."""
        environment = self.environment(token) | {"RAY_API_SERVER_ADDRESS": self.address}
        return subprocess.run(
            [_RAY, *arguments],
            cwd=REPO_ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def submit(
        self, *job: str, options: tuple[str, ...] = (), token: str | None = TOKEN
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python jobs/...`."""
        command = ("job", "submit", "--working-dir", ".", *options, "--", sys.executable, *job)
        return self.ray(*command, token=token)

    def stop(self) -> None:
        """End it and its processes, and delete its files."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
