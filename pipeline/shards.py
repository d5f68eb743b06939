"""The prepared data set: Parquet shards of encoded images beside a manifest.

One folder is one split: `shard-00000.parquet`, ... and `_manifest.json`. Surprising: the manifest
is written last and says how many rows each row group has, so a data set without one is unfinished,
and opening one with it reads a single small file however many images there are.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import storage

SCHEMA_VERSION = 1
MANIFEST_FILE = "_manifest.json"  # readers of Parquet folders skip names that begin with _
BAD_SAMPLES_FILE = "_quarantine.parquet"
ROWS_PER_GROUP = 64  # what one read fetches: a few MB; small, so that a shuffle window mixes many

SHARD_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.uint64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("box_labels", pa.list_(pa.int32())),
        pa.field("box_masks", pa.list_(pa.binary())),
        pa.field("box_is_crowd", pa.list_(pa.bool_())),
        pa.field("mask", pa.binary()),
    ],
)
"""Columns of a shard. Annotations are null where the source has none.

sample_id: stable 64-bit id. name: where the sample was in its source. image: encoded bytes.
width, height: pixels after EXIF rotation; boxes and masks are in that frame. label: index into the
manifest's classes. boxes: (x0, y0, x1, y1) in pixels. box_labels: index into classes.
box_masks: COCO compressed run lengths ("counts"), one a box. mask: PNG of class ids, 255 = ignore.
"""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of a prepared data set."""

    file: str
    num_samples: int
    num_bytes: int
    """Size of the file."""
    sha256: str
    row_groups: list[int]
    """Rows of each row group."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds."""

    num_samples: int
    num_bytes: int
    classes: list[str]
    annotations: list[str]
    """Those of label, boxes, box_masks, mask that at least one sample has."""
    shards: list[Shard]
    preparation: dict[str, Any] = field(default_factory=dict)
    """Settings the set was prepared with."""
    schema_version: int = SCHEMA_VERSION

    def write(self, filesystem: fs.FileSystem, folder: str) -> None:
        """Write _manifest.json: from here on the folder counts as whole."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        storage.write_bytes(filesystem, f"{folder}/{MANIFEST_FILE}", text.encode())

    @classmethod
    def read(cls, filesystem: fs.FileSystem, folder: str) -> Manifest | None:
        """The manifest of a folder; None when it has none.

        Raises:
            ValueError: a manifest of another schema version, or one that is no manifest.
        """
        path = f"{folder}/{MANIFEST_FILE}"
        if storage.info_of(filesystem, path).type != fs.FileType.File:
            return None
        try:
            values = json.loads(storage.read_bytes(filesystem, path))
            version = values["schema_version"]
            shards = [Shard(**shard) for shard in values.pop("shards")] if version == 1 else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no manifest of a prepared data set ({type(error).__name__}: {error}); "
                "prepare the data again with jobs/prepare_data.py"
            ) from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema_version={version}, this program reads {SCHEMA_VERSION}; "
                "prepare the data again with jobs/prepare_data.py"
            )
        return cls(shards=shards, **values)


def write_shard(table: pa.Table, file: pa.NativeFile) -> None:
    """Write rows as a shard: small row groups, images neither compressed nor dictionary-encoded."""
    pq.write_table(
        table.cast(SHARD_SCHEMA),
        file,
        row_group_size=ROWS_PER_GROUP,
        compression={name: "none" if name == "image" else "zstd" for name in _leaf_names()},
        use_dictionary=["name"],
        write_statistics=["sample_id"],
    )


def _leaf_names() -> list[str]:
    """Parquet's own column paths, which differ from Arrow's for lists."""
    return [
        *("sample_id", "name", "image", "width", "height", "label", "mask"),
        *("boxes.list.element.list.element", "box_labels.list.element"),
        *("box_masks.list.element", "box_is_crowd.list.element"),
    ]
