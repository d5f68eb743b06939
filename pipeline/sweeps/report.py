"""What a sweep came to: its table, its best command line, its summary; read from the folders alone.

Nothing here asks Ray or MLflow: the report can be made again at any time, from what trials left.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.table import Table

from pipeline.config import TrainingConfig
from pipeline.config_values import flatten_config
from pipeline.logbook import Logbook, fault_metrics
from pipeline.metrics_file import read_records
from pipeline.sweeps.trials import UNFINISHED, Ending, Outcome

_FACTS = ("name", "outcome", "reason", "value", "step", "num_steps", "wall_s", "mlflow_run_id")
_NOT_RESULTS = ("run.name", "tracking.parent_run_id", "tracking.varied")


@dataclass(frozen=True)
class TrialRow:
    """A trial as the table has it."""

    name: str
    overrides: dict[str, Any]
    outcome: Outcome
    step: int
    """Of the last evaluation; 0 without one."""
    num_steps: int
    value: float | None
    """Main metric at that step."""
    wall_s: float
    mlflow_run_id: str
    reason: str = ""
    """Of a failure."""
    curve: tuple[tuple[int, float], ...] = ()
    """Step and main metric of every evaluation."""

    @property
    def hours_saved(self) -> float:
        """What its remaining steps would have taken at its own pace, if it was given up."""
        if self.outcome != "stopped early" or not self.step:
            return 0.0
        return self.wall_s / 3600 * (self.num_steps / self.step - 1)


def read_row(
    folder: Path,
    overrides: dict[str, Any],
    metric: str,
    num_steps: int,
    ending: Ending = UNFINISHED,
) -> TrialRow:
    """The row of the trial whose run lies in `folder`."""
    state = _json(folder / "state.json")
    records = [r for r in read_records(folder / "metrics.jsonl") if metric in r]
    curve = tuple((int(r["step"]), float(r[metric])) for r in records)
    step, value = curve[-1] if curve else (0, None)
    return TrialRow(
        name=folder.name,
        overrides=overrides,
        outcome=ending.outcome,
        step=step,
        num_steps=num_steps,
        value=value,
        wall_s=fault_metrics(Logbook(folder / "events.jsonl").read())["fault/wall_s"],
        mlflow_run_id=state.get("mlflow_run_id", ""),
        reason=ending.reason,
        curve=curve,
    )


def ranked(rows: list[TrialRow]) -> list[TrialRow]:
    """Finished trials by their metric, best first; then the others, the furthest first."""

    def place(row: TrialRow) -> tuple[bool, float, float, str]:
        value = float("inf") if row.value is None else -row.value
        is_finished = row.outcome == "finished"
        return (not is_finished, 0 if is_finished else -row.step / row.num_steps, value, row.name)

    return sorted(rows, key=place)


def trials_table(rows: list[TrialRow], metric: str, links: dict[str, str] | None = None) -> Table:
    """Rank, trial, outcome, metric, share of its steps, what differs, MLflow run.

    Args:
        rows: the trials.
        metric: name of the main one.
        links: MLflow run id -> address of its page, where a server has one.
    """
    table = Table("rank", "trial", "outcome", metric.removeprefix("val/"), "steps")
    table.add_column("differs in", no_wrap=True)
    table.add_column("MLflow run", overflow="fold")
    for rank, row in enumerate(ranked(rows), 1):
        table.add_row(
            str(rank) if row.outcome == "finished" else "",
            row.name,
            row.outcome,
            "" if row.value is None else f"{row.value:.2f}",
            f"{row.step}/{row.num_steps}",
            "\n".join(f"{key} {shown(value)}" for key, value in row.overrides.items()),
            (links or {}).get(row.mlflow_run_id, row.mlflow_run_id[:8]),
        )
    return table


def command_of(config: TrainingConfig, recipe: TrainingConfig, start: str) -> str:
    """The command line of a run: `start`, and every setting that differs from its recipe.

    Args:
        config: the run.
        recipe: the recipe as it is.
        start: for example "python -m jobs.finetune classify small-classify".
    """
    name = shlex.quote(config.run.name)
    defaults, flags = flatten_config(recipe), [f"--run.name {name}"]
    for key, value in flatten_config(config).items():
        if key not in _NOT_RESULTS and value != defaults[key]:
            flags.append(flag(key, value))
    return " ".join([start, *flags])


def flag(key: str, value: Any) -> str:
    """A setting as the command line takes it."""
    if key == "init.path":
        return f"--init {shlex.quote(str(value))}"
    section, name = key.split(".", 1)
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{section}.{name}" if value else f"--{section}.no-{name}"
    if isinstance(value, (list, tuple)):
        return f"--{section}.{name} {' '.join(shlex.quote(str(part)) for part in value)}"
    return f"--{section}.{name} {shlex.quote(str(value))}"


def shown(value: Any) -> str:
    """A value in a table: numbers short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def best_of(rows: list[TrialRow]) -> TrialRow:
    """The finished trial with the best metric.

    Raises:
        ValueError: no trial finished; names the reasons.
    """
    best = ranked(rows)[0] if rows else None
    if best is None or best.outcome != "finished":
        reasons = sorted({row.reason for row in rows if row.reason}) or ["no reason is known"]
        raise ValueError(f"none of {len(rows)} trials finished: {'; '.join(reasons)}")
    return best


def sweep_summary(rows: list[TrialRow], best_command: str) -> dict[str, Any]:
    """Content of the sweep's summary.json.

    Raises:
        ValueError: no trial finished; names the reasons.
    """
    best = best_of(rows)
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in get_args(Outcome)}
    given_up = [row for row in rows if row.outcome == "stopped early"]
    return {
        "num_trials": len(rows),
        "num_finished": counts["finished"],
        "num_stopped_early": counts["stopped early"],
        "num_failed": counts["failed"],
        "best_trial": best.name,
        "best_metric": best.value,
        "best_command": best_command,
        "trial_hours": sum(row.wall_s for row in rows) / 3600,
        "steps_saved": sum(row.num_steps - row.step for row in given_up),
        "hours_saved": sum(row.hours_saved for row in given_up),
    }


def last_lines(rows: list[TrialRow], summary: dict[str, Any]) -> str:
    """What a sweep prints last: why trials failed, what it cost, the command of the best."""
    return "\n".join(
        [
            *(f"{row.name} failed: {row.reason}" for row in rows if row.reason),
            f"{summary['num_trials']} trials: {summary['num_finished']} finished, "
            f"{summary['num_stopped_early']} stopped early, {summary['num_failed']} failed; "
            f"{summary['trial_hours']:.2f} trial-hours, stopping early saved "
            f"{summary['steps_saved']} steps, about {summary['hours_saved']:.2f} trial-hours",
            f"model     {summary.get('registered_model') or 'not registered'}",
            f"best      {summary['best_trial']}: {summary['best_metric']:.2f}; the same again:",
            summary["best_command"],
        ]
    )


def as_markdown(rows: list[TrialRow], metric: str, summary: dict[str, Any]) -> str:
    """The table and the best command, as MLflow shows a description."""
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    heads = ["trial", "outcome", metric.removeprefix("val/"), "steps", *keys]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in ranked(rows):
        value = "" if row.value is None else f"{row.value:.2f}"
        settings = [shown(row.overrides.get(key, "")) for key in keys]
        cells = [row.name, row.outcome, value, f"{row.step}/{row.num_steps}", *settings]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "The best again:", "```", summary["best_command"], "```"])


def write_tables(folder: Path, rows: list[TrialRow]) -> list[Path]:
    """trials.csv and trials.parquet: a row a trial, a column a varied setting; their paths."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    settings = {key: _column([row.overrides.get(key) for row in rows]) for key in keys}
    table = pa.table({name: [getattr(row, name) for row in rows] for name in _FACTS} | settings)
    paths = [folder / "trials.csv", folder / "trials.parquet"]
    pyarrow.csv.write_csv(table, paths[0])
    pyarrow.parquet.write_table(table, paths[1])
    return paths


def _column(values: list[Any]) -> list[Any]:
    """Values of a setting; as JSON where they are of several kinds, or lists."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds in ({str}, {bool}):
        return values
    return [json.dumps(value) for value in values]


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return values
