"""No secret of the environment in anything a run writes or prints, its failures included.

A control word, which is meant to be written, shows that the search would find one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAsecretid5521",
    "AWS_SECRET_ACCESS_KEY": "s3secret/key+9377",
    "AWS_SESSION_TOKEN": "sessionsecret8461",
    "MLFLOW_TRACKING_USERNAME": "usersecret2210",
    "MLFLOW_TRACKING_PASSWORD": "passwordsecret7733",
    "MLFLOW_TRACKING_TOKEN": "tokensecret9114",
    "PGPASSWORD": "pgsecret1180",
    "RAY_AUTH_TOKEN": "raysecret" + "6402" * 8,
}
PASSWORD = "uripassword4417"
CONTROL = "controlword3085"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """For Ray's own logs; its sockets do not take the long paths of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run_job(ray_folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and all that is printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.pretrain", "debug", *arguments],
        cwd=REPO_ROOT,
        env={**inherited, **SECRETS, "RAY_TMPDIR": str(ray_folder), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


def files_with(words: list[str], *folders: Path) -> dict[str, list[str]]:
    """Which files hold which of the words, whatever kind of file it is."""
    found: dict[str, list[str]] = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            for word in words:
                if word.encode() in content:
                    found.setdefault(word, []).append(path.name)
    return found


def test_a_run_writes_and_prints_no_secret_of_its_environment(
    image_folder: Path, tmp_path: Path, ray_folder: Path
):
    status, printed = run_job(
        ray_folder,
        *("--data.path", str(image_folder), "--run.storage-path", str(tmp_path)),
        *("--run.name", CONTROL, "--optim.num-steps", "4"),
    )
    assert status == 0, printed
    found = files_with([*SECRETS.values(), CONTROL], tmp_path, ray_folder)
    names = set(found.pop(CONTROL))
    assert {"config.json", "mlflow.db", "summary.json"} <= names and CONTROL in printed
    assert any(path.stat().st_size for path in ray_folder.rglob("*.out")), "of Ray, too"
    assert found == {}
    written = {path.name for path in (tmp_path / CONTROL).rglob("*")}
    assert {"environment.json", "metrics.jsonl", "events.jsonl", "encoder.safetensors"} <= written
    assert not [value for value in SECRETS.values() if value in printed]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--tracking.uri", f"http://me:{PASSWORD}@127.0.0.1:1"], {}),
        (["--data.path", f"s3://id:{PASSWORD}@bucket/images"], {}),
        ([], {"MLFLOW_TRACKING_URI": f"https://me:{PASSWORD}@127.0.0.1:1/"}),
        (["--tracking.uri", "http://127.0.0.1:{free}"], {}),  # nobody there to take the password
        pytest.param(
            ["--data.path", "s3://bucket/images"],
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:{free}", "AWS_DEFAULT_REGION": "us-east-1"},
            marks=pytest.mark.faults,  # retried for half a minute
        ),
    ],
    ids=["tracking-uri", "data-uri", "variable", "dead-mlflow", "dead-s3"],
)
def test_a_refused_or_failed_run_says_why_without_the_secret(
    arguments: list[str],
    environment: dict[str, str],
    image_folder: Path,
    tmp_path: Path,
    ray_folder: Path,
):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        free = str(sock.getsockname()[1])
    status, printed = run_job(
        ray_folder,
        *("--data.path", str(image_folder), "--run.storage-path", str(tmp_path)),
        *(argument.format(free=free) for argument in arguments),
        **{key: value.format(free=free) for key, value in environment.items()},
    )
    assert status in (1, 2) and "Traceback" not in printed, printed
    assert "rror" in printed
    secrets = [*SECRETS.values(), PASSWORD]
    assert not [value for value in secrets if value in printed], printed
    assert files_with(secrets, tmp_path, ray_folder) == {}
