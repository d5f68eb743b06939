"""Encoded bytes of planned samples: whole files, ranges of tars, rows of Parquet files.

Surprising: samples come in the order that is cheapest to read, not in the order asked for. Parquet
row groups are streamed in small batches, so memory holds the rows wanted and no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import storage

_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20
Read = tuple[int, bytes | Exception]
"""Place in the list of records, and the bytes or why there are none."""


class DamagedFileError(ValueError):
    """A Parquet file whose rows cannot be read."""


def read_encoded(
    records: list[dict[str, Any]], image_root: str, image_column: str
) -> Iterator[Read]:
    """Bytes of every record, or the error that says the file is not there for us.

    Raises:
        StorageUnavailableError: reading failed again and again.
    """
    filesystem, inner = storage.resolve(image_root)
    if records and records[0]["row"] >= 0:
        yield from _read_rows(filesystem, inner, records, image_column)
        return
    order = sorted(range(len(records)), key=lambda i: (records[i]["path"], records[i]["offset"]))
    for i in order:
        try:
            yield i, _read_file(filesystem, inner, records[i])
        except storage.ABSENT_ERRORS as error:
            yield i, error


def _read_file(filesystem: fs.FileSystem, inner: str, record: dict[str, Any]) -> bytes:
    path, offset = f"{inner}/{record['path']}", record["offset"]
    if offset < 0:
        return storage.read_bytes(filesystem, path)

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read_at(record["num_bytes"], offset))

    return storage.with_retries(read, path)


def _read_rows(
    filesystem: fs.FileSystem, inner: str, records: list[dict[str, Any]], column: str
) -> Iterator[Read]:
    wanted: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    for i, record in enumerate(records):
        wanted[record["path"], record["row_group"]][record["row"]] = i
    for (name, row_group), places in sorted(wanted.items()):
        try:
            for row, value in _stream_row_group(filesystem, f"{inner}/{name}", row_group, column):
                if row in places:
                    yield places.pop(row), _image_bytes(value.as_py())
        except storage.StorageUnavailableError:
            raise
        except storage.ABSENT_ERRORS as error:
            yield from ((i, error) for i in places.values())
        except (OSError, pa.ArrowException) as error:
            damage = DamagedFileError(f"row group {row_group} cannot be read: {error}")
            yield from ((i, damage) for i in places.values())


def _stream_row_group(
    filesystem: fs.FileSystem, path: str, row_group: int, column: str
) -> Iterator[tuple[int, pa.Scalar]]:
    """Row in the group, and what the column holds there."""
    first = 0
    with storage.open_retrying(filesystem, path) as stream:
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        batches = file.iter_batches(
            _BATCH_ROWS, row_groups=[row_group], columns=[column], use_threads=False
        )
        for batch in batches:
            for row, value in enumerate(batch.column(0)):
                yield first + row, value
            first += batch.num_rows


def _image_bytes(value: Any) -> bytes:
    """Plain bytes, or the Hugging Face struct; nothing at all becomes an empty image."""
    encoded = value.get("bytes") if isinstance(value, dict) else value
    return bytes(encoded or b"")
