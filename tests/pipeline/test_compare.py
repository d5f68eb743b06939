"""Runs side by side."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.compare import CompareConfig, compare_runs, differing, read_run, run_folders
from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.finetune_recipes import small_classify


def write_run(
    folder: Path, *, top1: float | None, status: str = "FINISHED", **settings: Any
) -> str:
    folder.mkdir(parents=True)
    config = apply_overrides(
        small_classify(), {"run.name": folder.name, "init.path": "scratch", **settings}
    )
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    (folder / "state.json").write_text(json.dumps({"status": status}))
    if top1 is not None:
        lines = [{"step": 5, "time": 1.0, "val/top1": 1.0, "val/top5": 9.0}]
        lines += [{"step": 10, "time": 2.0, "val/top1": top1}, {"step": 12, "time": 3.0, "x": 0.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(folder)


def shown(config: CompareConfig) -> list[str]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(compare_runs(config))
    return capture.get().splitlines()


def test_a_table_has_what_differs_and_the_main_metric(tmp_path: Path):
    runs = (
        write_run(tmp_path / "one", top1=40.0, **{"optim.lr": 1e-3}),
        write_run(tmp_path / "two", top1=50.0, **{"optim.lr": 2e-3}),
        write_run(tmp_path / "three", top1=None, status="RUNNING", **{"optim.lr": 2e-3}),
    )
    lines = shown(CompareConfig(runs=runs))
    (one,) = [line for line in lines if "/one" in line]
    assert all(text in one for text in ("FINISHED", "12", "40.000", "optim.lr 0.001"))
    (three,) = [line for line in lines if "/three" in line]
    assert "RUNNING" in three and "40" not in three
    assert "layer_decay" not in "".join(lines)


def test_a_sweep_stands_for_its_trials_and_metrics_can_be_chosen(tmp_path: Path):
    for number in range(2):
        write_run(tmp_path / f"trial_000{number}", top1=10.0 * number, **{"run.seed": number})
    (tmp_path / "sweep.json").write_text("{}")
    out = tmp_path / "compared.csv"
    config = CompareConfig(runs=(str(tmp_path),), metrics=("val/top5", "none"), out=str(out))
    assert "top5" in "".join(shown(config))
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run.seed"] for row in rows] == ["0", "1"]
    assert [(row["val/top5"], row["none"]) for row in rows] == [("9.0", "")] * 2


def test_a_setting_only_one_run_knows_is_a_difference(tmp_path: Path):
    runs = [write_run(tmp_path / name, top1=1.0) for name in ("a", "b")]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["optim"]["lr"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert differing([read_run(Path(run)) for run in runs]) == ["optim.lr"]


def test_what_is_no_run_is_said(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no run at"):
        compare_runs(CompareConfig(runs=(str(tmp_path / "nothing"),)))
    with pytest.raises(ValueError, match="no runs to compare"):
        run_folders([])
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="none of whose trials has begun"):
        run_folders([str(tmp_path)])
