"""The commands of compose.yaml, run for real as processes of this machine instead of containers.

Only ports, folders and addresses are replaced. What is not tried this way: PostgreSQL, VersityGW,
and Compose itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT
from tests.docker.compose_file import service
from tests.docker.linters import BIN, DOCKER
from tests.docker.ray_nodes import (
    free_port,
    node_env,
    processes_of,
    ray_folder,
    wait_for,
    write_token,
)

SECRETS = {
    "ITPN_RAY_TOKEN": "t",
    "MLFLOW_ADMIN_USERNAME": "admin",
    "MLFLOW_ADMIN_PASSWORD": "correct horse battery",
    "MLFLOW_SECRET_KEY": "signs sessions",
    "POSTGRES_PASSWORD": "p",
    "S3_ACCESS_KEY": "a",
    "S3_SECRET_KEY": "s",
}


@contextlib.contextmanager
def running(
    command: list[str], env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is told to go at the end, as `docker compose down` does."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.faults
def test_the_ray_services_form_a_cluster_that_runs_a_job_and_wants_its_token(
    image_folder: Path, tmp_path: Path
):
    gcs, dashboard, token = free_port(), free_port(), write_token(tmp_path / "token")
    swaps = {
        "--port=6379": f"--port={gcs}",
        "--dashboard-host=0.0.0.0": "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265": f"--dashboard-port={dashboard}",
        "--address=ray-head:6379": f"--address=127.0.0.1:{gcs}",
    }
    with ray_folder() as folder, contextlib.ExitStack() as stack:
        agents = []
        for name in ("ray-head", "ray-worker-1", "ray-worker-2"):
            command = [swaps.get(part, part) for part in service(name)["command"]]
            assert command != service(name)["command"], "or it is not of this test"
            agents.append(free_port())
            command += [
                f"--dashboard-agent-listen-port={agents[-1]}",
                "--node-ip-address=127.0.0.1",
            ]
            command += [f"--object-store-memory={150 * 2**20}"]
            command += [] if name == "ray-head" else ["--num-cpus=2"]
            command[0] = str(BIN / command[0])
            # Processes of the job would hold the node up, for the 30 s that Ray gives them.
            env = node_env(token, folder, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="3")
            stack.enter_context(running(command, env, tmp_path / f"{name}.log"))
            check = [sys.executable, str(DOCKER / "healthcheck.py")]
            wait_for(check, {**env, "RAY_AGENT_PORT": str(agents[-1])})
        submit = [
            *(str(BIN / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{dashboard}"),
            *("--working-dir", ".", "--", "python", "jobs/pretrain.py", "debug"),
            *("--data.path", str(image_folder), "--run.storage-path", str(tmp_path / "runs")),
            *("--run.name", "composed", "--optim.num-steps", "5"),
        ]
        stranger = {**env, "RAY_AUTH_TOKEN_PATH": str(write_token(tmp_path / "another"))}
        refused = subprocess.run(
            submit, cwd=REPO_ROOT, env=stranger, capture_output=True, text=True, timeout=60
        )
        assert refused.returncode != 0
        assert "authentication token is invalid" in refused.stdout + refused.stderr
        done = subprocess.run(
            submit, cwd=REPO_ROOT, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs" / "composed" / "summary.json").read_text())
    assert summary["steps"] == 5
    assert not processes_of(folder)


def test_a_node_that_does_not_answer_is_not_healthy():
    done = subprocess.run(
        [sys.executable, DOCKER / "healthcheck.py"],
        env={**os.environ, "RAY_AGENT_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and "refused" in done.stdout


def mlflow_environment(folder: Path) -> dict[str, str]:
    """Environment of the service `mlflow`, with SQLite in PostgreSQL's place."""
    store = f"sqlite:///{folder}/mlflow.db"
    users = (DOCKER / "mlflow_auth.ini").read_text()
    ours = service("mlflow", SECRETS)["environment"]
    assert ours["MLFLOW_BACKEND_STORE_URI"] in users, "users are kept in the same data base"
    users = users.replace(ours["MLFLOW_BACKEND_STORE_URI"], f"sqlite:///{folder}/users.db")
    (folder / "mlflow_auth.ini").write_text(users)
    return {
        **os.environ,
        **ours,
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "mlflow_auth.ini"),
    }


def status_of(url: str, *, login: str = "", host: str = "") -> int:
    """Answer to a GET, as a number."""
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", f"Basic {b64encode(login.encode()).decode()}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


LOG_A_RUN = """
import mlflow
with mlflow.start_run():
    mlflow.log_metric("loss", 0.5)
    mlflow.log_text("kept", "note.txt")
print(mlflow.MlflowClient().list_artifacts(mlflow.last_active_run().info.run_id)[0].path)
"""


@pytest.mark.slow
def test_the_mlflow_service_wants_a_password_a_known_host_and_keeps_artifacts(tmp_path: Path):
    port, artifacts = free_port(), tmp_path / "artifacts"

    def here(part: str) -> str:
        part = part.replace("127.0.0.1:5000", f"127.0.0.1:{port}").replace(
            "s3://mlflow", f"{artifacts}"
        )
        return part.replace("--host=0.0.0.0", "--host=127.0.0.1").replace("=5000", f"={port}")

    command = [here(part) for part in service("mlflow")["command"]]
    command[0] = str(BIN / command[0])
    env = mlflow_environment(tmp_path)
    url = f"http://127.0.0.1:{port}"
    experiments = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
    password = SECRETS["MLFLOW_ADMIN_PASSWORD"]
    login, known = f"admin:{password}", "mlflow:5000"  # as jobs on the cluster say
    job = {**os.environ, **service("ray-head", SECRETS)["environment"], "MLFLOW_TRACKING_URI": url}
    with running(command, env, tmp_path / "mlflow.log"):
        check = [here(part) for part in service("mlflow")["healthcheck"]["test"][1:]]
        wait_for([sys.executable, *check[1:]], dict(os.environ), timeout_s=90)
        assert status_of(experiments, host=known) == 401
        assert status_of(experiments, host=known, login="admin:guess") == 401
        assert status_of(experiments, host=known, login=login) == 200
        assert status_of(experiments, host="evil.example", login=login) == 403
        done = subprocess.run(
            [sys.executable, "-c", LOG_A_RUN], env=job, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0 and "note.txt" in done.stdout, done.stdout + done.stderr
    assert [path.read_text() for path in artifacts.rglob("note.txt")] == ["kept"]
    assert password not in (tmp_path / "mlflow.log").read_text()


@pytest.mark.slow
def test_the_mlflow_service_does_not_start_without_a_password(tmp_path: Path):
    env = {**mlflow_environment(tmp_path), "MLFLOW_AUTH_ADMIN_PASSWORD": ""}
    command = [str(BIN / "mlflow"), "server", "--app-name=basic-auth", f"--port={free_port()}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0 and "MLFLOW_AUTH_ADMIN_PASSWORD" in done.stderr + done.stdout
