"""Runs side by side: what they were told differently, and what came of it; from their folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from pipeline.metrics_file import read_records
from pipeline.run_folder import CONFIG_FILE
from pipeline.sweeps.report import shown

_SELDOM_TOLD = ("run.name", "run.storage_path", "tracking.parent_run_id", "tracking.varied")
_RATIOS = tuple(f"val/{part}_loss_over_baseline" for part in ("mim", "mfm", "main", "auxiliary"))
_MAIN = {"classify": "val/top1", "detect": "val/box_ap", "segment": "val/miou"}
_ABSENT = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Which runs, and what of them."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs; of a sweep's folder, all its trials."""
    metrics: tuple[str, ...] = ()
    """Names of metrics, such as val/top5; none: the main ones of each kind of run."""
    out: str = ""
    """CSV file to write as well."""


@dataclass(frozen=True)
class RunRow:
    """What the folder of a run says."""

    name: str
    status: str
    step: int
    metrics: dict[str, float]
    """Last value of every metric."""
    settings: dict[str, Any]
    """Dotted keys."""


def read_run(folder: Path) -> RunRow:
    """The row of a run, finished or not.

    Raises:
        FileNotFoundError: no run there.
    """
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise FileNotFoundError(
            f"no run at {folder}: it holds no {CONFIG_FILE}; give <run.storage_path>/<run.name>"
        )
    sections = json.loads(config_file.read_text())
    state = folder / "state.json"
    status = json.loads(state.read_text()).get("status", "") if state.is_file() else ""
    metrics: dict[str, float] = {}
    for record in read_records(folder / "metrics.jsonl"):
        metrics |= record
    step = int(metrics.pop("step", 0))
    metrics.pop("time", None)
    settings = {
        f"{s}.{key}": value for s, values in sections.items() for key, value in values.items()
    }
    return RunRow(str(folder), status, step, metrics, settings)


def run_folders(paths: Sequence[str]) -> list[Path]:
    """Folders of runs; a sweep's stands for its trials.

    Raises:
        ValueError: none is given, or a sweep without trials.
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        if not (path / "sweep.json").is_file():
            folders.append(path)
            continue
        trials = sorted(file.parent for file in path.glob(f"trial_*/{CONFIG_FILE}"))
        if not trials:
            raise ValueError(f"{path} is a sweep none of whose trials has begun")
        folders += trials
    if not folders:
        raise ValueError("no runs to compare; give the folders of some")
    return folders


def differing(rows: Sequence[RunRow]) -> list[str]:
    """Settings that are not the same in all runs."""
    keys = dict.fromkeys(key for row in rows for key in row.settings if key not in _SELDOM_TOLD)
    told = {key: {json.dumps(row.settings.get(key)) for row in rows} for key in keys}
    return [key for key, values in told.items() if len(values) > 1]


def main_metrics(rows: Sequence[RunRow]) -> tuple[str, ...]:
    """The main metrics of the kinds of runs there are."""
    known = (*_MAIN.values(), *_RATIOS)
    return tuple(name for name in known if any(name in row.metrics for row in rows))


def compare_runs(config: CompareConfig) -> Table:
    """A line a run: status, steps, metrics, and the settings that are not the same in all.

    Raises:
        ValueError: nothing to compare.
        FileNotFoundError: a folder without a run.
    """
    rows = [read_run(folder) for folder in run_folders(config.runs)]
    metrics, keys = config.metrics or main_metrics(rows), differing(rows)
    if config.out:
        write_csv(Path(config.out), rows, metrics, keys)
    table = Table("run", "status", "steps", *(name.removeprefix("val/") for name in metrics))
    table.add_column("differs in", no_wrap=True)
    for row in rows:
        values = (f"{row.metrics[m]:.3f}" if m in row.metrics else _ABSENT for m in metrics)
        settings = (f"{key} {shown(row.settings.get(key, _ABSENT))}" for key in keys)
        table.add_row(row.name, row.status, str(row.step), *values, "\n".join(settings))
    return table


def write_csv(
    path: Path, rows: Sequence[RunRow], metrics: Sequence[str], keys: Sequence[str]
) -> None:
    """A line a run, a column a metric and a setting."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "status", "step", *metrics, *keys])
        for row in rows:
            values = [row.metrics.get(name) for name in metrics]
            settings = [row.settings.get(key) for key in keys]
            writer.writerow([row.name, row.status, row.step, *values, *settings])
