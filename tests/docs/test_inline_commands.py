"""Commands inside sentences and tables: they exist, take what they are given, and run.

Tests are run by the suite itself. Benchmarks take minutes as they are written; with the settings
below they take seconds, and do the same.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT
from tests.docs.markdown import PAGES

INLINE = re.compile(r"`((?:python|pytest|pip install) [^`]+)`")
COMMANDS = sorted({found for page in PAGES for found in INLINE.findall(page.read_text())})
BENCHMARKS = [shlex.split(c) for c in COMMANDS if c.startswith("python benchmarks/")]
SMALLER = {
    "bench_checkpoint.py": ["--rounds", "1", "--window", "2"],
    "bench_data.py": ["--rounds", "1", "--num-images", "128"],
    "bench_executor_rest.py": [],
    "bench_interruptions.py": ["--rounds", "1", "--warmup-seconds", "1"],
    "bench_model.py": ["--model", "itpn_debug", "--rounds", "1", "--modes", "reference", "eager"],
    "bench_process_memory.py": ["--model", "itpn_debug", "--rounds", "1"],
    "bench_pretrain.py": ["--rounds", "1", "--short-runs", "1", "--warmup-seconds", "1"],
    "bench_token_reduction.py": ["--img-size", "224", "--rounds", "1"],
    "chaos.py": ["--kills", "1"],
    "scaling_model.py": [],
}
"""otsu_baseline.py needs the tiles of docs/experiments.md, where it is run on them."""


OF_WHOLE_RUNS = {
    "bench_data.py",
    "bench_executor_rest.py",
    "bench_interruptions.py",
    "bench_pretrain.py",
    "chaos.py",
}


class ParsedError(Exception):
    """Ends a script once it has parsed its arguments."""


def test_there_are_inline_commands() -> None:
    assert len(COMMANDS) > 20 and len(BENCHMARKS) > 6


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pytest ")])
def test_tests_that_are_named_exist(command: str) -> None:
    path, *options = shlex.split(command)[1:]
    files = [REPO_ROOT / path] if path.endswith(".py") else list((REPO_ROOT / path).rglob("*.py"))
    assert files and all(file.exists() for file in files)
    if options:
        assert options == ["-m", "faults"], command
        assert any("pytest.mark.faults" in file.read_text() for file in files), command


@pytest.mark.parametrize("command", BENCHMARKS, ids=shlex.join)
def test_benchmarks_take_their_arguments(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: object) -> None:
        parse(self, *given)  # type: ignore[arg-type]
        raise ParsedError

    script = REPO_ROOT / command[1]
    if "argparse" not in script.read_text():
        assert len(command) == 2, f"{command[1]} takes no arguments"
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", command[1:])
    monkeypatch.syspath_prepend(str(script.parent))  # as Python does for a script
    with pytest.raises(ParsedError):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m ")])
def test_jobs_that_are_named_exist(command: str) -> None:
    module = shlex.split(command)[2]
    source = ast.parse((REPO_ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in source.body)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip install")])
def test_extras_that_are_named_exist(command: str) -> None:
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\[([\w,]+)\]", command)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=[pytest.mark.long] if s in OF_WHOLE_RUNS else []) for s in SMALLER],
)
def test_benchmarks_run(script: str, tmp_path: Path) -> None:
    if script == "bench_interruptions.py" and os.geteuid() != 0:
        pytest.skip("only root may take niceness off a process")
    (command,) = [c for c in BENCHMARKS if Path(c[1]).name == script][:1]
    smaller = [*command[2:], *SMALLER[script]]
    path = str(REPO_ROOT / "benchmarks" / script)
    done = subprocess.run(
        [sys.executable, path, *smaller], cwd=tmp_path, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_benchmark_that_is_named_is_run() -> None:
    named = {Path(command[1]).name for command in BENCHMARKS}
    assert named - {"otsu_baseline.py"} == set(SMALLER)
