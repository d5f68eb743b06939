"""`python -m jobs.replay` as a user runs it: what it prints and returns."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.replay import main
from pipeline.nonfinite import NonFiniteLossError
from tests.conftest import REPO_ROOT
from tests.pipeline.loop import LocalRun
from tests.pipeline.overflows import overflowing_config, write_dump, write_images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """The dump of a run that met an overflowing image and was to skip none."""
    write_images(tmp_path / "images", (7,))
    config = overflowing_config(tmp_path / "images", optim__max_skipped_steps=0)
    run = LocalRun(config, tmp_path / "checkpoints")
    with pytest.raises(NonFiniteLossError):
        run()
    return write_dump(config, run.dump)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/replay.py", *arguments])
    return main()


def test_command_prints_the_step_and_the_sample_at_fault(dump: Path) -> None:
    command = [sys.executable, "-m", "jobs.replay", str(dump)]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    step, sample = done.stdout.splitlines()
    number = int(dump.name.removeprefix("step_")) + 1
    assert step.startswith(f"step {number}: loss ") and "nan" in step
    images = dump.parents[3] / "images"
    assert sample == f"  not finite because of {images}/07.png"


def test_wrong_folder_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert run_main(monkeypatch, str(tmp_path / "nowhere")) == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    message = record.getMessage()
    assert message.startswith(f"error: '{tmp_path / 'nowhere'}' is no dump of a run; give a folder")
    assert record.exc_info is None and "\n" not in message


@pytest.mark.parametrize("loss", ["state.pt", "manifest.json", "config.json", "images"])
def test_whatever_is_missing_or_damaged_is_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dump: Path,
    tmp_path: Path,
    loss: str,
) -> None:
    match loss:
        case "images":
            (tmp_path / "images").rename(tmp_path / "moved")
        case "config.json":
            (dump.parents[1] / loss).write_text("{")
        case _:
            (dump / loss).write_bytes(b"")
    assert run_main(monkeypatch, str(dump)) == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert loss in record.getMessage() and record.exc_info is None


@pytest.mark.parametrize(("arguments", "status"), [((), 2), (("a", "b"), 2), (("--help",), 0)])
def test_wrong_command_line_exits_with_2_and_help_with_0(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    status: int,
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_main(monkeypatch, *arguments)
    assert exit_info.value.code == status
    if status == 0:
        assert "Compute the steps of a run again" in capsys.readouterr().out
