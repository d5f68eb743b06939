"""`python -m jobs.evaluate`: exit status and what a user reads."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest

from jobs import evaluate
from tests.pipeline.inference_runs import finetuned_run, pretrained_run
from tests.pipeline.labelled_sets import write_labelled_set


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    return evaluate.main()


def test_the_command_prints_every_figure_and_exits_with_0(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    run = finetuned_run(tmp_path / "run", "classify")
    data = write_labelled_set(tmp_path / "val", "classify", num_samples=7)
    arguments = (str(run), "--data", str(data), "--out", str(tmp_path))
    assert run_main(monkeypatch, *arguments) == 0
    metrics = json.loads((tmp_path / "scores.json").read_text())
    assert metrics["val/num_samples"] == 7
    text = "\n".join(record.getMessage() for record in caplog.records)
    for key, value in metrics.items():
        assert re.search(rf"^{key.removeprefix('val/')} +{value:.3f}$", text, re.M), key


def test_the_command_exits_with_1_and_one_line_when_it_cannot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretrained, _ = pretrained_run(tmp_path / "pretrained")
    finetuned = finetuned_run(tmp_path / "finetuned", "classify")
    for run, message in (
        (tmp_path / "nowhere", "error: run .* does not exist"),
        (pretrained, "error: .* knows no classes: give labelled sets"),
        (finetuned, "error: data='val' does not exist"),
    ):
        caplog.clear()
        assert run_main(monkeypatch, str(run)) == 1
        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert re.match(message, record.getMessage()) and record.exc_info is None
    assert "Traceback" not in "".join(capsys.readouterr())
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, "run", "--knn-k", "0")
    assert "knn_k=0 must be greater than 0" in " ".join(capsys.readouterr().err.split())
