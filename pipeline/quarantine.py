"""Bad samples: what could not be used, where it lies and why; kept as a Parquet file.

A bad image never ends a run by itself. Only their number does, above a share the user sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

QUARANTINE_FILE = "quarantine.parquet"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in messages about objects; two runs would differ
_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("sample_id", pa.uint64()),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


class BadSample(NamedTuple):
    """One sample that could not be used."""

    path: str
    """Where it is: a file, or file:row-group:row; unique in a data set."""
    sample_id: int | None
    """None when the file holding the id cannot be read either."""
    error: str
    """Class of the error, such as UnidentifiedImageError."""
    message: str

    @classmethod
    def of(cls, path: str, sample_id: int | None, error: BaseException) -> BadSample:
        """From an exception; its cause, where it has one, says more."""
        origin = error.__cause__ or error
        message = _ADDRESS.sub("", str(origin)) or type(origin).__name__
        return cls(path, sample_id, type(origin).__name__, message)

    def __str__(self) -> str:
        return f"{self.path}: {self.error}: {self.message}"


def bad_samples(batch: dict[str, Any]) -> list[BadSample]:
    """Those of a micro-batch (see `data.Batch`)."""
    return [BadSample(*json.loads(text)) for text in batch["bad"] if text]


class TooManyBadSamplesError(ValueError):
    """More samples are bad than `max_bad_fraction` allows."""


def write_quarantine(path: str, samples: Iterable[BadSample]) -> None:
    """Write quarantine.parquet, sorted by path; replaces an older one at once or not at all."""
    rows = [sample._asdict() for sample in sorted(samples, key=lambda sample: sample.path)]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    filesystem, inner = storage.resolve(path)
    storage.write_atomically(filesystem, inner, lambda file: pq.write_table(table, file))


def read_quarantine(path: str) -> list[BadSample]:
    """The samples of a quarantine.parquet; none when there is no such file."""
    filesystem, inner = storage.resolve(path)
    if not storage.list_files(filesystem, inner):
        return []
    with storage.open_retrying(filesystem, inner) as file:
        table = pq.read_table(file, schema=_SCHEMA)
    return [BadSample(**row) for row in table.to_pylist()]


def check_bad_fraction(
    samples: Iterable[BadSample], num_samples: int, max_bad_fraction: float, setting: str
) -> None:
    """Stop a run that has met too many bad samples.

    One bad sample is always allowed unless the limit is 0: one bad file must kill no small run.

    Raises:
        TooManyBadSamplesError: names the first of them.
    """
    bad = sorted(samples)
    allowed = max(max_bad_fraction * num_samples, 1.0 if max_bad_fraction else 0.0)
    if len(bad) > allowed:
        shown = "\n  ".join(str(sample) for sample in bad[:5])
        raise TooManyBadSamplesError(
            f"{len(bad)} of {num_samples} samples are bad, more than {setting}={max_bad_fraction} "
            f"allows:\n  {shown}\nmend or remove them, or raise the limit"
        )
