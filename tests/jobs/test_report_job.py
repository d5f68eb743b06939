"""`python -m jobs.report` as a user runs it: what it writes, prints and returns."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.report import main
from tests.conftest import REPO_ROOT
from tests.pipeline.reported_runs import write_finetuned_run, write_run


def test_command_writes_the_page_of_every_run_and_prints_where(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "my-run"), write_finetuned_run(tmp_path / "my-classes")]
    command = [sys.executable, "-m", "jobs.report", *map(str, runs)]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = [run / "report.html" for run in runs]
    assert done.stdout.splitlines() == [str(page) for page in pages]
    assert all("</html>" in page.read_text() for page in pages)


def test_a_folder_without_a_run_is_one_line_and_status_1_and_the_others_are_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "my-run")
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["jobs/report.py", str(nowhere), str(run)])
    assert main() == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage().startswith(f"error: {nowhere} is no run folder")
    assert (run / "report.html").exists() and not nowhere.exists()


def test_no_run_at_all_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/report.py"])
    assert main() == 1
    assert "give one or more folders" in caplog.text
