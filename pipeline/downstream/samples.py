"""Samples of the downstream tasks: read, made by the task's rule, packed into bytes.

A data process runs this; it imports no torch. Surprising: a sample travels as bytes (safetensors,
which holds arrays and nothing that runs), because detection's images, boxes and masks have a size
of their own each, and one way for all tasks is simpler than two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pipeline.data import Batch, Draws, describe_bad
from pipeline.decoding import BadImageError
from pipeline.finetune_config import FinetuneConfig
from pipeline.reading import Sample, SampleReader, UnreadableSampleError
from pipeline.reproducibility import sample_generator
from pipeline.sources import Index

Arrays = dict[str, NDArray[Any]]
"""One sample; what is in it, the task says."""


class BadAnnotationError(ValueError):
    """An annotation that does not fit its image or its classes; the sample is quarantined."""


class TaskSamples(Protocol):
    """How one task makes its samples. Picklable; imports no torch."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Annotations it reads (see `shards.SHARD_SCHEMA`)."""
        ...

    def train(self, sample: Sample, generator: np.random.Generator) -> Arrays:
        """A training sample, random by the generator alone."""
        ...

    def evaluate(self, sample: Sample) -> Arrays:
        """A validation sample; nothing random."""
        ...

    def blank(self) -> Arrays:
        """A sample of no content, in the place of a bad one."""
        ...


@dataclass(frozen=True)
class LabelledMaker:
    """Makes the samples of one data set (a `data.SampleMaker`)."""

    config: FinetuneConfig
    reader: SampleReader
    samples: TaskSamples
    is_training: bool

    def sample(self, epoch: int, row: int) -> Arrays:
        """One sample: a function of (seed, epoch, sample id).

        Raises:
            BadImageError: the bytes are not an image.
            BadAnnotationError: its annotations do not fit.
            UnreadableSampleError: the file is absent, forbidden or damaged.
            StorageUnavailableError: reading failed again and again.
        """
        sample = self.reader.read(row)
        if not self.is_training:
            return self.samples.evaluate(sample)
        seed = self.config.run.seed
        return self.samples.train(sample, sample_generator(seed, epoch, sample.sample_id, "crop"))

    def batch(self, draws: Draws) -> Batch:
        """Samples of a micro-batch as bytes in `packed`; a bad one is blank, described in `bad`."""
        packed: list[bytes] = []
        bad: list[str] = []
        for epoch, row in zip(draws.epochs.tolist(), draws.rows.tolist(), strict=True):
            problem = ""
            try:
                arrays = self.sample(epoch, row)
            except (BadImageError, BadAnnotationError, UnreadableSampleError) as error:
                arrays, problem = self.samples.blank(), describe_bad(self.reader, row, error)
            packed.append(pack(arrays))
            bad.append(problem)
        column = np.empty(len(packed), dtype=object)
        column[:] = packed
        return {
            "position": draws.positions,
            "row": draws.rows,
            "packed": column,
            "bad": np.array(bad),
        }


def pack(arrays: Arrays) -> bytes:
    """Arrays of any shapes as bytes."""
    return save({key: np.asarray(array, order="C") for key, array in arrays.items()})


def unpack(batch: Batch) -> list[Arrays]:
    """The samples of a micro-batch, in order, blank ones too."""
    return [load(data) for data in batch["packed"]]


def maker_builder(
    make_samples: Callable[[FinetuneConfig, Index], TaskSamples], *, is_training: bool
) -> Callable[[FinetuneConfig, Index], LabelledMaker]:
    """What `data.TrainingBatches` and `EvaluationBatches` take as `build`; hashable, picklable."""
    return _Builder(make_samples, is_training)


@dataclass(frozen=True)
class _Builder:
    make_samples: Callable[[FinetuneConfig, Index], TaskSamples]
    is_training: bool

    def __call__(self, config: FinetuneConfig, index: Index) -> LabelledMaker:
        samples = self.make_samples(config, index)
        reader = SampleReader(index, columns=samples.columns)
        return LabelledMaker(config, reader, samples, self.is_training)
