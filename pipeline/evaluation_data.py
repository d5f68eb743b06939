"""A worker's share of a validation set: every sample once, in order, none twice.

Worker r of n takes rows r, r + n, ...; the last micro-batch may be short, nothing is padded.
Surprising: a small share is decoded by a thread of the training process, because Ray Data needs
seconds to start, which a small evaluation does not take.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from pipeline.config import TrainingConfig
from pipeline.data import (
    CPUS_PER_TASK,
    Batch,
    Draws,
    MakerBuilder,
    SampleMaker,
    data_task_args,
    made_ahead,
    numbered_tasks,
    tuned,
)
from pipeline.reproducibility import EVAL_EPOCH

_SMALL_SHARE = 2048
_MICROS_PER_TASK = 8


class EvaluationBatches:
    """Iterates over a worker's share of a validation set; as often as wanted.

    Args:
        config: the run.
        index_ref: object reference of the index.
        build: makes the maker of the samples.
        rank: this worker.
        world_size: workers there are.
    """

    def __init__(
        self,
        config: TrainingConfig,
        index_ref: ray.ObjectRef,
        build: MakerBuilder,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.index_ref = index_ref
        self.build = build
        self.rank = rank
        self.world_size = world_size
        self.maker = _maker(config, index_ref, build)

    def __iter__(self) -> Iterator[Batch]:
        micros = share_of(self.maker, self.config.batch_size_per_worker, self.rank, self.world_size)
        is_small = sum(len(draws.rows) for draws in micros) <= _SMALL_SHARE
        if is_small or self.config.data.num_cpus == 0:
            return made_ahead(self.maker, micros)
        return self._through_ray_data(len(micros))

    def _through_ray_data(self, num_micros: int) -> Iterator[Batch]:
        num_tasks = -(-num_micros // _MICROS_PER_TASK)
        dataset = numbered_tasks(num_tasks, self.config).map_batches(
            _load_share,
            batch_size=None,
            num_cpus=CPUS_PER_TASK,
            **data_task_args(self.config),
            fn_kwargs={
                "config": self.config,
                "index_ref": [self.index_ref],  # in a list: Ray passes the reference itself
                "build": self.build,
                "rank": self.rank,
                "world_size": self.world_size,
            },
        )
        dataset = tuned(dataset, self.config, _MICROS_PER_TASK, self.world_size)
        batches: Iterator[Batch] = iter(
            dataset.iter_batches(
                batch_size=self.config.batch_size_per_worker,
                prefetch_batches=self.config.data.prefetch_batches,
                batch_format="numpy",
            )
        )
        return batches


def share_of(maker: SampleMaker, size: int, rank: int = 0, world_size: int = 1) -> list[Draws]:
    """A worker's micro-batches of a validation set, of `size` samples but for the last."""
    rows = np.arange(rank, len(maker.reader), world_size)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [Draws(part, np.full_like(part, EVAL_EPOCH), part) for part in parts]


def _load_share(
    tasks: dict[str, NDArray[np.int64]],
    *,
    config: TrainingConfig,
    index_ref: list[ray.ObjectRef],
    build: MakerBuilder,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Ray Data task: a few micro-batches of a worker's share."""
    maker = _maker(config, index_ref[0], build)
    micros = share_of(maker, config.batch_size_per_worker, rank, world_size)
    for task in tasks["id"].tolist():
        mine = micros[task * _MICROS_PER_TASK : (task + 1) * _MICROS_PER_TASK]
        maker.reader.plan(np.concatenate([draws.rows for draws in mine]).tolist())
        for draws in mine:
            yield maker.batch(draws)


@lru_cache(maxsize=2)
def _maker(config: TrainingConfig, index_ref: ray.ObjectRef, build: MakerBuilder) -> SampleMaker:
    """One maker per process: the index stays mapped from the object store."""
    return build(config, ray.get(index_ref))
