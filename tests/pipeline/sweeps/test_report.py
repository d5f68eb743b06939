"""What a sweep came to, read from the folders of its trials."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest
import tyro
from rich.console import Console

from pipeline.config_values import apply_overrides
from pipeline.finetune_config import ClassifyConfig
from pipeline.finetune_recipes import small_classify
from pipeline.sweeps.report import (
    TrialRow,
    as_markdown,
    command_of,
    last_lines,
    ranked,
    read_row,
    sweep_summary,
    trials_table,
    write_tables,
)
from pipeline.sweeps.trials import Ending

METRIC = "val/top1"


def write_run(folder: Path, values: list[float], **state: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, METRIC: value} for i, value in enumerate(values, 1)]
    lines.insert(1, {"step": 15, "train/loss": 0.1})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "state.json").write_text(json.dumps({"mlflow_run_id": "abc", **state}))
    events = [{"event": "submit", "time": 5.0}, {"event": "end", "time": 12.0}]
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return folder


def row(name: str, outcome: Any, value: float | None, step: int = 90, reason: str = "") -> TrialRow:
    return TrialRow(name, {"optim.lr": 0.00123}, outcome, step, 90, value, 3600.0, "id", reason)


ROWS = [
    row("trial_0000", "stopped early", 80.0, step=10),
    row("trial_0001", "finished", 50.0),
    row("trial_0002", "failed", None, step=0, reason="loss is nan"),
    row("trial_0003", "finished", 60.0),
    row("trial_0004", "stopped early", 20.0, step=30),
]


def test_a_row_is_what_the_run_left(tmp_path: Path):
    folder = write_run(tmp_path / "trial_0003", [10.0, 40.0])
    ending = Ending("finished", "")
    assert read_row(folder, {"optim.lr": 1e-3}, METRIC, 20, ending) == TrialRow(
        name="trial_0003",
        overrides={"optim.lr": 1e-3},
        outcome="finished",
        step=20,
        num_steps=20,
        value=40.0,
        wall_s=7.0,
        mlflow_run_id="abc",
        curve=((10, 10.0), (20, 40.0)),
    )


def test_a_run_that_is_not_over_is_unfinished_and_one_that_failed_says_why(tmp_path: Path):
    folder = write_run(tmp_path / "t", [10.0])
    assert read_row(folder, {}, METRIC, 20).outcome == "unfinished"
    failed = read_row(folder, {}, METRIC, 20, Ending("failed", "loss is nan"))
    assert (failed.outcome, failed.reason) == ("failed", "loss is nan")


def test_a_trial_that_never_began_has_a_row(tmp_path: Path):
    got = read_row(tmp_path / "trial_0009", {}, METRIC, 20)
    assert (got.outcome, got.step, got.value, got.wall_s) == ("unfinished", 0, None, 0.0)


def test_the_best_finished_trial_is_first_and_a_stopped_one_never_beats_it():
    assert [r.name[-1] for r in ranked(ROWS)] == ["3", "1", "4", "0", "2"]


def test_the_summary_counts_outcomes_and_what_stopping_saved():
    summary = sweep_summary(ROWS, "the command")
    assert summary == {
        "num_trials": 5,
        "num_finished": 2,
        "num_stopped_early": 2,
        "num_failed": 1,
        "best_trial": "trial_0003",
        "best_metric": 60.0,
        "best_command": "the command",
        "trial_hours": 5.0,
        "steps_saved": 140,
        "hours_saved": pytest.approx(8.0 + 2.0),  # an hour for 10 of 90 steps, for 30 of 90
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "none of 0 trials"), ([ROWS[2], ROWS[0]], "none of 2 trials finished: loss is nan")],
)
def test_a_sweep_without_a_finished_trial_is_an_error_with_the_reasons(
    rows: list[TrialRow], said: str
):
    with pytest.raises(ValueError, match=said):
        sweep_summary(rows, "")


def test_the_table_ranks_the_finished_and_links_to_mlflow():
    console = Console(width=160)
    with console.capture() as capture:
        console.print(trials_table(ROWS, METRIC, {"id": "http://server/runs/id"}))
    lines = capture.get().splitlines()
    (best,) = [line for line in lines if "trial_0003" in line]
    assert [word for word in best.split() if word.isascii()] == [
        *("1", "trial_0003", "finished", "60.00", "90/90", "optim.lr", "0.00123"),
        "http://server/runs/id",
    ]


def test_the_last_lines_say_why_trials_failed_and_how_to_get_the_best_again():
    lines = last_lines(ROWS, sweep_summary(ROWS, "python -m this")).splitlines()
    assert lines[0] == "trial_0002 failed: loss is nan"
    assert "2 finished, 2 stopped early, 1 failed" in lines[1]
    assert "saved 140 steps, about 10.00 trial-hours" in lines[1]
    assert lines[-1] == "python -m this"


def test_a_description_has_the_best_first_and_its_command():
    text = as_markdown(ROWS, METRIC, {"best_command": "python -m this"})
    lines = text.splitlines()
    assert lines[0] == "| trial | outcome | top1 | steps | optim.lr |"
    assert lines[2] == "| trial_0003 | finished | 60.00 | 90/90 | 0.00123 |"
    assert len({line.count("|") for line in lines[:7]}) == 1
    assert lines[-2] == "python -m this"


def test_tables_hold_every_trial_with_a_column_for_each_setting(tmp_path: Path):
    rows = [row("trial_0000", "failed", None, reason="a, b"), row("trial_0001", "finished", 5.0)]
    rows[1].overrides["data.crop_scale"] = [0.5, 1.0]
    write_tables(tmp_path, rows)
    for table in (
        pyarrow.csv.read_csv(tmp_path / "trials.csv"),
        pyarrow.parquet.read_table(tmp_path / "trials.parquet"),
    ):
        assert table["name"].to_pylist() == ["trial_0000", "trial_0001"]
        assert table["value"].to_pylist() == [None, 5.0]
        assert table["reason"].to_pylist()[0] == "a, b"
        assert table["optim.lr"].to_pylist() == [0.00123, 0.00123]
        assert table["data.crop_scale"].to_pylist()[1] == "[0.5, 1.0]"


def test_the_command_of_a_run_makes_that_run():
    recipe = small_classify()
    changes = {
        "init.path": "runs/my demo",
        "optim.lr": 0.0012345678901234567,
        "data.crop_scale": (0.7, 1.0),
        "data.num_cpus": 0,
        "init.neck": False,
        "optim.num_steps": None,
        "optim.num_epochs": 2.0,
        "run.name": "trial_0003",
    }
    config = apply_overrides(recipe, changes)
    command = command_of(config, recipe, "python -m jobs.finetune classify small-classify")
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "jobs.finetune", "classify", "small-classify"]
    again = tyro.cli(ClassifyConfig, default=recipe, args=words[5:])
    assert again == config
