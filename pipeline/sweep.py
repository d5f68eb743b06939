"""A whole sweep: its folder, its run in MLflow, its trials, its report.

`<run.storage_path>/<run.name>/` holds sweep.json (what was asked), trials.jsonl (which trials, how
they ended), trial_NNNN/ (their runs) and at the end summary.json, trials.csv, trials.parquet and
pictures. The same command goes on with a sweep that was cut off, or reports a whole one again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.cluster import joined_cluster, needed_cpus
from pipeline.config_values import apply_overrides, config_diff
from pipeline.downstream.tasks import create_task
from pipeline.dry_run import finetune_dry_run
from pipeline.finetune_config import FinetuneConfig
from pipeline.finetuning_run import open_data, resolve_init
from pipeline.mlflow_run import MlflowRun
from pipeline.report import print_table
from pipeline.run_folder import RunFolder, write_json
from pipeline.run_lock import run_lock
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.parent_run import ParentRun
from pipeline.sweeps.plan import SweepPlan
from pipeline.sweeps.population import check_population, create_state
from pipeline.sweeps.report import (
    TrialRow,
    best_of,
    command_of,
    last_lines,
    read_row,
    shown,
    sweep_summary,
    trials_table,
    write_tables,
)
from pipeline.sweeps.space import Axis, check_space
from pipeline.sweeps.state import SweepState
from pipeline.sweeps.trials import GENERATORS, UNFINISHED, TrialRecord
from pipeline.sweeps.tuner import run_trials

logger = logging.getLogger(__name__)
_MOST_SHOWN = 20
SWEEP_FILE, SUMMARY_FILE = "sweep.json", "summary.json"


def run_sweep(
    base: FinetuneConfig,
    sweep: SweepConfig,
    axes: tuple[Axis, ...],
    *,
    recipe: FinetuneConfig,
    command: str,
) -> dict[str, Any]:
    """Run, or go on with, a sweep; returns its summary.

    Args:
        base: the run that is varied; run.name is the sweep's.
        sweep: how many trials, who gives them up.
        axes: what is varied.
        recipe: the recipe as it is, for the command line of the best trial.
        command: how a run of that recipe is started.

    Raises:
        ValueError: anything in the settings, the data or the folder a user can fix; or no trial
            finished.
        KeyboardInterrupt: the sweep was interrupted; the same command goes on with it.
    """
    plan = create_plan(base, sweep, axes)
    with run_lock(plan.folder):
        _check_same(plan)  # whoever held it may have begun another one
        return _run(plan, base, recipe, command)


def _run(
    plan: SweepPlan, base: FinetuneConfig, recipe: FinetuneConfig, command: str
) -> dict[str, Any]:
    write_json(plan.folder / SWEEP_FILE, plan.as_asked())
    parent = ParentRun(plan)
    plan.parent_run_id = parent.open()
    status = "FAILED"
    try:
        state = create_state(plan)
        with joined_cluster(_private_cpus(plan.base)):
            run_trials(state)
        settle_trials(state)
        rows = read_rows(state)
        tables = write_tables(plan.folder, rows)
        links = parent.links([row.mlflow_run_id for row in rows])
        print_table(trials_table(rows, plan.metric, links))
        summary = sweep_summary(rows, best_command(base, state, rows, recipe, command))
        parent.log(rows, summary, tables)
        if plan.sweep.register:
            summary["registered_model"] = parent.register(best_of(rows))
        write_json(plan.folder / SUMMARY_FILE, summary)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        parent.close(status)
    logger.info(last_lines(rows, summary))
    return summary


def create_plan(base: FinetuneConfig, sweep: SweepConfig, axes: tuple[Axis, ...]) -> SweepPlan:
    """Check everything a user can get wrong; nothing is written.

    Raises:
        ValueError: the space, the data or the weights are not right, or the folder holds another
            sweep.
    """
    storage = Path(base.run.storage_path).absolute()
    uri = tracking.tracking_uri(base.tracking.uri, storage)
    settled = apply_overrides(base, {"run.storage_path": str(storage), "tracking.uri": uri})
    plan = SweepPlan(settled, sweep, axes, metric="")
    check_space(axes, settled)
    if sweep.scheduler == "pbt":
        check_population(plan)
    _check_same(plan)
    _, _, classes = open_data(settled)
    for init in next((axis.values for axis in axes if axis.key == "init.path"), (None,)):
        resolve_init(settled if init is None else apply_overrides(settled, {"init.path": init}))
    plan.metric = create_task(settled, classes).main_metric
    return plan


def sweep_dry_run(base: FinetuneConfig, sweep: SweepConfig, axes: tuple[Axis, ...]) -> str:
    """What the sweep would do: the dry run of its first trial, and the settings of the others.

    Raises:
        ValueError: whatever would have stopped the real sweep, too.
    """
    plan = create_plan(base, sweep, axes)
    generator = GENERATORS[sweep.searcher](axes, num_trials=sweep.num_trials, seed=sweep.sweep_seed)
    known = 1 if sweep.searcher == "optuna" else generator.num_trials
    trials = [TrialRecord(number, generator.suggest(number)) for number in range(known)]
    lines = [finetune_dry_run(plan.config_of(trials[0])), f"{generator.num_trials} such trials:"]
    for trial in trials[:_MOST_SHOWN]:
        settings = "  ".join(f"{key} {shown(value)}" for key, value in trial.overrides.items())
        lines.append(f"  {trial.name}  {settings}")
    if generator.num_trials > len(trials[:_MOST_SHOWN]):
        lines.append("  ...")
    return "\n".join(lines)


def settle_trials(state: SweepState) -> None:
    """Close the MLflow runs of trials that were over before a kill let their runs end."""
    for trial in state.book.trials:
        if trial.number not in state.book.endings:
            continue
        with contextlib.suppress(ValueError):  # values that do not go together: it never ran
            config = state.config_of(trial)
            MlflowRun(config, RunFolder(config)).settle()


def read_rows(state: SweepState) -> list[TrialRow]:
    """A row for each trial, in the order of their numbers."""
    plan, rows = state.plan, []
    for trial in state.book.trials:
        num_steps = state.num_steps(trial.number)
        ending = state.book.endings.get(trial.number, UNFINISHED)
        folder = plan.folder / trial.name
        rows.append(read_row(folder, trial.overrides, plan.metric, num_steps, ending))
    return rows


def best_command(
    base: FinetuneConfig,
    state: SweepState,
    rows: list[TrialRow],
    recipe: FinetuneConfig,
    command: str,
) -> str:
    """The command that comes to the best trial's figure: trains it again, on its own.

    In a population it has had several settings, and weights of others: that one is evaluated.

    Raises:
        ValueError: no trial finished.
    """
    plan, best = state.plan, best_of(rows)
    if plan.sweep.scheduler == "pbt":
        return f"python -m jobs.evaluate {shlex.quote(str(plan.folder / best.name))}"
    config = plan.config_of(state.book.trials[rows.index(best)])
    where = {"run.storage_path": base.run.storage_path, "run.name": f"{base.run.name}-best"}
    config = apply_overrides(config, {**where, "tracking.uri": base.tracking.uri})
    return command_of(config, recipe, command)


def _private_cpus(base: FinetuneConfig) -> int:
    """Logical CPUs of a cluster of this process's own: the machine's, or what one trial takes."""
    return max(os.cpu_count() or 1, math.ceil(needed_cpus(base, base.scaling.max_workers)))


def _check_same(plan: SweepPlan) -> None:
    """Refuse a folder with another sweep, or a run, in it.

    Raises:
        ValueError: with the differences.
    """
    folder, path = plan.folder, plan.folder / SWEEP_FILE
    way_out = "pick another --run.name, or delete that folder"
    if not path.exists():
        if (folder / "config.json").exists():
            raise ValueError(f"run.name='{folder.name}' is a single run ({folder}); {way_out}")
        return
    before, asked = json.loads(path.read_text()), plan.as_asked()
    changes = [f"task: {before['task']} -> {asked['task']}"] * (before["task"] != asked["task"])
    changes += config_diff(before["config"], asked["config"])
    changes += config_diff({"space": before["space"]}, {"space": asked["space"]})
    may_change = {"max_concurrent_trials", "retry_failed", "register", "num_trials"}
    if plan.sweep.scheduler == "pbt":  # all trials of a population begin together
        may_change.discard("num_trials")
    kept = [{k: v for k, v in s["sweep"].items() if k not in may_change} for s in (before, asked)]
    changes += config_diff({"sweep": kept[0]}, {"sweep": kept[1]})
    if changes:
        lines = "\n  ".join(changes)
        raise ValueError(
            f"run.name='{folder.name}' is another sweep ({folder}):\n  {lines}\n{way_out}"
        )
