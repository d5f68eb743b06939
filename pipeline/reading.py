"""Reading encoded samples by index row.

Parquet is read by row groups, each once while it is needed; what lies across a network is fetched
ahead by threads. Surprising: an error while *reading* is retried and raised, an error in what was
read makes the sample bad. A truncated file and a broken line must not be mixed up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.reproducibility import stable_id
from pipeline.sources import Index

_FETCH_THREADS = 8
_KEPT_GROUPS = 4
_KEPT_FOOTERS = 64


class UnreadableSampleError(ValueError):
    """The sample's file is absent, forbidden or damaged; the cause says which."""


class Sample(NamedTuple):
    """An encoded image."""

    sample_id: int
    encoded: bytes
    annotations: dict[str, Any]
    """Values of the columns asked for (see `shards.SHARD_SCHEMA`), plain Python."""


class _Group(NamedTuple):
    """Samples that are read together."""

    sample_ids: list[int]
    images: pa.ChunkedArray | list[bytes]
    annotations: dict[str, pa.ChunkedArray]


class SampleReader:
    """Reads samples of a data set by index row.

    Args:
        index: what the data set holds.
        image_column: Parquet column with the encoded bytes, plain or a {bytes, path} struct; a
            prepared data set has its own.
        columns: annotations to read beside them, of a prepared data set.
    """

    def __init__(
        self, index: Index, image_column: str = "image", columns: tuple[str, ...] = ()
    ) -> None:
        assert index.is_prepared or not columns, "only prepared data sets have annotations"
        self.index = index
        self.columns = columns
        self.image_column = "image" if index.is_prepared else image_column
        self.num_samples = index.num_samples
        self._filesystem, self._root = storage.resolve(index.root)
        self._is_remote = not storage.is_local(self._filesystem)
        sizes = index.sizes
        self._ends = None if isinstance(sizes, int) else np.cumsum(sizes)
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._kept = _KEPT_GROUPS
        self._fetched: dict[int, Future[_Group]] = {}
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return self.num_samples

    def location(self, row: int) -> str:
        """Where a sample is, for people: a path, or path:row-group:row."""
        group, place = self._find(row)
        path = self._path(group)
        if self._ends is None:
            return path
        return f"{path}:{self.index.groups['row_group'][group].as_py()}:{place}"

    def sample_id(self, row: int) -> int | None:
        """Id of a sample whose bytes could not be read; None when only its file knows."""
        if self.index.is_prepared:
            return None
        group, place = self._find(row)
        name = self.index.groups["file"][group].as_py()
        if self._ends is None:
            return stable_id(name)
        return stable_id(f"{name}:{self.index.groups['first_row'][group].as_py() + place}")

    def plan(self, rows: Iterable[int]) -> None:
        """Announce the rows that will be read next: their groups are kept, others dropped.

        From a network they are fetched ahead, in the order given.
        """
        wanted = list(dict.fromkeys(self._find(row)[0] for row in rows))
        self._kept = max(_KEPT_GROUPS, len(wanted))
        for group in set(self._groups) - set(wanted):
            del self._groups[group]
        if self._is_remote:
            self._threads = self._threads or ThreadPoolExecutor(_FETCH_THREADS)
            self._fetched = {
                group: self._threads.submit(self._load, group)
                for group in wanted
                if group not in self._groups
            }

    def read(self, row: int) -> Sample:
        """Id and encoded bytes of one sample; a null image has no bytes.

        Raises:
            UnreadableSampleError: its file is absent, forbidden or damaged.
            StorageUnavailableError: reading failed again and again.
            ValueError: the Parquet file has no such image column.
        """
        number, place = self._find(row)
        if number not in self._groups:
            future = self._fetched.pop(number, None)
            self._groups[number] = future.result() if future else self._load(number)
            while len(self._groups) > self._kept:
                self._groups.popitem(last=False)
        self._groups.move_to_end(number)
        group = self._groups[number]
        value = group.images[place]
        if isinstance(value, pa.Scalar):
            value = value.as_py()
        encoded = value["bytes"] if isinstance(value, dict) else value  # Hugging Face struct
        annotations = {key: column[place].as_py() for key, column in group.annotations.items()}
        return Sample(group.sample_ids[place], encoded or b"", annotations)

    def _find(self, row: int) -> tuple[int, int]:
        """Group of a row, and its place in the group."""
        if self._ends is None:
            return row, 0
        group = int(np.searchsorted(self._ends, row, side="right"))
        return group, row - int(self._ends[group - 1] if group else 0)

    def _path(self, group: int) -> str:
        return f"{self._root}/{self.index.groups['file'][group].as_py()}"

    def _load(self, group: int) -> _Group:
        path = self._path(group)
        try:
            if self._ends is None:
                encoded = storage.read_bytes(self._filesystem, path)
                name = self.index.groups["file"][group].as_py()
                return _Group([stable_id(name)], [encoded], {})
            table = self._read_row_group(path, self.index.groups["row_group"][group].as_py())
        except storage.StorageUnavailableError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise UnreadableSampleError(str(error)) from error
        if self.image_column not in table.column_names:
            raise ValueError(
                f"data.image_column='{self.image_column}' is not in {path}; its columns are "
                f"{', '.join(self._footers[path].schema.to_arrow_schema().names)}"
            )
        annotations = {key: table[key] for key in self.columns}
        return _Group(self._sample_ids(group, table), table[self.image_column], annotations)

    def _read_row_group(self, path: str, row_group: int) -> pa.Table:
        columns = ["sample_id"] if self.index.is_prepared else []
        columns += [self.image_column, *self.columns]
        footer = self._footers.get(path)
        with storage.open_retrying(self._filesystem, path) as stream:
            file = pq.ParquetFile(stream, metadata=footer)
            if footer is None:
                self._footers[path] = file.metadata
                while len(self._footers) > _KEPT_FOOTERS:
                    self._footers.popitem(last=False)
            return file.read_row_group(row_group, columns, use_threads=False)

    def _sample_ids(self, group: int, table: pa.Table) -> list[int]:
        if self.index.is_prepared:
            ids: list[int] = table["sample_id"].to_pylist()
            return ids
        name = self.index.groups["file"][group].as_py()
        first = self.index.groups["first_row"][group].as_py()
        return [stable_id(f"{name}:{first + place}") for place in range(table.num_rows)]
