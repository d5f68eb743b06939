"""Ray Tune wiring: from a plan to finished trials.

Surprising: Tune decides only what starts when. A trial's folder, checkpoints, MLflow run and resume
are those of any run; who is given up is `stopping.py`'s business, and the record of the sweep is
ours (`trials.py`), because Tune's is unpickled on resume. So the same command goes on after
whatever happened to this process.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.cluster import needed_cpus
from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.finetune_config import FinetuneConfig
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.plan import SweepPlan
from pipeline.sweeps.state import SweepState
from pipeline.sweeps.trial_run import ERROR, STEP, VALUE, TrialRun
from pipeline.sweeps.trials import TrialRecord

logger = logging.getLogger(__name__)
_ACTOR_BYTES = 2**20
"""Memory that Tune books for the actor of a trial, which has to book something: no CPU, so that
a cluster whose CPUs are all at work on trials is not a deadlock."""
_TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics are the runs' own business
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of the command line are relative to where it was given
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints tables at any verbosity
}
_LOST_ACTORS = 3
_STOP_ALL = "stop_all"
_POLL_S = 0.25


def num_concurrent(
    base: FinetuneConfig, sweep: SweepConfig, num_trials: int, has: dict[str, float]
) -> tuple[int, str]:
    """Trials the cluster has room for, and the arithmetic in words.

    Args:
        base: the run that is varied.
        sweep: may want fewer.
        num_trials: of the sweep.
        has: resources of the cluster: CPU and GPU.

    Raises:
        ValueError: it has room for none.
    """
    scaling = base.scaling
    needs = {"CPU": needed_cpus(base, scaling.max_workers)}
    if scaling.use_gpu:
        needs["GPU"] = scaling.max_workers * scaling.gpus_per_worker
    room, parts = math.inf, []
    for kind, each in needs.items():
        count = math.floor(has.get(kind, 0) / each + 1e-9)
        room = min(room, count)
        parts.append(f"{has.get(kind, 0):g} {kind}s / {each:g} a trial = {count}")
        if count < 1:
            raise ValueError(
                f"a trial takes {each:g} {kind}s and the cluster has {has.get(kind, 0):g}; lower "
                "scaling.num_workers, scaling.cpus_per_worker, scaling.gpus_per_worker or "
                "data.num_cpus (0 decodes in the training workers)"
            )
    limits = [int(room), num_trials]
    if sweep.max_concurrent_trials:
        limits.append(sweep.max_concurrent_trials)
        parts.append(f"max_concurrent_trials {sweep.max_concurrent_trials}")
    parts.append(f"{num_trials} trials")
    return min(limits), f"{min(limits)} trials at a time: {'; '.join(parts)}"


def with_absolute_paths(config: FinetuneConfig) -> FinetuneConfig:
    """The run with its local paths made absolute: actors of a cluster work in a folder of Ray's."""
    given = {"data.path": config.data.path, "data.val_path": config.data.val_path}
    if not config.init.is_scratch:
        given["init.path"] = config.init.path
    local = {key: path for key, path in given.items() if path and "://" not in path}
    return apply_overrides(config, {key: str(Path(path).absolute()) for key, path in local.items()})


class _Search(Searcher):
    """Gives Tune the trials in the order of their numbers."""

    def __init__(self, state: SweepState) -> None:
        super().__init__()
        self.state = state

    def suggest(self, trial_id: str) -> Any:
        folder = scratch_folder(self.state.plan)
        trial = None if (folder / _STOP_ALL).exists() else self.state.next_trial()
        if trial is None:
            is_waiting = self.state.is_waiting and not (folder / _STOP_ALL).exists()
            return None if is_waiting else Searcher.FINISHED
        config = with_absolute_paths(self.state.config_of(trial))
        return {
            "number": trial.number,
            "task": config.task,
            "run": config_to_dict(config),
            "metric": self.state.plan.metric,
            "stop_files": [str(folder / name) for name in (_STOP_ALL, trial.name)],
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: `_Judge` has noted it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record is `trials.jsonl`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class _Judge(FIFOScheduler):
    """Notes what trials report and how they end, and gives up the hopeless ones."""

    def __init__(self, state: SweepState) -> None:
        super().__init__()
        self.state = state

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if VALUE not in result:
            return TrialScheduler.CONTINUE
        number, step, value = trial.config["number"], result[STEP], result[VALUE]
        is_hopeless = self.state.report(number, step, value)
        share = self.state.last[number][0]
        logger.info(
            "%s  step %d (%.0f %%)  %s %.2f",
            self.state.book.trials[number].name,
            step,
            100 * share,
            self.state.plan.metric,
            value,
        )
        if is_hopeless and share < 1:
            self.state.end(number, "stopped early")
            (scratch_folder(self.state.plan) / self.state.book.trials[number].name).touch()
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.state.leave(trial.config["number"], result.get(ERROR, ""))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.state.leave(trial.config["number"], "its actor was lost again and again")


def scratch_folder(plan: SweepPlan) -> Path:
    """For Tune's files, which nobody reads, and those that tell trials to stop."""
    return plan.folder / "tune"


def run_trials(state: SweepState) -> None:
    """All trials, on the connected cluster; `state` then says how each ended.

    Raises:
        KeyboardInterrupt: the sweep was interrupted; its trials have saved, and go on next time.
    """
    plan, count = state.plan, state.generator.num_trials
    resources = ray.cluster_resources()
    at_a_time, arithmetic = num_concurrent(plan.base, plan.sweep, count, resources)
    logger.info(arithmetic)
    scratch = scratch_folder(plan)
    shutil.rmtree(scratch, ignore_errors=True)  # of a start that was killed
    scratch.mkdir(parents=True)
    for key, value in _TUNE_ENV.items():
        os.environ.setdefault(key, value)
    tuner = tune.Tuner(
        tune.with_resources(TrialRun, {"memory": _ACTOR_BYTES}),
        tune_config=tune.TuneConfig(
            search_alg=_Search(state),
            scheduler=_Judge(state),
            num_samples=-1,  # until the search says that there are no more
            max_concurrent_trials=at_a_time,
            reuse_actors=True,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(scratch),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run has its own
            failure_config=tune.FailureConfig(max_failures=_LOST_ACTORS),
            verbose=0,
        ),
    )
    try:
        _fit(tuner, scratch / _STOP_ALL)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # nothing in it is ever read


def _name_of(trial: Any) -> str:
    # A population's trials come to Tune once a generation.
    return f"{TrialRecord(trial.config['number'], {}).name}_{trial.trial_id}"


def _fit(tuner: tune.Tuner, stop_all: Path) -> None:
    """Fit in a thread, so that this one can take Ctrl-C; a second one ends at once."""
    errors: list[BaseException] = []
    is_done = (
        threading.Event()
    )  # an interrupted Thread.join takes the thread for ended (Python 3.11)

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            errors.append(error)
        finally:
            is_done.set()

    threading.Thread(target=fit, name="tune", daemon=True).start()
    while not is_done.is_set():
        try:
            is_done.wait(_POLL_S)
        except KeyboardInterrupt:
            if stop_all.exists():
                raise
            stop_all.touch()
            logger.info("stopping all trials; Ctrl-C again stops at once")
    if errors:
        raise errors[0]
    if stop_all.exists():
        raise KeyboardInterrupt
