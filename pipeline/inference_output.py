"""The folder a batch inference writes: Parquet shards in the order of the images, pictures, and a
last file that says they are all there.

    <kind>-00000.parquet, ...   the rows; kind is predictions or embeddings
    _overlays/<row>_<name>.jpg  pictures, where there are any
    _pca.png, ...               pictures of all of it, where there are any
    _quarantine.parquet         images that could not be used, where there are any
    _finished.json              counts, classes, settings; written last

Surprising: readers of Parquet folders pass over names that begin with _, so `pq.read_table(OUT)`
reads the rows alone. What has no `_finished.json` is unfinished: the next job empties it, but only
where `_unfinished.json` says that a job wrote it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.quarantine import BadSample, write_quarantine
from pipeline.shards import BAD_SAMPLES_FILE

FINISHED_FILE = "_finished.json"
UNFINISHED_FILE = "_unfinished.json"
PICTURES_FOLDER = "_overlays"
_ROWS_PER_SHARD = 4096
_BYTES_PER_SHARD = 128 * 2**20  # what the driver holds of masks and features at a time
_MAX_NAME = 80


class InferenceOutput:
    """Writes one output folder; used by the driver alone.

    Args:
        out: folder, local or a URI.
        kind: what the shards are called.
        rows_per_shard: most rows of a Parquet file.
    """

    def __init__(self, out: str, kind: str, *, rows_per_shard: int = _ROWS_PER_SHARD) -> None:
        self.out = out.rstrip("/")
        self.kind = kind
        self.num_rows = 0
        self.num_pictures = 0
        self.shards: list[dict[str, Any]] = []
        self.summaries: list[str] = []
        self._filesystem, self._root = storage.resolve(out)
        self._rows_per_shard = rows_per_shard
        self._waiting: list[pa.Table] = []

    def begin(self, settings: dict[str, Any]) -> None:
        """Take the folder: it must be new, empty, or hold what an unfinished job left.

        Raises:
            ValueError: it holds finished results, or files no such job wrote.
        """
        files = [str(f.path) for f in storage.list_files(self._filesystem, self._root)]
        names = {path.removeprefix(f"{self._root}/") for path in files}
        if FINISHED_FILE in names:
            raise ValueError(
                f"out='{self.out}' holds finished {self.kind}, which are never overwritten; give "
                "another --out, or delete that folder"
            )
        if names and UNFINISHED_FILE not in names:
            raise ValueError(
                f"out='{self.out}' holds {len(names)} files that are no {self.kind}, such as "
                f"{min(names)}; give a new or empty folder"
            )
        for name in sorted(names):
            if self._is_ours(name):
                storage.delete_file(self._filesystem, f"{self._root}/{name}")
        self._write_json(UNFINISHED_FILE, settings)

    def add(self, rows: pa.Table) -> None:
        """Append rows; writes a shard when enough are waiting."""
        self._waiting.append(rows)
        while sum(table.num_rows for table in self._waiting) >= self._rows_per_shard:
            table = pa.concat_tables(self._waiting)
            self._write_shard(table.slice(0, self._rows_per_shard))
            self._waiting = [table.slice(self._rows_per_shard)]
        if sum(table.nbytes for table in self._waiting) >= _BYTES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are waiting."""
        waiting = [table for table in self._waiting if table.num_rows]
        self._waiting = []
        if waiting:
            self._write_shard(pa.concat_tables(waiting))

    def add_picture(self, row: int, path: str, jpeg: bytes) -> None:
        """Write the picture of an image."""
        name = re.sub(r"[^\w.-]", "_", path.rsplit("/", 1)[-1].removesuffix(".jpg"))[:_MAX_NAME]
        target = f"{self._root}/{PICTURES_FOLDER}/{row:06d}_{name}.jpg"
        storage.write_bytes(self._filesystem, target, jpeg)
        self.num_pictures += 1

    def add_summary(self, name: str, png: bytes) -> None:
        """Write a picture of all of it; its name is `_<letters>.png`."""
        assert self._is_ours(name), f"{name} would neither be passed over nor done anew"
        storage.write_bytes(self._filesystem, f"{self._root}/{name}", png)
        self.summaries.append(name)

    def write_bad(self, bad: list[BadSample]) -> None:
        """Write the quarantine, if there is anything for it."""
        if bad:
            write_quarantine(f"{self.out}/{BAD_SAMPLES_FILE}", bad)

    def finish(self, facts: dict[str, Any], schema: pa.Schema) -> None:
        """Write what is waiting, then the file that marks the folder as whole.

        Args:
            facts: for people and programs that read the rows.
            schema: columns of the rows; without any row an empty shard is written with them.
        """
        self.flush()
        if not self.shards:
            self._write_shard(schema.empty_table())
        self._write_json(FINISHED_FILE, {"num_rows": self.num_rows, **facts, "shards": self.shards})
        storage.delete_file(self._filesystem, f"{self._root}/{UNFINISHED_FILE}")

    def _write_shard(self, table: pa.Table) -> None:
        name = f"{self.kind}-{len(self.shards):05d}.parquet"
        storage.write_atomically(
            self._filesystem,
            f"{self._root}/{name}",
            lambda file: pq.write_table(table, file, compression="zstd"),
        )
        self.shards.append({"file": name, "num_rows": table.num_rows})
        self.num_rows += table.num_rows

    def _is_ours(self, name: str) -> bool:
        """Whether a job writes such a file, whole or with the ending of one cut short."""
        whole = re.sub(r"\.[0-9a-f]{8}\.part$", "", name)
        return (
            whole == BAD_SAMPLES_FILE
            or re.fullmatch(
                rf"({PICTURES_FOLDER}/\d+_[^/]*\.jpg|_[a-z]+\.png|[a-z]+-\d+\.parquet)", whole
            )
            is not None
        )

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=1)
        storage.write_bytes(self._filesystem, f"{self._root}/{name}", text.encode())
