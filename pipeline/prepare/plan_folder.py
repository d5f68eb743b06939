"""The working folder of a preparation: its plan, and what is finished of it.

`OUT/_preparing` holds plan.parquet (one row group a shard), plan.json (written after it, so a plan
with it is whole) and one small file for each finished shard. Surprising: a run that resumes never
looks at the source's listing again; files added meanwhile cannot mix two plans in one data set.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import storage
from pipeline.prepare.records import RECORD_SCHEMA
from pipeline.prepare.settings import Kind, absolute
from pipeline.quarantine import BadSample
from pipeline.shards import Shard

WORK_FOLDER = "_preparing"


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """One shard to be written; its records are one row group of plan.parquet."""

    split: str
    file: str
    num_records: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be written, and from where."""

    settings: dict[str, Any]
    kind: Kind
    image_root: str
    mask_root: str
    classes: list[str]
    """Names from the source; for pairs the job numbers the ids it finds."""
    bad: list[BadSample]
    """What could not even be indexed; counted to the first split."""
    shards: list[PlannedShard]

    @property
    def num_records(self) -> int:
        """Samples of all shards, before any is found bad."""
        return sum(shard.num_records for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """What came of a planned shard."""

    number: int
    """Place in the plan."""
    shard: Shard | None
    """None when every sample was bad: no file."""
    bad: list[BadSample]
    counts: dict[str, int]
    annotations: list[str]
    highest_mask_id: int

    def to_json(self) -> str:
        """As it lies in the working folder."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> FinishedShard:
        """The inverse of `to_json`."""
        values = json.loads(text)
        shard = Shard(**values.pop("shard")) if values["shard"] else values.pop("shard")
        bad = [BadSample(*sample) for sample in values.pop("bad")]
        return cls(shard=shard, bad=bad, **values)


class PlanFolder:
    """Reads and writes `OUT/_preparing`."""

    def __init__(self, out: str) -> None:
        self.uri = absolute(out).rstrip("/")
        self.filesystem, self.out = storage.resolve(self.uri)
        self.path = f"{self.out}/{WORK_FOLDER}"

    def read_plan(self) -> Plan | None:
        """The plan; None when there is none, or one that was not written to its end."""
        path = f"{self.path}/plan.json"
        if not self._exists(path):
            return None
        values = json.loads(storage.read_bytes(self.filesystem, path))
        shards = [PlannedShard(**shard) for shard in values.pop("shards")]
        bad = [BadSample(*sample) for sample in values.pop("bad")]
        return Plan(shards=shards, bad=bad, **values)

    def write_plan(self, plan: Plan, records: list[pa.Table]) -> None:
        """Write a plan with the records of each of its shards; forgets what was finished before."""
        self.remove()

        def write(file: pa.NativeFile) -> None:
            with pq.ParquetWriter(file, RECORD_SCHEMA, compression="zstd") as writer:
                for table in records:
                    writer.write_table(table, row_group_size=max(1, table.num_rows))

        storage.write_atomically(self.filesystem, f"{self.path}/plan.parquet", write)
        text = json.dumps(dataclasses.asdict(plan), indent=1)
        storage.write_bytes(self.filesystem, f"{self.path}/plan.json", text.encode())

    def read_records(self, number: int) -> list[dict[str, Any]]:
        """Records of one shard."""

        def read() -> list[dict[str, Any]]:
            path = f"{self.path}/plan.parquet"
            with pq.ParquetFile(path, filesystem=self.filesystem) as file:
                rows: list[dict[str, Any]] = file.read_row_group(number).to_pylist()
                return rows

        return storage.with_retries(read, f"{self.path}/plan.parquet")

    def write_finished(self, finished: FinishedShard) -> None:
        """Note that a shard is whole; called after it is."""
        path = self._finished_path(finished.number)
        storage.write_bytes(self.filesystem, path, finished.to_json().encode())

    def read_finished(self, plan: Plan) -> list[FinishedShard]:
        """Finished shards whose file is there with the size it had.

        After `mark_failed` those with bad samples are forgotten: they may have been mended.
        """
        found = storage.list_files(self.filesystem, f"{self.path}/finished")
        notes = [
            FinishedShard.from_json(storage.read_bytes(self.filesystem, info.path))
            for info in found
            if info.path.endswith(".json")
        ]
        if self._exists(self._failed_path):
            for note in notes:
                if note.bad:
                    storage.delete_file(self.filesystem, self._finished_path(note.number))
            storage.delete_file(self.filesystem, self._failed_path)
            notes = [note for note in notes if not note.bad]
        return [note for note in notes if self._is_whole(plan, note)]

    def mark_failed(self) -> None:
        """Note that there were too many bad samples."""
        storage.write_bytes(self.filesystem, self._failed_path, b"")

    def _is_whole(self, plan: Plan, note: FinishedShard) -> bool:
        if note.shard is None:
            return True
        path = f"{self.out}/{plan.shards[note.number].split}/{note.shard.file}"
        info = storage.info_of(self.filesystem, path)
        return bool(info.type == fs.FileType.File and info.size == note.shard.num_bytes)

    def remove(self) -> None:
        """Delete the working folder, plan.json first: without it the rest means nothing."""
        for path in (f"{self.path}/plan.json", f"{self.path}/plan.parquet"):
            storage.delete_file(self.filesystem, path)
        storage.delete_folder(self.filesystem, self.path)

    def _finished_path(self, number: int) -> str:
        return f"{self.path}/finished/{number:06d}.json"

    @property
    def _failed_path(self) -> str:
        return f"{self.path}/too_many_bad"

    def _exists(self, path: str) -> bool:
        return bool(storage.info_of(self.filesystem, path).type == fs.FileType.File)
