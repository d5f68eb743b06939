"""`python -m jobs.demo_finetune`: its exit status and last line, without its runs."""

from __future__ import annotations

import logging
import sys

import pytest

from jobs.demo_finetune import main
from pipeline.trainer import RunFailedError


def run_main(monkeypatch: pytest.MonkeyPatch, raised: BaseException | None) -> int:
    def run() -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr("jobs.demo_finetune.run_demo_finetune", run)
    monkeypatch.setattr(sys, "argv", ["jobs/demo_finetune.py"])
    return main()


def test_a_demo_that_ends_well_has_status_0_and_says_which_code_ran(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    assert run_main(monkeypatch, None) == 0
    assert caplog.records[0].getMessage().startswith("models from ")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ModuleNotFoundError("skimage is missing: pip install -e '.[demo]'"), 1, "'.[demo]'"),
        (RunFailedError("run 'demo-detect-scratch' failed"), 1, "error: run 'demo-detect-scr"),
        (ValueError("'demo' was started with another configuration"), 1, "error: 'demo' was"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "what is finished is kept, the same command goes on"),
    ],
    ids=["no extra", "failed", "other settings", "full disk", "interrupted"],
)
def test_what_stops_the_demo_is_one_line_and_the_status(
    raised: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    assert run_main(monkeypatch, raised) == status
    (error,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert said in error.getMessage()
    assert error.exc_info is None and "Traceback" not in caplog.text
