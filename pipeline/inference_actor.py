"""A model that works through rows of an index: what an actor of a batch inference does.

Surprising: images are decoded by threads of the actor, one batch ahead of the model, and not by
Ray tasks of their own: a decoded photograph is ten times its file, and would have to cross the
object store. So an actor's memory holds two decoded batches, whatever the number of images.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.config import require_positive
from pipeline.credentials import require_no_password
from pipeline.data import describe_bad
from pipeline.decoding import BadImageError
from pipeline.onednn_products import use_onednn
from pipeline.placement import require_labels
from pipeline.reading import Sample, SampleReader, UnreadableSampleError
from pipeline.shards import SHARD_SCHEMA
from pipeline.sources import Index

PICTURE = "_picture"
"""Key of a row's picture, a JPEG file."""
INTERNAL = pa.schema(
    [
        pa.field("_row", pa.int64()),
        pa.field("_bad", pa.string()),
        pa.field(PICTURE, pa.binary()),
        pa.field("_failure", pa.string()),
    ]
)
"""What only the driver sees: index row; the JSON of a `BadSample`, or empty; picture; what ended
the actor's work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceConfig:
    """What every batch inference is told."""

    images: str
    """An image, a folder of images (searched recursively), Parquet of encoded images or a prepared
    data set; local, or a URI such as s3://bucket/folder; every node reads it."""
    out: str
    """New folder to write, local to the driver or a URI."""
    image_column: str = "image"
    """Column of Parquet files without a manifest that holds the encoded bytes."""
    batch_size: int = 8
    """Images a model gets at a time; changes the speed, not the results."""
    num_actors: int = 1
    """Copies of the model that work at the same time."""
    cpus_per_actor: int = 1
    """Logical CPUs of each: its threads for decoding and, without a GPU, for the model."""
    use_gpu: bool = False
    """Give each copy a GPU of its own."""
    worker_resource: str = ""
    """Custom Ray resource of the nodes to work on; each takes a thousandth of one."""
    worker_labels: tuple[str, ...] = ()
    """Labels of the nodes to work on: KEY=VALUE, or KEY=!VALUE for all others."""
    max_bad_fraction: float = 0.01
    """Share of bad images above which the job stops; one is always forgiven unless it is 0."""

    def __post_init__(self) -> None:
        for key in ("images", "out"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty; give --{key} PATH")
            require_no_password(key, getattr(self, key))
        for key in ("batch_size", "num_actors", "cpus_per_actor"):
            require_positive(key, getattr(self, key))
        require_labels("worker_labels", self.worker_labels)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")


class LoadedImage(NamedTuple):
    """An image that an actor's threads have read and decoded."""

    row: int
    """In the index."""
    image: Any
    """What `Inference.load` returned."""
    known: dict[str, Any]
    """Columns known without the model: path, sample_id, annotations."""


class Inference(Protocol):
    """What is done with images. Made by the driver; each actor gets a copy."""

    @property
    def annotations(self) -> tuple[str, ...]:
        """Columns of a prepared data set to keep; not in `schema`."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Columns it adds to those every row has."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the model."""
        ...

    def load(self, sample: Sample) -> Any:
        """Decode an image; called by several threads at once.

        Raises:
            BadImageError: the bytes are not an image.
        """
        ...

    def infer(self, images: list[LoadedImage]) -> list[dict[str, Any]]:
        """A row for each image: values of `schema` and perhaps PICTURE."""
        ...


class InferenceActor:
    """Infers rows of an index.

    Args:
        inference: what to do with them.
        index: where the images are.
        config: batch size, threads, device.
    """

    def __init__(self, inference: Inference, index: Index, config: InferenceConfig) -> None:
        self.inference = inference
        self.batch_size = config.batch_size
        self.reader = SampleReader(index, config.image_column, _columns(inference, index))
        self.schema = row_schema(inference, index)
        self._threads = ThreadPoolExecutor(config.cpus_per_actor, "load")
        self._reading = threading.Lock()  # the reader is for one thread at a time
        if not config.use_gpu:
            use_onednn()
        inference.to(torch.device("cuda" if config.use_gpu else "cpu"))

    def __call__(self, tasks: dict[str, NDArray[np.int64]]) -> Iterator[pa.Table]:
        """Tables of the rows first ... last-1 of each task, a batch at a time.

        What is no image's fault comes back as text: a user should see no remote traceback.
        """
        for first, last in zip(tasks["first"].tolist(), tasks["last"].tolist(), strict=True):
            try:
                yield from self.tables(range(first, last))
            except (OSError, torch.OutOfMemoryError) as error:
                failure = f"{type(error).__name__}: {error}"
                yield pa.Table.from_pylist([{"_row": first, "_failure": failure}], self._full)

    def tables(self, rows: range) -> Iterator[pa.Table]:
        """The same for some rows.

        Raises:
            StorageUnavailableError: reading failed again and again.
            torch.OutOfMemoryError: a batch is too large for the device.
        """
        self.reader.plan(rows)
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        ahead = [self._loading(part) for part in parts[:1]]
        for following in [*parts[1:], None]:
            futures = ahead.pop()
            if following is not None:
                ahead.append(self._loading(following))
            yield self._table([future.result() for future in futures])

    @property
    def _full(self) -> pa.Schema:
        return pa.schema([*self.schema, *INTERNAL])

    def _loading(self, rows: range) -> list[Future[LoadedImage | dict[str, Any]]]:
        return [self._threads.submit(self._load, row) for row in rows]

    def _load(self, row: int) -> LoadedImage | dict[str, Any]:
        """The image, or a row that describes why there is none."""
        try:
            with self._reading:
                sample = self.reader.read(row)
            return LoadedImage(row, self.inference.load(sample), self._known(row, sample))
        except (BadImageError, UnreadableSampleError) as error:
            with self._reading:
                return {"_row": row, "_bad": describe_bad(self.reader, row, error)}

    def _known(self, row: int, sample: Sample) -> dict[str, Any]:
        known = {"path": self.reader.location(row), "sample_id": sample.sample_id}
        return {**known, **sample.annotations}

    def _table(self, loaded: list[LoadedImage | dict[str, Any]]) -> pa.Table:
        """One batch, in its order; bad images have only the internal columns."""
        good = [image for image in loaded if isinstance(image, LoadedImage)]
        inferred = iter(self.inference.infer(good)) if good else iter(())
        rows = [
            {"_row": one.row, **one.known, **next(inferred)}
            if isinstance(one, LoadedImage)
            else one
            for one in loaded
        ]
        return pa.Table.from_pylist(rows, self._full)


def row_schema(inference: Inference, index: Index) -> pa.Schema:
    """Columns of the rows: path, sample_id, of a prepared data set name and annotations, and the
    inference's own.
    """
    known = [pa.field("path", pa.string()), pa.field("sample_id", pa.uint64())]
    kept = [SHARD_SCHEMA.field(name) for name in _columns(inference, index)]
    # Nullable: on its way to the driver, a bad image has a row without values.
    return pa.schema([*known, *(field.with_nullable(True) for field in kept), *inference.schema])


def _columns(inference: Inference, index: Index) -> tuple[str, ...]:
    return ("name", *inference.annotations) if index.is_prepared else ()
