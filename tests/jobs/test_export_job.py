"""`python -m jobs.export`: exit status and what a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import export
from pipeline.exports.exportable import ExportFailedError
from tests.jobs.test_inference_jobs import run_main
from tests.pipeline.inference_runs import pretrained_run


def test_the_last_lines_say_what_was_checked_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    run, _ = pretrained_run(tmp_path / "run")
    to = tmp_path / "out"
    assert run_main(monkeypatch, export, str(run), "--to", str(to), "--licence", "MIT") == 0
    assert "safetensors encoder, read back bit for bit" in caplog.text
    assert f"in {to}, described in {to / 'README.md'}" in caplog.text
    assert "| Licence of the weights | MIT |" in (to / "README.md").read_text()
    caplog.clear()
    assert run_main(monkeypatch, export, str(run), "--to", str(to)) == 1
    assert "holds an earlier export" in caplog.text and "Traceback" not in caplog.text
    assert run_main(monkeypatch, export, str(run), "--to", str(to), "--overwrite") == 0


def test_a_run_or_a_setting_that_is_wrong_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    to = tmp_path / "out"
    assert run_main(monkeypatch, export, str(tmp_path / "none"), "--to", str(to)) == 1
    assert "none' does not exist" in caplog.text and not to.exists()
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, export, "run", "--to", str(to), "--part", "neck")
    assert "neck" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ExportFailedError("logits differ"), 1, "error: logits differ"),
        (KeyboardInterrupt(), 130, "nothing was written"),
    ],
)
def test_failures_and_interruptions_have_their_exit_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr("jobs.export.export", fail)
    assert run_main(monkeypatch, export, "run", "--to", "out") == status
    assert text in caplog.text
