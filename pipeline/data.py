"""The data plane: a worker's share of every step, decoded and masked by Ray Data.

Each training worker reads its own Ray dataset of *steps*: one task reads, decodes, crops and masks
the worker's share of a few steps and yields uint8 micro-batches. Surprising: the data set is not
split by Ray. Which samples a worker gets follows from (seed, step, rank), so the global batch is
the same at any worker count and a run starts at any step without replaying one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipeline.config import PretrainConfig
from pipeline.masking import random_mask
from pipeline.reproducibility import EVAL_EPOCH, sample_generator
from pipeline.sampling import SampleStream, step_positions
from pipeline.sources import SampleReader, group_sizes
from pipeline.transforms import BadImageError, crop_image, decode_image

Batch = dict[str, NDArray[Any]]
"""image (B, S, S, 3) uint8, mask (B, N) bool, position / row / bad_row (B,) int64."""

_SAMPLES_PER_TASK = 128  # long enough to hide the 10 ms a task costs, short enough for fast starts
_TASKS_PER_DATASET = 1024  # a new dataset costs about a second; this many tasks last minutes
_MAX_SUBSTITUTES = 16
_BLOCK_BYTES = 16 * 2**20
_EXECUTOR_REST_S = 0.02


@dataclass(frozen=True)
class SampleFactory:
    """Makes samples of one data set: reading, decoding, cropping, masking."""

    config: PretrainConfig
    reader: SampleReader
    stream: SampleStream

    @classmethod
    def build(cls, config: PretrainConfig, index: pa.Table) -> SampleFactory:
        """Factory over an index table."""
        data = config.data
        reader = SampleReader(index, data.image_column)
        stream = SampleStream(config.run.seed, group_sizes(index), data.shuffle_window)
        return cls(config, reader, stream)

    def sample(self, epoch: int, row: int) -> dict[str, Any]:
        """One sample. A function of (seed, epoch, sample id), whoever asks.

        An unreadable image is replaced by the next readable one, and the row is reported in
        `bad_row` (-1 otherwise).

        Raises:
            ValueError: many images in a row are unreadable.
        """
        data, n = self.config.data, len(self.reader)
        problem = ""
        for k in range(min(_MAX_SUBSTITUTES, n)):
            used = (row + k) % n
            try:
                image = decode_image(self.reader.read(used))
            except BadImageError as error:
                problem = f"{self.reader.location(used)}: {error}"
                continue
            sample_id = int(self.reader.sample_ids[used])
            crops = sample_generator(self.config.run.seed, epoch, sample_id, "crop")
            masks = sample_generator(self.config.run.seed, epoch, sample_id, "mask")
            pixels = crop_image(
                image,
                crops,
                image_size=data.image_size,
                scale=data.crop_scale,
                ratio=data.crop_ratio,
                flip_prob=data.flip_prob,
            )
            mask = random_mask(masks, data.num_patches, self.config.num_visible)
            return {"image": pixels, "mask": mask, "row": used, "bad_row": row if k else -1}
        raise ValueError(
            f"{min(_MAX_SUBSTITUTES, n)} images in a row cannot be decoded, last {problem}; "
            "check data.path"
        )

    def batch(self, positions: NDArray[np.int64]) -> Batch:
        """Samples at stream positions."""
        epochs, rows = self.stream.at(positions)
        pairs = zip(epochs.tolist(), rows.tolist(), strict=True)
        return {"position": positions, **_stack([self.sample(e, r) for e, r in pairs])}

    def evaluation_batch(self, rank: int = 0, world_size: int = 1) -> Batch:
        """This worker's share of the held-out crops: fixed, and never drawn in training.

        Crop j is a use of image j % n in an epoch training never reaches.
        """
        crops = np.arange(rank, self.config.data.num_eval_crops, world_size)
        n = len(self.reader)
        return _stack([self.sample(EVAL_EPOCH + int(j) // n, int(j) % n) for j in crops])


def _stack(samples: list[dict[str, Any]]) -> Batch:
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def micro_batches(step: int, config: PretrainConfig, rank: int) -> list[NDArray[np.int64]]:
    """Stream positions of one worker's micro-batches of a step."""
    positions = step_positions(
        step,
        global_batch_size=config.data.global_batch_size,
        rank=rank,
        world_size=config.scaling.num_workers,
    )
    return np.split(positions, config.accumulation_steps)


class TrainingBatches:
    """Iterates over a worker's micro-batches from a step on, through Ray Data.

    Args:
        config: the run.
        index_ref: object reference of the index table (see `sources.build_index`).
        rank: this worker.
        start_step: first step wanted.
        num_steps: step after the last.
    """

    def __init__(
        self,
        config: PretrainConfig,
        index_ref: ray.ObjectRef,
        *,
        rank: int,
        start_step: int,
        num_steps: int,
    ) -> None:
        self.config = config
        self.index_ref = index_ref
        self.rank = rank
        self.start_step = start_step
        self.num_steps = num_steps
        share = config.data.global_batch_size // config.scaling.num_workers
        self.steps_per_task = max(1, _SAMPLES_PER_TASK // share)

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches of `config.batch_size_per_worker` samples, in order."""
        chunk = self.steps_per_task * _TASKS_PER_DATASET
        for first in range(self.start_step, self.num_steps, chunk):
            last = min(first + chunk, self.num_steps)
            batches = self._dataset(first, last).iter_batches(
                batch_size=self.config.batch_size_per_worker,
                prefetch_batches=self.config.data.prefetch_batches,
                batch_format="numpy",
            )
            for batch, expected in zip(batches, self._micros(first, last), strict=True):
                in_order = np.array_equal(batch["position"], expected)
                assert in_order, f"Ray Data returned {batch['position']} for {expected}"
                yield batch

    def _micros(self, first: int, last: int) -> Iterator[NDArray[np.int64]]:
        """Stream positions of the worker's micro-batches of the steps first..last-1."""
        for step in range(first, last):
            yield from micro_batches(step, self.config, self.rank)

    def _dataset(self, first: int, last: int) -> ray.data.Dataset:
        """Dataset of the steps first..last-1; one read task a few steps."""
        num_tasks = -(-(last - first) // self.steps_per_task)
        dataset = ray.data.range(num_tasks, override_num_blocks=num_tasks).map_batches(
            _load_steps,
            batch_size=None,
            fn_kwargs={
                "config": self.config,
                "index_ref": [self.index_ref],  # in a list, so that Ray passes the reference itself
                "rank": self.rank,
                "first": first,
                "last": last,
                "steps_per_task": self.steps_per_task,
            },
        )
        context = dataset.context
        context.enable_progress_bars = False
        context.target_max_block_size = _BLOCK_BYTES
        context.execution_options.preserve_order = True
        context.custom_execution_callback_classes = [_LoopThrottle]
        # Every worker runs its own executor; none may take the CPUs of another.
        cpus = max(1, self.config.data.num_cpus // self.config.scaling.num_workers)
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=cpus)
        return dataset


class _LoopThrottle(ExecutionCallback):
    """Lets the executor's loop rest between rounds.

    Ray 2.60's loop never sleeps while it waits for its consumer: it spins in a thread of the
    training process, holds the interpreter lock, and halved the speed of training on two cores.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after every round of scheduling."""
        time.sleep(_EXECUTOR_REST_S)


def _load_steps(
    tasks: dict[str, NDArray[np.int64]],
    *,
    config: PretrainConfig,
    index_ref: list[ray.ObjectRef],
    rank: int,
    first: int,
    last: int,
    steps_per_task: int,
) -> Iterator[Batch]:
    """Ray Data task: the worker's share of a few steps, one micro-batch at a time."""
    factory = _factory(config, index_ref[0])
    for task in tasks["id"].tolist():
        begin = first + task * steps_per_task
        for step in range(begin, min(begin + steps_per_task, last)):
            for positions in micro_batches(step, config, rank):
                yield factory.batch(positions)


@lru_cache(maxsize=2)
def _factory(config: PretrainConfig, index_ref: ray.ObjectRef) -> SampleFactory:
    """One factory per data process: the index stays mapped from the object store."""
    return SampleFactory.build(config, ray.get(index_ref))


def probe(config: PretrainConfig, index: pa.Table, num_images: int = 32) -> dict[str, Any]:
    """Decode a few images before any worker is started.

    Returns:
        Counts, sizes, time per image, and what was wrong with unreadable ones.

    Raises:
        ValueError: not one of the probed images can be decoded.
    """
    factory = SampleFactory.build(config, index)
    rows = np.unique(np.linspace(0, len(factory.reader) - 1, num_images).astype(int)).tolist()
    sizes: list[tuple[int, int]] = []
    problems: list[str] = []
    start = time.perf_counter()
    for row in rows:
        try:
            sizes.append(decode_image(factory.reader.read(row)).size)
            factory.sample(0, row)
        except BadImageError as error:
            problems.append(f"{factory.reader.location(row)}: {error}")
    seconds = (time.perf_counter() - start) / max(1, len(sizes)) / 2  # decoded twice
    if not sizes:
        raise ValueError(
            f"data.path='{config.data.path}': none of {len(rows)} probed images can be decoded; "
            f"first problem: {problems[0]}"
        )
    widths, heights = zip(*sizes, strict=True)
    return {
        "num_samples": len(factory.reader),
        "num_probed": len(rows),
        "problems": problems,
        "smallest": (min(widths), min(heights)),
        "largest": (max(widths), max(heights)),
        "seconds_per_image": seconds,
    }
