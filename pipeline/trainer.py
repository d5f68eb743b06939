"""Ray Train wiring: from a config to a finished run, whatever it trains.

`run_training` is the driver: it checks everything a user can get wrong, opens the MLflow run,
starts a `TorchTrainer`, shows progress, and closes the run with the right status. What each worker
then executes is in `train_worker.py`; what is particular to pre-training and to fine-tuning in
`pretraining_run.py` and `finetuning_run.py`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
import ray.train.torch

from pipeline.cluster import cluster, worker_resources
from pipeline.config import TrainingConfig
from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.html_report.page import try_write_report
from pipeline.logbook import Logbook, fault_metrics
from pipeline.mlflow_run import MlflowRun
from pipeline.placement import label_selector
from pipeline.progress import ProgressDisplay, create_board
from pipeline.run_folder import RunFolder
from pipeline.run_lock import run_lock
from pipeline.sources import Index
from pipeline.train_worker import WorkerSession, run_checkpointer, train_worker

logger = logging.getLogger(__name__)
OnRecord = Callable[[int, dict[str, float]], None]
_POLL_S = 0.25
_STOP_GRACE_S = 60.0
_CLEANER_TIMEOUT_S = 0.5
_MOST_RESTARTS = 1000  # a backstop, for workers that cannot even reach the logbook


class RunFailedError(RuntimeError):
    """Training failed; the message says why. The newest checkpoint is kept."""


class _Trainer(ray.train.torch.TorchTrainer):
    """TorchTrainer that does not idle for 12 seconds at its end.

    Ray 2.60's cleaner of placement groups waits for a thread that in turn waits for the cleaner,
    until a time-out with no public setting. This shortens the time-out where it exists, and is
    otherwise the plain trainer.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        for callback in callbacks:
            if hasattr(callback, "_stop_timeout"):
                callback._stop_timeout = _CLEANER_TIMEOUT_S
        return callbacks


@dataclass(frozen=True)
class RunPlan:
    """What is particular to a kind of run."""

    session: type[WorkerSession]
    """What each worker does."""
    num_samples: int
    """Training samples."""
    header: str
    """What the run prints first."""
    train: Index | None
    val: Index | None
    job: dict[str, Any]
    """Further things the session finds in its job; what is large goes through `shared`."""
    shared: dict[str, Any]
    """Put into the object store once; the session finds references, each in a list."""
    headline: Callable[[dict[str, float]], dict[str, Any]]
    """Figures for summary.json, from the last metrics."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """JSON files for the run's folder."""


def run_training(
    config: TrainingConfig,
    make_plan: Callable[[], RunPlan],
    *,
    stop: threading.Event | None = None,
    on_record: OnRecord | None = None,
) -> dict[str, Any]:
    """Run, or resume, a run; returns its summary.

    Args:
        config: the run.
        make_plan: opens and checks data and weights; called when the run folder is known to be fit.
        stop: of a run beside others in threads of one process: where it is set, the run ends as
            after Ctrl-C. Lines of progress then begin with the name of the run.
        on_record: called with step and metrics of every logged step, in the calling thread.

    Raises:
        ValueError: anything in the config, the data or the run folder a user can fix; another
            driver is at it.
        RunFailedError: training failed.
        KeyboardInterrupt: the run was interrupted, or told to stop; its newest checkpoint is kept.
    """
    folder = RunFolder(config)
    with run_lock(folder.path):
        return _run(config, folder, make_plan, stop, on_record)


def _run(
    config: TrainingConfig,
    folder: RunFolder,
    make_plan: Callable[[], RunPlan],
    stop: threading.Event | None,
    on_record: OnRecord | None,
) -> dict[str, Any]:
    mlflow_run = MlflowRun(config, folder)
    mlflow_run.deliver_late()
    folder.check()
    plan = make_plan()
    run_id = mlflow_run.open(num_samples=plan.num_samples)
    for name, content in plan.files.items():
        folder.write(name, content)
    logger.info(plan.header)

    checkpoints = run_checkpointer(config, folder, run_id)
    logbook = Logbook(folder.events_file)
    logbook.write("submit", num_workers=config.scaling.num_workers)
    status, start = "FAILED", time.time()
    facts: dict[str, str] = {}
    try:
        with cluster(config):
            outcome = _fit(config, plan, folder, mlflow_run.uri, run_id, stop, on_record)
        if outcome["is_stopped"]:
            raise KeyboardInterrupt
        faults = fault_metrics(logbook.read())
        headline = plan.headline(outcome["metrics"])
        wall_s = time.time() - start
        summary = _summarise(config, outcome, headline, run_id, faults, wall_s=wall_s)
        checkpoint = checkpoints.latest()
        assert checkpoint is not None, "the last step always writes a checkpoint"
        folder.finish(summary, checkpoint)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except Exception as error:
        facts["error"] = str(error) or type(error).__name__
        raise
    finally:
        logbook.write("end", status=status, **facts)
        try_write_report(folder.path)
        mlflow_run.close(run_id, status)
    return summary


def describe_batches(config: TrainingConfig, num_samples: int, kind: str = "images") -> str:
    """Two lines of a header: data, batch and learning-rate arithmetic."""
    batch, scaling = config.data.global_batch_size, config.scaling
    workers = f"{scaling.max_workers} workers"
    if scaling.min_workers < scaling.max_workers:
        workers = f"{scaling.min_workers} to {workers}"
    steps = config.num_steps(num_samples)
    lr = f"{config.lr:.3g}"
    if config.optim.lr is None:
        lr = f"{config.optim.base_lr:.3g} x {batch} / 256 = {lr}"
    epochs = steps * batch / num_samples
    return (
        f"run '{config.run.name}': {config.model_name} at {config.data.image_size} px on "
        f"{num_samples} {kind}, {steps} steps ({epochs:.4g} epochs)\n"
        f"global batch {batch} = {config.num_micro_batches} micro-batches of "
        f"{config.batch_size_per_worker} over {workers}; learning rate {lr}"
    )


def _fit(
    config: TrainingConfig,
    plan: RunPlan,
    folder: RunFolder,
    uri: str,
    run_id: str,
    stop: threading.Event | None,
    on_record: OnRecord | None,
) -> dict[str, Any]:
    """Fit in a thread, so that this one can show progress and take Ctrl-C."""
    board = create_board()
    # Workers run in a folder of Ray's, so relative paths end here.
    absolute = apply_overrides(config, {"run.storage_path": str(folder.storage_path)})
    job = {
        "session": plan.session,
        "config": config_to_dict(absolute),
        "num_samples": plan.num_samples,
        "train_index": [ray.put(plan.train)],  # in lists: handed on as references
        "val_index": [ray.put(plan.val)],
        "bad_files": [bad for index in (plan.train, plan.val) if index for bad in index.bad_files],
        "mlflow": {"uri": uri, "run_id": run_id},
        "board": board,
        **plan.job,
        **{key: [ray.put(value)] for key, value in plan.shared.items()},
    }
    trainer = _Trainer(
        # Not as train_loop_config: Ray Train's controller would unpack it, and spend seconds on
        # importing all that the session needs.
        functools.partial(train_worker, job),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            elastic_resize_monitor_interval_s=config.scaling.resize_check_s,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker=worker_resources(config),
            label_selector=label_selector(config.scaling.worker_labels) or None,
        ),
        # A name of its own each time: Ray Train would silently resume an old one, and resuming is
        # our business.
        run_config=ray.train.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(folder.path / "ray"),
            # When to give up is the logbook's business: Ray would count every worker ever lost.
            failure_config=ray.train.FailureConfig(max_failures=_MOST_RESTARTS),
        ),
    )
    result: dict[str, Any] = {}
    is_done = threading.Event()

    def fit() -> None:
        try:
            result["outcome"] = trainer.fit().return_value
        except BaseException as error:
            result["error"] = error
        finally:
            is_done.set()

    threading.Thread(target=fit, name="fit", daemon=True).start()
    name = None if stop is None else config.run.name
    with ProgressDisplay(config.num_steps(plan.num_samples), name) as display:
        _follow(is_done, board, display, stop, on_record)
    if "error" in result:
        raise RunFailedError(
            f"run '{config.run.name}' failed: {_root_cause(result['error'])}\nits newest "
            f"checkpoint is kept under {folder.checkpoints}; the same command resumes it"
        ) from result["error"]
    outcome: dict[str, Any] = result["outcome"]
    if "error" in outcome:
        raise RunFailedError(f"run '{config.run.name}' stopped: {outcome['error']}")
    return outcome


def _follow(
    is_done: threading.Event,
    board: Any,
    display: ProgressDisplay,
    stop: threading.Event | None = None,
    on_record: OnRecord | None = None,
) -> None:
    """Show progress until the run ends; the first Ctrl-C stops it cleanly, a second at once."""
    deadline: float | None = None
    while not is_done.is_set():
        try:
            is_done.wait(_POLL_S)
            _show_news(board, display, on_record)
            is_late = deadline is not None and time.monotonic() > deadline
            if is_late or (deadline is None and stop is not None and stop.is_set()):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            if deadline is not None:
                raise
            deadline = time.monotonic() + _STOP_GRACE_S
            board.request_stop.remote()
            display.say("stopping after the next log step; Ctrl-C again stops at once")
    _show_news(board, display, on_record)


def _show_news(board: Any, display: ProgressDisplay, on_record: OnRecord | None) -> None:
    remarks, records = ray.get(board.drain.remote())
    for remark in remarks:
        display.say(remark)
    for step, metrics in records:
        display.show(step, metrics)
        if on_record is not None:
            on_record(step, metrics)


def _root_cause(error: BaseException) -> str:
    """The worker's own exception under Ray's wrappers."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"


def _summarise(
    config: TrainingConfig,
    outcome: dict[str, Any],
    headline: dict[str, Any],
    run_id: str,
    faults: dict[str, float],
    *,
    wall_s: float,
) -> dict[str, Any]:
    """Content of summary.json."""
    return {
        "run": config.run.name,
        "steps": outcome["steps"],
        "wall_s": round(wall_s, 2),
        "images_per_s": outcome["images_per_s"],
        "data_wait_frac": outcome["data_wait_frac"],
        **headline,
        "mlflow_run_id": run_id,
        "bad_samples": outcome["bad_samples"],
        "skipped_steps": outcome["skipped_steps"],
        "restarts": int(faults["fault/restarts"]),
        "lost_steps": int(faults["fault/lost_steps"]),
        "total_wall_s": round(faults["fault/wall_s"], 2),
        "metrics": outcome["metrics"],
    }
