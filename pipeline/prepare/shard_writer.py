"""Writing one planned shard: read, check, write, note. Runs in a Ray task; knows nothing of Ray.

Memory: about twice the encoded images of one shard. Surprising: the result is the same to the byte
whenever and wherever it is written, so two tasks that write one shard (after a kill, or a retry by
Ray) cannot harm each other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipeline import storage
from pipeline.decoding import BadImageError
from pipeline.prepare.coco import FrameMismatchError
from pipeline.prepare.plan_folder import FinishedShard, Plan, PlanFolder
from pipeline.prepare.records import location
from pipeline.prepare.sample_check import BadMaskError, SampleChecker
from pipeline.prepare.sample_reader import DamagedFileError, read_encoded
from pipeline.quarantine import BadSample
from pipeline.reproducibility import stable_id
from pipeline.shards import ROWS_PER_GROUP, SHARD_SCHEMA, Shard, write_shard

BAD_SAMPLE_ERRORS = (
    BadImageError,
    BadMaskError,
    DamagedFileError,
    FrameMismatchError,
    *storage.ABSENT_ERRORS,
)
_ANNOTATIONS = ("label", "boxes", "box_masks", "mask")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def write_planned_shard(out: str, number: int) -> FinishedShard:
    """Write shard `number` of the plan in OUT, then note it as finished.

    Raises:
        OSError: reading a sample failed for another reason than its absence, or writing did.
    """
    folder = PlanFolder(out)
    plan = folder.read_plan()
    assert plan is not None, f"{out} has no plan, the driver writes it first"
    records = folder.read_records(number)
    settings = plan.settings
    checker = SampleChecker(verify=settings["verify"], short_side=settings["short_side"])
    rows, bad = _read_rows(plan, records, checker)
    table = _to_table(rows)
    planned = plan.shards[number]
    shard = None
    if table.num_rows:
        path = f"{folder.out}/{planned.split}/{planned.file}"
        shard = _write(folder.filesystem, path, planned.file, table)
    finished = FinishedShard(
        number=number,
        shard=shard,
        bad=sorted(bad),
        counts={key: count for key, count in sorted(checker.counts.items()) if count},
        annotations=[n for n in _ANNOTATIONS if table[n].null_count < table.num_rows],
        highest_mask_id=checker.highest_mask_id,
    )
    folder.write_finished(finished)
    return finished


def _read_rows(
    plan: Plan, records: list[dict[str, Any]], checker: SampleChecker
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """Rows of the good samples in the order of the records, and the bad samples."""
    rows: dict[int, dict[str, Any]] = {}
    bad: list[BadSample] = []
    masks = storage.resolve(plan.mask_root) if plan.mask_root else None
    for i, encoded in read_encoded(records, plan.image_root, plan.settings["image_column"]):
        record = records[i]
        sample_id = stable_id(record["name"])
        try:
            if isinstance(encoded, Exception):
                raise encoded
            mask = _read_mask(*masks, record["mask_path"]) if masks else None
            row = checker.row(record, encoded, mask)
            rows[i] = {"sample_id": sample_id, "name": record["name"], **row}
        except BAD_SAMPLE_ERRORS as error:
            found = BadSample.of(location(plan.image_root, record), sample_id, error)
            # A memory address would make two runs differ.
            bad.append(found._replace(message=_ADDRESS.sub("", found.message)))
    return [rows[i] for i in sorted(rows)], bad


def _to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table, a row group at a time; empties the list, so that images are held once."""
    batches = []
    rows.reverse()
    while rows:
        some = [rows.pop() for _ in range(min(ROWS_PER_GROUP, len(rows)))]
        batches.append(pa.RecordBatch.from_pylist(some, schema=SHARD_SCHEMA))
    return pa.Table.from_batches(batches, schema=SHARD_SCHEMA)


def _read_mask(filesystem: fs.FileSystem, root: str, path: str) -> bytes:
    try:
        return storage.read_bytes(filesystem, f"{root}/{path}")
    except storage.ABSENT_ERRORS as error:
        raise BadMaskError(f"no mask for this image: {error}") from None


def _write(filesystem: fs.FileSystem, path: str, file_name: str, table: pa.Table) -> Shard:
    digest: _Digest | None = None

    def write(file: pa.NativeFile) -> None:
        nonlocal digest
        digest = _Digest(file.write)
        with pa.PythonFile(digest, mode="w") as counted:
            write_shard(table, counted)

    storage.write_atomically(filesystem, path, write)
    assert digest is not None, "write_atomically did not write"
    full, rest = divmod(table.num_rows, ROWS_PER_GROUP)
    return Shard(
        file=file_name,
        num_samples=table.num_rows,
        num_bytes=digest.num_bytes,
        sha256=digest.sha256.hexdigest(),
        row_groups=[ROWS_PER_GROUP] * full + ([rest] if rest else []),
    )


class _Digest:
    """A file to Arrow: passes what is written on, counts and hashes it."""

    def __init__(self, write: Callable[[Any], Any]) -> None:
        self._write = write
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        """Pass on; returns the number of bytes."""
        self._write(data)
        self.sha256.update(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """The file passed on to is closed by who opened it."""
        self.closed = True
