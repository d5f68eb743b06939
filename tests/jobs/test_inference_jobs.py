"""`python -m jobs.predict` and `python -m jobs.embed`: exit status and what a user reads."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jobs import embed, predict
from pipeline.batch_inference import Inferred
from pipeline.quarantine import BadSample


def run_main(monkeypatch: pytest.MonkeyPatch, job: ModuleType, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        status: int = job.main()
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    return status


@pytest.mark.parametrize("job", [predict, embed], ids=["predict", "embed"])
def test_a_run_or_a_setting_that_is_wrong_is_named(
    job: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    paths = [str(tmp_path / "none"), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run_main(monkeypatch, job, *paths) == 1
    assert "error: " in caplog.text and str(tmp_path / "none") in caplog.text
    assert "Traceback" not in caplog.text and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, job, *paths, "--batch-size", "0")
    assert "batch_size=0 must be greater than 0" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["predict", "embed"])
def test_the_last_lines_say_what_was_written_and_what_was_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    inferred = Inferred(
        out="/out",
        kind="rows",
        num_rows=7,
        num_pictures=2,
        bad=[BadSample("x.jpg", None, "OSError", "truncated")],
        wall_s=3.0,
    )
    monkeypatch.setattr(f"jobs.{name}.{name}", lambda config: inferred)
    job = {"predict": predict, "embed": embed}[name]
    assert run_main(monkeypatch, job, "run", "--images", "in", "--out", "/out") == 0
    assert "7 rows in /out, in 3 s" in caplog.text and "2 pictures in" in caplog.text
    assert "_quarantine.parquet: 1" in caplog.text and "x.jpg: OSError: truncated" in caplog.text


@pytest.mark.parametrize("name", ["predict", "embed"])
def test_interrupting_exits_with_130(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"jobs.{name}.{name}", interrupt)
    job = {"predict": predict, "embed": embed}[name]
    assert run_main(monkeypatch, job, "run", "--images", "in", "--out", "out") == 130
    assert "unfinished" in caplog.text
