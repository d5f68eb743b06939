"""Runs the fine-tuning loop in this process, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.between_steps import Hooks
from pipeline.checkpoint import MODEL_FILE, Checkpointer
from pipeline.config import RunConfig
from pipeline.config_values import apply_overrides
from pipeline.data import Batch, made_ahead, micro_batches, sample_stream
from pipeline.downstream.tasks import create_task
from pipeline.evaluation_data import share_of
from pipeline.finetune import finetune
from pipeline.finetune_config import (
    CONFIG_CLASSES,
    DetectorConfig,
    FinetuneConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    LabelledDataConfig,
    SegmenterConfig,
    Task,
)
from pipeline.finetuning_run import TRAINING, VALIDATION, open_data, resolve_init
from pipeline.train_state import Worker
from tests.pipeline.labelled_sets import write_labelled_set

NUM_STEPS, EVERY = 7, 3


def finetune_config(task: Task, folder: Path, **overrides: Any) -> FinetuneConfig:
    """A few steps of a tiny model on tiny sets below `folder`, with everything random switched on.

    Args:
        task: which.
        folder: gets train/ and val/ where they are not there yet.
        overrides: written data__flip_prob for data.flip_prob.
    """
    if not folder.exists():
        write_labelled_set(folder / "train", task)
        write_labelled_set(folder / "val", task, num_samples=7, seed=1)
    sections: dict[str, Any] = {}
    if task == "detect":
        sections["detector"] = DetectorConfig(
            min_sizes=(56, 64),
            max_size=128,
            eval_min_size=64,
            head_dim=16,
            fc_dim=16,
            samples_per_image=16,
        )
    if task == "segment":
        sections["segmenter"] = SegmenterConfig(channels=16, eval_short_side=64, window=0)
    config = CONFIG_CLASSES[task](
        run=RunConfig(
            name="run",
            log_every_steps=1,
            checkpoint_every_steps=EVERY,
            evaluate_every_steps=NUM_STEPS,
            picture_every_steps=NUM_STEPS,
        ),
        data=LabelledDataConfig(
            path=str(folder / "train"),
            val_path=str(folder / "val"),
            image_size=64,
            global_batch_size=4,
        ),
        model=FinetuneModelConfig(
            name="itpn_debug", rel_pos_bias=task != "detect", drop_path_rate=0.3
        ),
        optim=FinetuneOptimConfig(
            lr=1e-3, num_steps=NUM_STEPS, layer_decay=0.8, ema_decay=0.9, warmup_ratio=0.2
        ),
        **sections,
    )
    changes = {"init.path": "scratch", "scaling.max_batch_size_per_worker": 2}
    if task == "classify":
        changes |= {"augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.erase_prob": 0.5}
        changes |= {"augment.label_smoothing": 0.1}
    changes |= {key.replace("__", "."): value for key, value in overrides.items()}
    return apply_overrides(config, changes)


class KilledError(Exception):
    """Stands for the death of the process."""


@dataclass
class LocalFinetune:
    """One run of the loop and what it reported."""

    config: FinetuneConfig
    folder: Path
    worker: Worker = Worker()
    dies_before: int = -1
    """Step in whose first micro-batch the process dies."""
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    started_at: int = -1

    @property
    def checkpointer(self) -> Checkpointer:
        return Checkpointer(self.folder, keep=3, facts={}, export_file=MODEL_FILE)

    def __call__(self) -> dict[str, Any]:
        config, weights = resolve_init(self.config)
        train, val, classes = open_data(config)
        validation = VALIDATION(config, val)
        rank, world_size, _ = self.worker
        shares = share_of(validation, config.batch_size_per_worker, rank, world_size)
        checkpointer = self.checkpointer
        try:
            return finetune(
                config,
                create_task(config, classes, pretrain_size=weights.image_size),
                weights,
                num_samples=train.num_samples,
                batches_from=lambda step: self._batches(config, train, step),
                validation=_Repeatable(lambda: made_ahead(validation, shares)),
                checkpointer=checkpointer,
                worker=self.worker,
                hooks=Hooks(
                    on_start=lambda step: setattr(self, "started_at", step),
                    on_metrics=self._on_metrics,
                    on_picture=lambda step, kind, png: self.pictures.update({kind: png}),
                ),
            )
        finally:
            checkpointer.wait()

    def _batches(self, config: FinetuneConfig, index: Any, first: int) -> Iterator[Batch]:
        maker, stream = TRAINING(config, index), sample_stream(config, index)
        for step in range(first, config.num_steps(index.num_samples)):
            if step == self.dies_before:
                raise KilledError
            for draws in micro_batches(
                stream, config, step, self.worker.rank, self.worker.world_size
            ):
                yield maker.batch(draws)

    def _on_metrics(self, step: int, metrics: dict[str, float]) -> bool:
        assert step not in self.records, "no step is logged twice by one process"
        self.records[step] = metrics
        return False


class _Repeatable:
    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.make())
