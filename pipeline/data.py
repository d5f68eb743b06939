"""The data plane: a worker's share of every step, decoded and masked by Ray Data.

Each training worker reads its own Ray dataset of *steps*: one task reads, decodes, crops and masks
the worker's share of a few steps and yields uint8 micro-batches. Surprising: the data set is not
split by Ray. Which samples a worker gets follows from (seed, step, rank), so the global batch is
the same at any worker count and a run starts at any step without replaying one.

What a sample is, its maker says: `SampleFactory` here for pre-training, `downstream/samples.py` for
fine-tuning.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipeline.config import PATCH_SIZE, TrainingConfig
from pipeline.decoding import BadImageError
from pipeline.masking import make_mask, random_mask
from pipeline.placement import remote_args
from pipeline.pretrain_config import PretrainConfig
from pipeline.quarantine import BadSample
from pipeline.reading import SampleReader, UnreadableSampleError
from pipeline.reproducibility import EVAL_EPOCH, sample_generator
from pipeline.sampling import SampleStream
from pipeline.sources import Index
from pipeline.transforms import random_resized_crop

Batch = dict[str, NDArray[Any]]
"""position and row (B,) int64, bad (B,) str: the JSON of a `BadSample`, or empty; and what the
maker of the samples adds, in pre-training image (B, S, S, 3) uint8 and mask (B, N) bool."""

_SAMPLES_PER_TASK = 512  # long enough to hide what starting a task costs, short enough to balance
_TASKS_PER_DATASET = 1024  # a new dataset costs about a second; this many tasks last minutes
_MAX_SUBSTITUTES = 16
CPUS_PER_TASK = 0.66  # three tasks on two CPUs: while one waits for its turn, the others work
_BRIDGE_SAMPLES = 128
_BLOCK_BYTES = 4 * 2**20  # small micro-batches share a block; each costs the training process 1 ms
_EXECUTOR_REST_S = 0.02
_MAX_PATIENCE = 5  # so many blocks must lie ready for the longest rest, half a second
_AHEAD = 2


class Draws(NamedTuple):
    """Which uses of which samples make up a micro-batch; arrays of one shape."""

    positions: NDArray[np.int64]
    """Places in the endless stream of samples."""
    epochs: NDArray[np.int64]
    rows: NDArray[np.int64]


class SampleMaker(Protocol):
    """Makes the samples of one data set."""

    @property
    def reader(self) -> SampleReader:
        """Where their bytes come from."""
        ...

    def batch(self, draws: Draws) -> Batch:
        """Samples of a micro-batch; bad ones are described in `bad`."""
        ...


MakerBuilder = Callable[[Any, Index], SampleMaker]
"""Builds the maker of a run's samples from (config, index); pickled by reference."""


@dataclass(frozen=True)
class SampleFactory:
    """Makes samples of one data set: reading, decoding, cropping, masking."""

    config: PretrainConfig
    reader: SampleReader

    @classmethod
    def build(cls, config: PretrainConfig, index: Index) -> SampleFactory:
        """Factory over an index."""
        return cls(config, SampleReader(index, config.data.image_column))

    def sample(self, epoch: int, row: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Crop (S, S, 3) and mask (N,), True = masked: a function of (seed, epoch, sample id).

        Raises:
            BadImageError: the bytes are not an image.
            UnreadableSampleError: the file is absent, forbidden or damaged.
            StorageUnavailableError: reading failed again and again.
        """
        data, seed = self.config.data, self.config.run.seed
        sample_id, encoded, _ = self.reader.read(row)
        pixels = random_resized_crop(
            encoded,
            sample_generator(seed, epoch, sample_id, "crop"),
            image_size=data.image_size,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            flip_prob=data.flip_prob,
        )
        return pixels, self._mask(epoch, sample_id)

    def _mask(self, epoch: int, sample_id: int) -> NDArray[np.bool_]:
        generator = sample_generator(self.config.run.seed, epoch, sample_id, "mask")
        grid_size = self.config.data.image_size // PATCH_SIZE
        objective = self.config.objective
        return make_mask(objective.mask_type, generator, grid_size, self.config.num_visible)

    def batch(self, draws: Draws) -> Batch:
        """Samples of a micro-batch; a bad one is black, and described in `bad`."""
        size, side = len(draws.rows), self.config.data.image_size
        images = np.empty((size, side, side, 3), np.uint8)  # filled in place: stacking would copy
        masks = np.empty((size, self.config.data.num_patches), np.bool_)
        bad = [""] * size
        for i, (epoch, row) in enumerate(
            zip(draws.epochs.tolist(), draws.rows.tolist(), strict=True)
        ):
            try:
                images[i], masks[i] = self.sample(epoch, row)
            except (BadImageError, UnreadableSampleError) as error:
                images[i] = 0
                masks[i] = self._mask(epoch, 0)  # any will do: the sample weighs nothing
                bad[i] = describe_bad(self.reader, row, error)
        return {
            "position": draws.positions,
            "row": draws.rows,
            "image": images,
            "mask": masks,
            "bad": np.array(bad),
        }

    def evaluation_batch(self, rank: int = 0, world_size: int = 1) -> Batch:
        """This worker's share of the held-out crops: fixed, and never drawn in training.

        Crop j is a use of image j % n in an epoch training never reaches. In place of a bad image
        the next readable one is used.

        Raises:
            ValueError: many images in a row are bad.
        """
        crops = np.arange(rank, self.config.data.num_eval_crops, world_size)
        n = len(self.reader)
        rows = crops % n
        self.reader.plan(rows.tolist())
        samples = [
            self._next_readable(EVAL_EPOCH + int(j) // n, row)
            for j, row in zip(crops, rows.tolist(), strict=True)
        ]
        images, masks, used = (np.stack(column) for column in zip(*samples, strict=True))
        return {"image": images, "mask": masks, "row": used}

    def _next_readable(self, epoch: int, row: int) -> tuple[Any, Any, int]:
        n = len(self.reader)
        tries = min(_MAX_SUBSTITUTES, n)
        problem = ""
        for used in ((row + k) % n for k in range(tries)):
            try:
                return (*self.sample(epoch, used), used)
            except (BadImageError, UnreadableSampleError) as error:
                problem = f"{self.reader.location(used)}: {error}"
        raise ValueError(f"{tries} images in a row are bad, last {problem}; mend the data set")


def describe_bad(reader: SampleReader, row: int, error: ValueError) -> str:
    """What `bad` of a batch says of a sample that could not be made."""
    is_read = not isinstance(error, UnreadableSampleError)
    sample_id = reader.read(row).sample_id if is_read else reader.sample_id(row)
    return json.dumps(BadSample.of(reader.location(row), sample_id, error))


def micro_batches(
    stream: SampleStream, config: TrainingConfig, step: int, rank: int = 0, world_size: int = 1
) -> list[Draws]:
    """One worker's micro-batches of a step. Their samples do not depend on the number of workers,
    only who takes which."""
    whole = stream.step(step, config.data.global_batch_size)
    parts = [_share(column, config, rank, world_size) for column in whole]
    return [Draws(*part) for part in zip(*parts, strict=True)]


def _share(
    column: NDArray[Any], config: TrainingConfig, rank: int, world_size: int
) -> list[NDArray[Any]]:
    """A worker's micro-batches of something a step has for every sample."""
    parts = np.split(column, config.num_micro_batches)
    mine = config.micro_batches_of(rank, world_size)
    return parts[mine.start : mine.stop]


def sample_stream(config: TrainingConfig, index: Index) -> SampleStream:
    """The order of a run's training samples."""
    used = config.num_used(index.num_samples)
    return SampleStream(config.run.seed, index.sizes, config.data.shuffle_window, used)


class TrainingBatches:
    """Iterates over a worker's micro-batches from a step on, through Ray Data.

    With `data.num_cpus=0` a thread of this process makes them instead.

    Args:
        config: the run.
        index_ref: object reference of the index (see `sources.build_index`).
        rank: this worker.
        world_size: workers there are.
        start_step: first step wanted.
        num_steps: step after the last.
        build: makes the maker of the samples.
    """

    def __init__(
        self,
        config: TrainingConfig,
        index_ref: ray.ObjectRef,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int,
        num_steps: int,
        build: MakerBuilder = SampleFactory.build,
    ) -> None:
        self.config = config
        self.index_ref = index_ref
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.num_steps = num_steps
        self.build = build
        self.maker, self.stream = _maker(config, index_ref, build)
        self.micros_per_step = len(config.micro_batches_of(rank, world_size))
        share = self.micros_per_step * config.batch_size_per_worker
        self.steps_per_task = max(1, _SAMPLES_PER_TASK // share)
        self.micros_per_task = self.steps_per_task * self.micros_per_step
        self.micros_per_block = micros_per_block(config, self.micros_per_task)
        self.bridge_steps = max(1, _BRIDGE_SAMPLES // share)

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches of `config.batch_size_per_worker` samples, in order."""
        is_here = self.config.data.num_cpus == 0
        chunk = self.steps_per_task * (1 if is_here else _TASKS_PER_DATASET)
        for first in range(self.start_step, self.num_steps, chunk):
            last = min(first + chunk, self.num_steps)
            if is_here:
                yield from made_ahead(self.maker, list(self._micros(first, last)))
            else:
                yield from self._chunk(first, last)

    def _chunk(self, first: int, last: int) -> Iterator[Batch]:
        """Micro-batches of the steps first..last-1, from one dataset.

        Ray Data needs seconds to start its processes. Meanwhile the first steps' samples are made
        here; they are the same whoever makes them.
        """
        bridged = min(last, first + self.bridge_steps)
        batches = iter(self._ray_batches(bridged, last))
        starter = ThreadPoolExecutor(1, "start-data")
        head = starter.submit(next, batches, None)
        starter.shutdown(wait=False)
        for micro in self._micros(first, bridged):
            yield self.maker.batch(micro)
        rest = chain([head.result()], batches) if bridged < last else ()
        for batch, expected in zip(rest, self._positions(bridged, last), strict=True):
            assert batch is not None, f"Ray Data ended before {expected}"
            in_order = np.array_equal(batch["position"], expected)
            assert in_order, f"Ray Data returned {batch['position']} for {expected}"
            yield batch

    def _ray_batches(self, first: int, last: int) -> Iterator[Batch]:
        if first == last:
            return
        size = self.config.batch_size_per_worker
        # Ray Data passes a batch through three threads of this process: whole blocks are cheapest.
        blocks: Iterable[Batch] = self._dataset(first, last).iter_batches(
            batch_size=size * self.micros_per_block,
            prefetch_batches=-(-self.config.data.prefetch_batches // self.micros_per_block),
            batch_format="numpy",
        )
        for block in blocks:
            for start in range(0, len(block["position"]), size):
                yield {key: column[start : start + size] for key, column in block.items()}

    def _micros(self, first: int, last: int) -> Iterator[Draws]:
        """The worker's micro-batches of the steps first..last-1."""
        for step in range(first, last):
            yield from micro_batches(self.stream, self.config, step, self.rank, self.world_size)

    def _positions(self, first: int, last: int) -> Iterator[NDArray[Any]]:
        """Those of `_micros`; what belongs to them is asked for by the data processes alone."""
        for step in range(first, last):
            positions = self.stream.positions(step, self.config.data.global_batch_size)
            yield from _share(positions, self.config, self.rank, self.world_size)

    def _dataset(self, first: int, last: int) -> ray.data.Dataset:
        """Dataset of the steps first..last-1; one read task a few steps."""
        num_tasks = -(-(last - first) // self.steps_per_task)
        dataset = numbered_tasks(num_tasks, self.config).map_batches(
            _load_steps,
            batch_size=None,
            num_cpus=CPUS_PER_TASK,
            **data_task_args(self.config),
            fn_kwargs={
                "config": self.config,
                "index_ref": [self.index_ref],  # in a list, so that Ray passes the reference itself
                "rank": self.rank,
                "world_size": self.world_size,
                "first": first,
                "last": last,
                "steps_per_task": self.steps_per_task,
                "micros_per_block": self.micros_per_block,
                "build": self.build,
            },
        )
        return tuned(dataset, self.config, self.micros_per_task, self.world_size)


def data_task_args(config: TrainingConfig) -> dict[str, Any]:
    """Arguments that keep Ray tasks to the nodes that decode."""
    return remote_args(config.data.worker_resource, config.data.worker_labels)


def numbered_tasks(num_tasks: int, config: TrainingConfig) -> ray.data.Dataset:
    """A dataset of one block a task, with its number as `id`."""
    if not data_task_args(config):
        return ray.data.range(num_tasks, override_num_blocks=num_tasks)
    # The tasks that make a range take no resources, so they could land anywhere. Made here, the
    # blocks cost the training process 0.8 ms each.
    items = [{"id": number} for number in range(num_tasks)]
    return ray.data.from_items(items, override_num_blocks=num_tasks)


def micros_per_block(config: TrainingConfig, micros_per_task: int) -> int:
    """Micro-batches that travel together: a task's, in even parts."""
    micro_bytes = config.batch_size_per_worker * config.sample_bytes
    parts = -(-micros_per_task // max(1, _BLOCK_BYTES // micro_bytes))
    return -(-micros_per_task // parts)


def tuned(
    dataset: ray.data.Dataset, config: TrainingConfig, micros_per_task: int, world_size: int
) -> ray.data.Dataset:
    """Settings of a worker's dataset: blocks in order, within the worker's share of the machine.

    Every worker runs an executor of its own; none may take the CPUs or the memory of another.
    """
    context = dataset.context
    context.enable_progress_bars = False
    micro_bytes = config.batch_size_per_worker * config.sample_bytes
    # What a task yields is a block as it is: cutting and joining would copy it.
    context.target_max_block_size = micros_per_block(config, micros_per_task) * micro_bytes
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_LoopThrottle]
    cpus = max(1, config.data.num_cpus // world_size)
    num_tasks = max(1, int(cpus / CPUS_PER_TASK)) + 1  # and one that is being read
    num_micros = num_tasks * micros_per_task + config.data.prefetch_batches
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        cpu=cpus, object_store_memory=num_micros * micro_bytes
    )
    return dataset


def made_ahead(maker: SampleMaker, micros: list[Draws]) -> Iterator[Batch]:
    """Micro-batches made by a thread of this process, a few before they are asked for."""
    maker.reader.plan(np.concatenate([draws.rows for draws in micros]).tolist() if micros else [])
    with ThreadPoolExecutor(1, "make-samples") as thread:
        ready: deque[Future[Batch]] = deque()
        for draws in micros:
            ready.append(thread.submit(maker.batch, draws))
            if len(ready) > _AHEAD:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()


class SyntheticBatches:
    """The same micro-batch of random pixels for ever: what training could do with free data."""

    def __init__(self, config: PretrainConfig) -> None:
        generator = np.random.default_rng(config.run.seed)
        size, side = config.batch_size_per_worker, config.data.image_size
        masks = [
            random_mask(generator, config.data.num_patches, config.num_visible) for _ in range(size)
        ]
        self.batch: Batch = {
            "image": generator.integers(0, 256, (size, side, side, 3), np.uint8),
            "mask": np.stack(masks),
            "bad": np.full(size, ""),
        }

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


class _LoopThrottle(ExecutionCallback):
    """Lets the executor's loop rest between rounds, longer while blocks lie ready for training.

    Ray 2.60's loop never sleeps while it waits for its consumer: it spins in a thread of the
    training process, holds the interpreter lock, and halved the speed of training on two cores.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after every round of scheduling."""
        _, output = executor._output_node
        num_ready = len(output.output_queue)
        patience = min(max(1, num_ready), _MAX_PATIENCE)
        for _ in range(patience):
            time.sleep(patience * _EXECUTOR_REST_S)
            if len(output.output_queue) < num_ready:  # taken: there is room for another
                break


def _load_steps(
    tasks: dict[str, NDArray[np.int64]],
    *,
    config: TrainingConfig,
    index_ref: list[ray.ObjectRef],
    rank: int,
    world_size: int,
    first: int,
    last: int,
    steps_per_task: int,
    micros_per_block: int,
    build: MakerBuilder,
) -> Iterator[Batch]:
    """Ray Data task: the worker's share of a few steps, a few micro-batches at a time."""
    maker, stream = _maker(config, index_ref[0], build)
    for task in tasks["id"].tolist():
        begin = first + task * steps_per_task
        micros = [
            micro
            for step in range(begin, min(begin + steps_per_task, last))
            for micro in micro_batches(stream, config, step, rank, world_size)
        ]
        maker.reader.plan(np.concatenate([micro.rows for micro in micros]).tolist())
        for start in range(0, len(micros), micros_per_block):
            block = zip(*micros[start : start + micros_per_block], strict=True)
            yield maker.batch(Draws(*(np.concatenate(columns) for columns in block)))


@lru_cache(maxsize=2)
def _maker(
    config: TrainingConfig, index_ref: ray.ObjectRef, build: MakerBuilder
) -> tuple[SampleMaker, SampleStream]:
    """One maker per data process: the index stays mapped from the object store."""
    index = ray.get(index_ref)
    return build(config, index), sample_stream(config, index)
