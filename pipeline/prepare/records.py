"""The plan of a preparation: one record a sample, its id, split, place in the order, and shard.

A record says where the bytes are; nothing here reads an image. Surprising: split and order come
from a hash of (seed, sample id), not from a random permutation, so they do not depend on the order
files are listed in, and adding files moves no other sample to another split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.prepare.settings import Kind
from pipeline.quarantine import BadSample
from pipeline.reproducibility import stable_id

RECORD_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("mask_path", pa.string()),
        pa.field("annotations", pa.string()),
    ]
)
"""Columns of a plan.

name: place of the sample in its source; its hash is the sample id. path: file under the source's
image_root. offset: first byte in that file, -1 = the whole file is the image. num_bytes: encoded
size (an estimate for Parquet rows). row_group, row: of a Parquet file, row counted in its group;
-1 otherwise. mask_path: file under mask_root. annotations: JSON, see `coco.py`.
"""

WINDOW_SHARDS = 4
"""Rows of Parquet sources mix within as many shards; so often is a row group read at most, plus
once for each border of a shard inside it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything a source holds, not yet read."""

    kind: Kind
    image_root: str
    records: pa.Table
    mask_root: str = ""
    classes: list[str] = field(default_factory=list)
    """Names of the labels (of the boxes for COCO); empty when there are none or no names."""
    bad: list[BadSample] = field(default_factory=list)
    """What could not even be indexed."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user: what was ignored, how to read it otherwise."""


def make_records(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Records from dicts; everything but name and path has a default."""
    defaults: dict[str, Any] = {"offset": -1, "num_bytes": 0, "row_group": -1, "row": -1}
    return pa.Table.from_pylist([{**defaults, **row} for row in rows], schema=RECORD_SCHEMA)


def location(root: str, record: dict[str, Any]) -> str:
    """Where a sample is, for people: a path, tar/member or file:row-group:row."""
    path = f"{root}/{record['path']}"
    if record["row"] >= 0:
        return f"{path}:{record['row_group']}:{record['row']}"
    return f"{root}/{record['name']}" if record["offset"] >= 0 else path


def sample_ids(records: pa.Table, root: str) -> NDArray[np.uint64]:
    """Id of each record.

    Raises:
        ValueError: two samples with one id; names both.
    """
    names = records["name"].to_pylist()
    ids = np.array([stable_id(name) for name in names], dtype=np.uint64)
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if len(first) < len(ids):
        twice = ids[first[np.argmax(counts > 1)]]
        rows = np.flatnonzero(ids == twice)[:2].tolist()
        places = [
            f"{location(root, records.slice(row, 1).to_pylist()[0])} (sample '{names[row]}')"
            for row in rows
        ]
        raise ValueError(
            f"two samples have the same id {twice}: {places[0]} and {places[1]}; names in a source "
            "must differ, rename or remove one"
        )
    return ids


def split_of(ids: NDArray[np.uint64], seed: int, val_fraction: float) -> NDArray[np.bool_]:
    """Which samples belong to `val`: a function of (seed, id) alone.

    A larger fraction keeps every sample that a smaller one had sent to `val`.
    """
    if not val_fraction:
        return np.zeros(len(ids), dtype=bool)
    return _hashes("split", seed, ids.tolist()) < np.uint64(int(val_fraction * 2**64))


def shuffled_order(
    records: pa.Table, ids: NDArray[np.uint64], seed: int, window_bytes: float
) -> NDArray[np.int64]:
    """Order in which records are written.

    Files and tar members are shuffled as a whole. Parquet rows are not read one by one: their row
    groups are shuffled, then rows are shuffled inside windows of about window_bytes.
    """
    keys = _hashes("order", seed, ids.tolist())
    row_groups = records["row_group"].to_numpy()
    if not len(ids) or row_groups.max() < 0:
        return np.argsort(keys, kind="stable")
    paths = records["path"].to_pylist()
    groups, inverse = np.unique(
        np.array([f"{path}:{group}" for path, group in zip(paths, row_groups, strict=True)]),
        return_inverse=True,
    )
    sizes = np.bincount(inverse, weights=records["num_bytes"].to_numpy())
    group_order = np.argsort(_hashes("group", seed, groups.tolist()), kind="stable")
    starts = np.concatenate([[0.0], np.cumsum(sizes[group_order])[:-1]])
    windows = np.empty(len(groups), dtype=np.int64)
    windows[group_order] = (starts // window_bytes).astype(np.int64)
    return np.lexsort((keys, windows[inverse]))


def shard_numbers(num_bytes: NDArray[np.int64], shard_bytes: float) -> NDArray[np.int64]:
    """Shard of each record in order: shards of about equal size, none much above shard_bytes."""
    sizes = np.maximum(num_bytes, 1).astype(np.float64)
    total = float(sizes.sum())
    num_shards = max(1, int(np.ceil(total / shard_bytes)))
    starts = np.cumsum(sizes) - sizes
    shards = np.minimum((starts * num_shards / total).astype(np.int64), num_shards - 1)
    return np.unique(shards, return_inverse=True)[1]  # an image above shard_bytes leaves gaps


def _hashes(purpose: str, seed: int, items: Sequence[object]) -> NDArray[np.uint64]:
    return np.array([stable_id(f"{purpose}:{seed}:{item}") for item in items], dtype=np.uint64)
