"""The Slurm launcher, run by bash on this machine with `srun` and `scontrol` that only pretend.

What they pretend: two nodes, which are both this machine. Ray, the token, the signals and the run
are real. Not tried: Slurm itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPO_ROOT
from tests.docker.ray_nodes import free_port, node_env, processes_of, ray_folder

SCRIPT = REPO_ROOT / "docker" / "slurm" / "train.sbatch"
JOB_ID = "4711"
SCONTROL = """#!/bin/sh
case $1 in
show) printf '%s\\n' 127.0.0.1 localhost ;;
requeue) echo "$2" >>{folder}/requeued ;;
esac
"""
# Two nodes of one machine need two ports for their agents, and less of its memory.
SRUN = """#!/bin/sh
while [ "${{1#--}}" != "$1" ]; do shift; done
PORT=$(python -c 'from tests.docker.ray_nodes import free_port; print(free_port())')
exec "$@" --dashboard-agent-listen-port="$PORT" --object-store-memory=157286400
"""

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[tuple[Launch, Path]]:
    """Starts the script with arguments; and the folder that is the job's."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text.format(folder=tmp_path))
        (tools / name).chmod(0o755)
    with ray_folder() as folder:
        env = node_env(tmp_path / "no token yet", folder, PYTHONPATH=str(REPO_ROOT))
        env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
        env |= {
            "SLURM_JOB_ID": str(free_port() % 10000 + 10000),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURM_SUBMIT_DIR": str(REPO_ROOT),
        }

        def launch(*arguments: str | Path) -> subprocess.Popen[str]:
            return subprocess.Popen(
                ["bash", SCRIPT, *arguments],
                env=env,
                stdout=(tmp_path / "log").open("a"),
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

        yield launch, folder
        # The trap of the script has done this if it works; what is tested is above.
        for process in processes_of(folder):
            process.kill()


def steps_logged(run: Path) -> list[int]:
    """Steps in the run's record, once each is logged."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "train/loss" in row]


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.timeout(800)
def test_out_of_time_the_run_saves_the_job_is_requeued_and_the_same_command_ends_the_run(
    slurm: tuple[Launch, Path], image_folder: Path, tmp_path: Path
):
    launch, folder = slurm
    run = tmp_path / "runs" / "clocked"
    command = (
        *("jobs/pretrain.py", "debug", "--data.path", image_folder, "--run.name", "clocked"),
        *("--run.storage-path", tmp_path / "runs", "--optim.num-steps", "400"),
    )
    job = launch(*command)
    deadline = time.monotonic() + 240
    while not steps_logged(run):
        assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    tokens = list(REPO_ROOT.glob(".ray-token-*"))
    assert len(tokens) == 1 and tokens[0].stat().st_mode & 0o077 == 0, "for its owner only"
    secret = tokens[0].read_text()
    os.kill(job.pid, signal.SIGUSR1)  # to the batch shell alone, as --signal=B: does
    assert job.wait(timeout=150) == 130, (tmp_path / "log").read_text()[-3000:]
    assert not processes_of(folder) and not tokens[0].exists()
    assert len((tmp_path / "requeued").read_text().split()) == 1
    saved = max(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_*"))
    assert 0 < saved < 400

    again = launch(*command[:-1], str(saved + 5), "--run.allow-config-change")
    assert again.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert json.loads((run / "summary.json").read_text())["steps"] == saved + 5
    assert len((tmp_path / "requeued").read_text().split()) == 1, (
        "a finished run does not come back"
    )
    assert not processes_of(folder) and not list(REPO_ROOT.glob(".ray-token-*"))
    assert secret not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_without_a_job_nothing_is_started(slurm: tuple[Launch, Path], tmp_path: Path):
    launch, folder = slurm
    assert launch().wait(timeout=30) == 2
    assert "which job?" in (tmp_path / "log").read_text()
    assert not processes_of(folder)
    assert psutil.pid_exists(os.getpid())
