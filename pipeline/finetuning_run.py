"""A fine-tuning run on Ray: its data and weights, what each worker does, its figures.

The loop itself is in `finetune.py`, the driver in `trainer.py`. Surprising: the model is built once
on the driver, too, and its weights loaded there, so that weights which do not fit end the command
before anything is started, with the report of every key.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
import torch

from models.weights import LoadReport
from pipeline.between_steps import Hooks
from pipeline.config_values import config_from_dict
from pipeline.data import MakerBuilder, TrainingBatches
from pipeline.downstream.samples import maker_builder
from pipeline.downstream.task import DownstreamTask
from pipeline.downstream.task_samples import (
    check_data,
    check_same_classes,
    classes_of,
    task_samples,
)
from pipeline.downstream.tasks import create_task
from pipeline.evaluation_data import EvaluationBatches, share_of
from pipeline.finetune import finetune
from pipeline.finetune_config import CONFIG_CLASSES, ConfigOfTask, FinetuneConfig
from pipeline.init_weights import (
    InitialWeights,
    load_initial_weights,
    read_initial_weights,
    with_model_name,
)
from pipeline.run_folder import CLASSES_FILE
from pipeline.sources import Index, build_index
from pipeline.train_state import Worker
from pipeline.train_worker import WorkerSession
from pipeline.trainer import OnRecord, RunPlan, describe_batches, run_training

_NUM_PROBED = 16
TRAINING: MakerBuilder = maker_builder(task_samples, is_training=True)
VALIDATION: MakerBuilder = maker_builder(task_samples, is_training=False)


def run_finetuning(
    config: FinetuneConfig,
    *,
    stop: threading.Event | None = None,
    on_record: OnRecord | None = None,
) -> dict[str, Any]:
    """Run, or resume, a fine-tuning run; returns its summary.

    Args:
        config: the run.
        stop, on_record: see `run_training`.

    Raises:
        ValueError: anything in the config, the data, the weights or the run folder a user can fix.
        RunFailedError: training failed.
        KeyboardInterrupt: the run was interrupted; its newest checkpoint is kept.
    """
    config, weights = resolve_init(config)
    return run_training(config, lambda: _plan(config, weights), stop=stop, on_record=on_record)


def resolve_init(config: ConfigOfTask) -> tuple[ConfigOfTask, InitialWeights]:
    """Read the initial weights; the config, with the variant they are of, and the weights.

    Raises:
        ValueError: none are named, they cannot be read, or their variant is not that of the config.
        FileNotFoundError: they do not exist.
    """
    weights = read_initial_weights(config.init)
    return with_model_name(config, weights), weights


def _plan(config: FinetuneConfig, weights: InitialWeights) -> RunPlan:
    train, val, classes = open_data(config)
    task = create_task(config, classes, pretrain_size=weights.image_size)
    _, report = build_model(task, weights)
    return RunPlan(
        session=FinetuneSession,
        num_samples=config.num_used(train.num_samples),
        header=describe(config, train, val, task, weights, report),
        train=train,
        val=val,
        job={"task": config.task, "classes": classes},
        shared={"weights": weights},
        headline=lambda metrics: {
            "task": config.task,
            "init": weights.source,
            "metric": task.main_metric,
            "value": metrics[task.main_metric],
        },
        files={CLASSES_FILE: {"classes": list(classes), "pretrain_size": weights.image_size}},
    )


def open_data(config: FinetuneConfig) -> tuple[Index, Index, tuple[str, ...]]:
    """Indices of the training and the validation set, and the classes; a few samples are made.

    Raises:
        ValueError: a set lacks what the task needs, the two have other classes, or not one of the
            probed samples can be made.
        FileNotFoundError: a path does not exist.
    """
    indices = []
    for setting in ("data.path", "data.val_path"):
        path = getattr(config.data, setting.removeprefix("data."))
        index = build_index(path, setting, config.data.max_bad_fraction)
        check_data(config, index, setting)
        indices.append(index)
    train, val = indices
    check_same_classes(train, val)
    _probe(config, train, "data.path", TRAINING)
    _probe(config, val, "data.val_path", VALIDATION)
    return train, val, classes_of(config, train, val)


def _probe(config: FinetuneConfig, index: Index, setting: str, build: MakerBuilder) -> None:
    maker = build(config, index)
    step = max(1, index.num_samples // _NUM_PROBED)
    draws = next(iter(share_of(maker, _NUM_PROBED, 0, step)))
    bad = [text for text in maker.batch(draws)["bad"] if text]
    if len(bad) == len(draws.rows):
        raise ValueError(
            f"{setting}='{index.root}': none of {len(bad)} probed samples can be used; first "
            f"problem: {bad[0]}"
        )


def build_model(
    task: DownstreamTask, weights: InitialWeights
) -> tuple[torch.nn.Module, LoadReport | None]:
    """The model with its initial weights, and what became of every key.

    Raises:
        ValueError: the weights do not fit, with the keys or the report.
    """
    torch.manual_seed(task.config.run.seed)
    model = task.build()
    try:
        return model, load_initial_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"--init {weights.source} does not fit: {error}") from error


def describe(
    config: FinetuneConfig,
    train: Index,
    val: Index,
    task: DownstreamTask,
    weights: InitialWeights,
    report: LoadReport | None,
) -> str:
    """The header of a run: data, classes, batch and learning-rate arithmetic, the load report."""
    names = ", ".join(task.classes[:5]) + (", ..." if len(task.classes) > 5 else "")
    lines = [
        describe_batches(config, config.num_used(train.num_samples)),
        f"{config.task}: {len(task.classes)} classes ({names}); "
        f"{val.num_samples} validation images; {task.main_metric} decides",
        f"weights   {weights.source}",
    ]
    if report is not None:
        lines += [f"  {line}" for line in str(report).splitlines()]
    return "\n".join(lines)


class FinetuneSession(WorkerSession):
    """One worker's part in a fine-tuning run.

    Args:
        job: what the driver sent (see `trainer.run_training`).
        worker: this process.
    """

    config: FinetuneConfig

    def __init__(self, job: dict[str, Any], worker: Worker) -> None:
        super().__init__(job, worker, config_from_dict(CONFIG_CLASSES[job["task"]], job["config"]))

    def train(self, hooks: Hooks) -> dict[str, Any]:
        """Run the loop; returns what it returns."""
        config, worker = self.config, self.worker
        weights: InitialWeights = ray.get(self.job["weights"][0])
        num_samples = self.job["num_samples"]
        return finetune(
            config,
            create_task(config, self.job["classes"], pretrain_size=weights.image_size),
            weights,
            num_samples=num_samples,
            batches_from=lambda step: TrainingBatches(
                config,
                self.job["train_index"][0],
                rank=worker.rank,
                world_size=worker.world_size,
                start_step=step,
                num_steps=config.num_steps(num_samples),
                build=TRAINING,
            ),
            validation=EvaluationBatches(
                config,
                self.job["val_index"][0],
                VALIDATION,
                rank=worker.rank,
                world_size=worker.world_size,
            ),
            checkpointer=self.checkpointer,
            worker=worker,
            hooks=hooks,
        )
