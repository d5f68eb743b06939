"""What each training worker executes: it connects data, loop, checkpoints and tracking.

Surprising: errors that every worker meets at the same step (a loss that is not finite, too many bad
images) are returned, not raised. Raised, Ray Train would restart the workers and meet them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
import ray.train
import ray.train.torch

from pipeline import tracking
from pipeline.checkpoint import Checkpointer
from pipeline.config import PretrainConfig, config_from_dict, config_hash
from pipeline.data import SampleFactory, SyntheticBatches, TrainingBatches
from pipeline.pretrain import Batch, Hooks, NonFiniteLossError, Worker, pretrain
from pipeline.quarantine import (
    QUARANTINE_FILE,
    BadSample,
    TooManyBadSamplesError,
    read_quarantine,
    write_quarantine,
)
from pipeline.run_folder import RunFolder


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every training worker runs; worker 0's result becomes the run's."""
    config = config_from_dict(PretrainConfig, job["config"])
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )
    folder = RunFolder(config)
    quarantine_file = str(folder.path / QUARANTINE_FILE)
    num_steps = config.num_steps(job["num_samples"])
    trackers: list[tracking.Tracker] = []
    answers: list[ray.ObjectRef] = []

    def on_start(step: int) -> None:
        if worker.is_rank_zero:
            system_metrics = config.tracking.system_metrics
            trackers.append(
                tracking.Tracker(
                    folder.path, **job["mlflow"], start_step=step, system_metrics=system_metrics
                )
            )
            if job["bad_files"]:
                on_quarantine(read_quarantine(quarantine_file))

    def on_metrics(step: int, metrics: dict[str, float]) -> bool:
        trackers[0].log(step, metrics)
        answers.append(job["board"].post.remote(step, metrics))
        # The answer to the previous post is there by now: no waiting for the driver.
        return bool(ray.get(answers.pop(0))) if len(answers) > 1 else False

    def on_quarantine(samples: list[BadSample]) -> None:
        bad = {sample.path: sample for sample in (*job["bad_files"], *samples)}
        write_quarantine(quarantine_file, bad.values())

    def on_picture(step: int, png: bytes) -> None:
        trackers[0].log_picture(step, png)

    def on_checkpoint(step: int, metrics: dict[str, float]) -> None:
        ray.train.report({"step": step, **metrics})

    def batches_from(step: int) -> Iterable[Batch]:
        if config.data.synthetic:
            return SyntheticBatches(config)
        return TrainingBatches(
            config,
            job["train_index"][0],
            rank=worker.rank,
            start_step=step,
            num_steps=num_steps,
        )

    def evaluation_batch() -> Batch:
        if config.data.synthetic:
            return SyntheticBatches(config).batch
        held_out = SampleFactory.build(config, ray.get(job["val_index"][0]))
        return held_out.evaluation_batch(worker.rank, worker.world_size)

    try:
        outcome = pretrain(
            config,
            num_samples=job["num_samples"],
            batches_from=batches_from,
            evaluation_batch=evaluation_batch(),
            checkpointer=run_checkpointer(config, folder),
            worker=worker,
            hooks=Hooks(
                on_start=on_start,
                on_metrics=on_metrics,
                on_quarantine=on_quarantine,
                on_picture=on_picture,
                on_checkpoint=on_checkpoint,
            ),
        )
    except (NonFiniteLossError, TooManyBadSamplesError) as error:
        # Every worker raises it at the same step and would again: nothing to restart for.
        return {"error": f"{error}"}
    finally:
        for tracker in trackers:
            tracker.close()
    return outcome


def run_checkpointer(config: PretrainConfig, folder: RunFolder) -> Checkpointer:
    """The checkpoints of a run."""
    facts = {
        "model": config.model.name,
        "image_size": str(config.data.image_size),
        "run": config.run.name,
        "config_hash": config_hash(config),
    }
    return Checkpointer(folder.checkpoints, keep=config.run.keep_checkpoints, facts=facts)
