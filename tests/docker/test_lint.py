"""Every file of docker/ passes a linter of its kind, and each linter finds a planted mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO_ROOT
from tests.docker.linters import DOCKER, lint

SHELL = sorted([DOCKER / "install.sh", *DOCKER.rglob("*.sbatch"), REPO_ROOT / ".ci" / "run"])
YAML = sorted(path for path in DOCKER.rglob("*") if path.suffix in (".yaml", ".yml"))
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
HADOLINT = ("hadolint", "--no-color")
SHELLCHECK = ("shellcheck", "--enable=quote-safe-variables")
YAMLLINT = ("yamllint", "--strict", "--config-file", ".yamllint.yaml")
COMPOSE_SCHEMA = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
# Python is linted by `make lint`; .md, .example and .ini are held by test_consistency.py, the
# dashboard by tests of its own.
OTHERS = {".py", ".md", ".ini", ".example", ".json"}


def test_no_file_of_docker_goes_unlinted():
    linted = {*SHELL, *YAML, DOCKER / "Dockerfile"}
    files = [f for f in DOCKER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert not [f for f in files if f not in linted and f.suffix not in OTHERS and f.name != ".env"]


@pytest.mark.parametrize(
    "command",
    [
        (*HADOLINT, DOCKER / "Dockerfile"),
        (*SHELLCHECK, *SHELL),
        (*YAMLLINT, *YAML),
        (*COMPOSE_SCHEMA, *COMPOSE),
    ],
    ids=lambda command: command[0],
)
def test_the_linter_finds_nothing(command: tuple[str | Path, ...]):
    status, output = lint(*command)
    assert status == 0, output


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM python:3.12.12-slim-trixie", "FROM python:latest", "DL3007"),
        ("FROM python:3.12.12-slim-trixie", "FROM python", "DL3006"),
        ("USER 1000", "USER root", "DL3002"),
        ('CMD ["ray", "start"', 'CMD ray start", "', "DL3025"),
        ("WORKDIR /home/ray", "WORKDIR home", "DL3000"),
        ('RUN ./install.sh "${VARIANT}" pyproject.toml', "RUN apt-get install git", "DL3015"),
        ("HEALTHCHECK --interval=15s", "HEALTHCHECKS --interval=15s", "missing whitespace"),
    ],
)
def test_hadolint_finds_a_planted_mistake(tmp_path: Path, old: str, new: str, rule: str):
    text = (DOCKER / "Dockerfile").read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    status, output = lint(*HADOLINT, tmp_path / "Dockerfile")
    assert status == 1 and rule in output, output


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("planted", "rule"),
    [("rm -rf $1/*", "SC2086"), ("if true; then echo", "SC1046"), ("cd /tmp", "SC2164")],
)
def test_shellcheck_finds_a_planted_mistake(tmp_path: Path, script: Path, planted: str, rule: str):
    # Without `set -e` before it, so that an unchecked cd is a mistake.
    first, rest = script.read_text().split("\n", 1)
    (tmp_path / script.name).write_text(f"{first}\n{planted}\n{rest.replace('set -e', 'set -')}")
    status, output = lint(*SHELLCHECK, tmp_path / script.name)
    assert status == 1 and rule in output, output


@pytest.mark.parametrize(
    ("planted", "rule"),
    [("a: 1\na: 2\n", "key-duplicates"), ("a: yes\n", "truthy"), ("a:\n   - b\n  - c\n", "syntax")],
)
def test_yamllint_finds_a_planted_mistake(tmp_path: Path, planted: str, rule: str):
    (tmp_path / "planted.yaml").write_text(planted)
    status, output = lint(*YAMLLINT, tmp_path / "planted.yaml")
    assert status != 0 and rule in output, output


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("services", "mlflow", "port"), ["5000:5000"], "'port' was unexpected"),
        (("services", "mlflow", "depends_on", "s3"), {}, "'condition' is a required property"),
        (("services", "s3", "healthcheck", "retries"), {"count": 3}, "is not of type"),
        (("secrets", "ray_token", "env"), "X", "$.secrets.ray_token: 'env' does not match"),
        (("volume",), {}, "$: 'volume' does not match"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_the_compose_schema_finds_a_planted_mistake(
    tmp_path: Path, place: tuple[str, ...], value: object, message: str
):
    document = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    target = document
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(document))
    status, output = lint(*COMPOSE_SCHEMA, tmp_path / "compose.yaml")
    assert status == 1 and message in output, output
