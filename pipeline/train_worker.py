"""What each training worker executes: it connects data, loop, checkpoints, logbook and tracking.

Surprising: errors that every worker meets at the same step (steps that are not finite, too many bad
images) are returned, not raised. Raised, Ray Train would restart the workers and meet them again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch

from pipeline import tracking
from pipeline.between_steps import Hooks
from pipeline.checkpoint import Checkpointer, Saved
from pipeline.config import TrainingConfig, parse_profile_steps
from pipeline.config_values import config_hash
from pipeline.live_metrics import LiveMetrics
from pipeline.logbook import Logbook, fault_metrics, give_up_message
from pipeline.nonfinite import NonFiniteLossError
from pipeline.onednn_products import use_onednn
from pipeline.process_memory import keep_freed_memory
from pipeline.process_priority import undo_niceness
from pipeline.profiling import StepProfiler
from pipeline.quarantine import (
    QUARANTINE_FILE,
    BadSample,
    TooManyBadSamplesError,
    read_quarantine,
    write_quarantine,
)
from pipeline.run_folder import RunFolder
from pipeline.train_state import Worker

logger = logging.getLogger(__name__)


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every training worker runs; worker 0's result becomes the run's."""
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )
    undo_niceness()
    if worker.device.type == "cpu":
        keep_freed_memory()
        use_onednn()
    session: WorkerSession = job["session"](job, worker)
    if (refusal := session.sign_on()) is not None:
        return {"error": refusal}
    try:
        return session.run()
    except (NonFiniteLossError, TooManyBadSamplesError) as error:
        # Every worker raises it at the same step and would again: nothing to restart for.
        return {"error": f"{error}{session.postscript}"}
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        session.logbook.write("crash", rank=worker.rank, error=problem)
        raise
    finally:
        session.close()


class WorkerSession:
    """One worker's part in a run, from a start of the worker group to its end.

    What is trained, a subclass says: `PretrainSession`, `FinetuneSession`.

    Args:
        job: what the driver sent (see `trainer.run_training`).
        worker: this process.
        config: the run.
    """

    def __init__(self, job: dict[str, Any], worker: Worker, config: TrainingConfig) -> None:
        self.job = job
        self.worker = worker
        self.config = config
        self.folder = RunFolder(config)
        self.logbook = Logbook(self.folder.events_file)
        run_id = job["mlflow"]["run_id"]
        self.checkpointer = run_checkpointer(self.config, self.folder, run_id, warn=self._say)
        self.postscript = ""
        """What to add to the message of an error that ends the run."""
        self._tracker: tracking.Tracker | None = None
        self._answers: list[ray.ObjectRef] = []
        self._faults: dict[str, float] = {}
        self._failed: Saved | None = None
        self._saved_at = time.monotonic()
        self._preempted: list[str] = []
        self._live = LiveMetrics(config.run.name, job.get("task", "pretrain"))
        self._profiler = StepProfiler(
            parse_profile_steps(config.run.profile_steps) if worker.is_rank_zero else range(0),
            self.folder.path / tracking.PROFILES,
            self._on_profile,
        )

    def train(self, hooks: Hooks) -> dict[str, Any]:
        """Run the loop; returns what it returns."""
        raise NotImplementedError

    def sign_on(self) -> str | None:
        """Note the start; on every worker, why the run must not go on once more, or None."""
        refusal = None
        if self.worker.is_rank_zero:
            self.logbook.write("start", num_workers=self.worker.world_size)
            refusal = give_up_message(self.logbook.read(), self.config.run.max_failures)
        shared: str | None = ray.train.collective.broadcast_from_rank_zero(refusal)
        return shared

    def run(self) -> dict[str, Any]:
        """Train; the summary of the loop, or {"error": why it is none}."""
        outcome = self.train(
            Hooks(
                on_start=self._on_start,
                on_step=self._profiler.after_step,
                on_metrics=self._on_metrics,
                wants_checkpoint=self._wants_checkpoint,
                on_quarantine=self._on_quarantine,
                on_picture=self._on_picture,
                on_checkpoint=self._on_checkpoint,
                on_non_finite=self._on_non_finite,
            )
        )
        self._note_checkpoints()
        if self._failed is not None and (
            outcome["is_stopped"] or self._failed.step == outcome["steps"]
        ):
            return {
                "error": f"the checkpoint of step {self._failed.step} was not written: "
                f"{self._failed.error}; the newest one before it is kept in "
                f"{self.checkpointer.location}. Make room, and the same command resumes from it"
            }
        return outcome

    def close(self) -> None:
        """Finish what goes on beside training, also after an error in it."""
        self._profiler.close()
        self.checkpointer.wait()
        if self._tracker is not None:
            self._note_checkpoints()
            self._tracker.close()

    def _on_start(self, step: int) -> None:
        if not self.worker.is_rank_zero:
            return
        self._profiler.after_step(step)
        self._tracker = tracking.Tracker(
            self.folder.path,
            **self.job["mlflow"],
            start_step=step,
            system_metrics=self.config.tracking.system_metrics,
            warn=self._say,
        )
        lost = self._tracker.lost_steps
        self.logbook.write("resume", step=step, lost_steps=lost, num_workers=self.worker.world_size)
        self._faults = fault_metrics(self.logbook.read())
        if step > 0:
            self._say(
                f"continuing from step {step} with {self.worker.world_size} workers"
                + (f"; {lost} steps are computed again" if lost else "")
            )
        if self.job["bad_files"]:
            self._on_quarantine(read_quarantine(self._quarantine_file))

    def _on_metrics(self, step: int, metrics: dict[str, float]) -> bool:
        assert self._tracker is not None, "on_start comes first"
        record = metrics | self._note_checkpoints()
        record |= self._faults | {"scaling/num_workers": float(self.worker.world_size)}
        self._tracker.log(step, record)
        self._live.set(step, record)
        self._answers.append(self.job["board"].post.remote(step, record))
        # The answer to the previous post is there by now: no waiting for the driver.
        wants_stop = bool(ray.get(self._answers.pop(0))) if len(self._answers) > 1 else False
        return wants_stop or (
            self._failed is not None and self.config.run.on_checkpoint_error == "stop"
        )

    def _wants_checkpoint(self, step: int) -> bool:
        """A node is about to be taken away, or it has been long since the last checkpoint."""
        minutes = self.config.run.checkpoint_every_minutes
        is_overdue = 0 < 60 * minutes <= time.monotonic() - self._saved_at
        info = ray.train.get_preemption_info()  # every worker must ask equally often
        if info is None or info.preempted_node_ids == self._preempted:
            return is_overdue
        self._preempted = info.preempted_node_ids
        if self.worker.is_rank_zero:
            self.logbook.write("preemption", step=step, nodes=self._preempted)
            self._say(f"{len(self._preempted)} nodes are about to be taken away: saving")
        return True

    def _on_profile(self, file: Path) -> None:
        assert self._tracker is not None, "on_start comes first"
        self._tracker.log_artifact(file, tracking.PROFILES)

    @property
    def _quarantine_file(self) -> str:
        return str(self.folder.path / QUARANTINE_FILE)

    def _on_quarantine(self, samples: list[BadSample]) -> None:
        bad = {sample.path: sample for sample in (*self.job["bad_files"], *samples)}
        try:
            write_quarantine(self._quarantine_file, bad.values())
        except OSError as error:  # a full disk; all of them are written again with the next one
            self._say(f"{self._quarantine_file} was not written: {error}; training goes on")

    def _on_picture(self, step: int, kind: str, png: bytes) -> None:
        assert self._tracker is not None, "on_start comes first"
        try:
            self._tracker.log_picture(step, kind, png)
        except OSError as error:  # a full disk
            self._say(f"the picture of step {step} was not saved: {error}; training goes on")

    def _on_checkpoint(self, step: int, metrics: dict[str, float]) -> None:
        self._saved_at = time.monotonic()
        ray.train.report({"step": step, **metrics})

    def _note_checkpoints(self) -> dict[str, float]:
        """Write down how the checkpoints ended that are done by now; metrics of the last."""
        metrics: dict[str, float] = {}
        for saved in self.checkpointer.finished():
            if saved.error is None:
                self._failed = None
                self.logbook.write(
                    "checkpoint",
                    step=saved.step,
                    save_s=round(saved.save_s, 4),
                    stall_s=round(saved.stall_s, 4),
                    bytes=saved.num_bytes,
                )
                metrics = {
                    "checkpoint/save_s": saved.save_s,
                    "checkpoint/stall_s": saved.stall_s,
                    "checkpoint/gib": saved.num_bytes / 2**30,
                }
                continue
            self._failed = saved
            self.logbook.write("checkpoint_failed", step=saved.step, error=saved.error)
            self._faults["fault/failed_checkpoints"] += 1
            self._say(
                f"the checkpoint of step {saved.step} was not written: {saved.error}; the newest "
                "one before it is kept"
            )
        return metrics

    def _on_non_finite(self, dump: dict[str, Any]) -> None:
        """A run is about to end because of steps that are not finite."""

    def _say(self, text: str) -> None:
        self.job["board"].say.remote(text)


def run_checkpointer(
    config: TrainingConfig,
    folder: RunFolder,
    mlflow_run_id: str,
    warn: Callable[[str], None] = logger.warning,
) -> Checkpointer:
    """The checkpoints of a run."""
    run = config.run
    facts = {
        "model": config.model_name,
        "image_size": str(config.data.image_size),
        "run": run.name,
        "config_hash": config_hash(config),
        "mlflow_run_id": mlflow_run_id,
    }
    return Checkpointer(
        folder.checkpoints,
        keep=run.keep_checkpoints,
        keep_every_steps=run.keep_every_steps,
        facts=facts,
        warn=warn,
        export_file=folder.export_file,
    )
