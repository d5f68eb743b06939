"""docker/install.sh, which builds the image's environment: what it asks for, and that it works.

The image itself is not built here, for that takes a container engine. What its RUN line runs is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT

INSTALL = REPO_ROOT / "docker" / "install.sh"
PYPROJECT = REPO_ROOT / "pyproject.toml"
# Notes down what pip is asked for; everything else is Python's.
STUB = """#!/bin/sh
if [ "$1" != -m ]; then exec {python} "$@"; fi
echo "call $*" >>{log}
for argument; do case $argument in */*.txt) cat "$argument" >>{log} ;; esac; done
"""


def project() -> dict[str, list[str]]:
    """Requirements of pyproject.toml: the ordinary ones under '', extras under their names."""
    table = tomllib.loads(PYPROJECT.read_text())["project"]
    return {"": table["dependencies"], **table["optional-dependencies"]}


def asked_of_pip(tmp_path: Path, variant: str) -> tuple[int, list[list[str]]]:
    """Exit status, and for each call of pip its arguments and then the requirements."""
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, log=log))
    stub.chmod(0o755)
    done = subprocess.run(
        [INSTALL, variant, PYPROJECT],
        env={**os.environ, "PYTHON": str(stub)},
        capture_output=True,
        timeout=60,
    )
    calls = log.read_text().split("call ")[1:] if log.exists() else []
    return done.returncode, [call.splitlines() for call in calls]


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_image_gets_what_pyproject_asks_for_and_nothing_else(tmp_path: Path, variant: str):
    status, (torch, others, check) = asked_of_pip(tmp_path, variant)
    assert status == 0 and check == ["-m pip check"]
    requirements = project()
    wanted = requirements[""] + requirements["demo"] + requirements["server"]
    assert sorted(torch[1:] + others[1:]) == sorted(wanted)
    assert [re.split(r"\W", line)[0] for line in torch[1:]] == ["torch", "torchvision"]
    assert ("--index-url https://download.pytorch.org/whl/cpu" in torch[0]) == (variant == "cpu")
    assert "--index-url" not in others[0], "others are not in the index of CPU builds"
    assert all("--only-binary=:all:" in call[0] for call in (torch, others))


def test_an_unknown_variant_installs_nothing(tmp_path: Path):
    assert asked_of_pip(tmp_path, "rocm") == (2, [])


def test_the_dockerfile_runs_this_script_and_no_other_installer():
    text = (REPO_ROOT / "docker" / "Dockerfile").read_text()
    assert 'RUN ./install.sh "${VARIANT}" pyproject.toml' in text
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in commands if re.search(r"\b(pip|apt-get|curl) ", line)]


@pytest.fixture
def image_python(tmp_path: Path) -> Iterator[Path]:
    """Python of a fresh environment, made as the image makes its own; gigabytes, so removed."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
    # The index of CPU builds is a host of its own and need not be reachable from where tests run;
    # the variants differ in that only (see above).
    done = subprocess.run(
        [INSTALL, "cuda", PYPROJECT],
        env={**os.environ, "PYTHON": str(venv / "bin" / "python"), "PIP_NO_CACHE_DIR": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    yield venv / "bin" / "python"
    shutil.rmtree(venv)


# Two minutes for the environment, which has 5 GB of CUDA in it, and half a minute for the run.
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_the_environment_of_the_image_runs_the_debug_recipe_from_uninstalled_code(
    image_python: Path, image_folder: Path, tmp_path: Path
):
    def run(*arguments: str | Path) -> tuple[str, str]:
        done = subprocess.run(
            [image_python, *arguments], cwd=REPO_ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout, done.stderr

    listed = json.loads(run("-m", "pip", "list", "--format=json")[0])
    installed = {distribution["name"].lower() for distribution in listed}
    assert "itpn-ray" not in installed and "pytest" not in installed
    # What the MLflow server of compose.yaml loads: PostgreSQL, S3, passwords.
    run("-c", "import boto3, flask_wtf, psycopg2")
    output = "".join(
        run(
            *("jobs/pretrain.py", "debug", "--data.path", image_folder, "--optim.num-steps", "5"),
            *("--run.storage-path", tmp_path / "runs", "--run.name", "image"),
        )
    )
    assert f"models from {REPO_ROOT}/models" in output
    summary = json.loads((tmp_path / "runs" / "image" / "summary.json").read_text())
    assert summary["steps"] == 5
