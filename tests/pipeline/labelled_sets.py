"""Tiny prepared data sets for the three tasks: coloured rectangles, told apart by their colour."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs
from pycocotools import mask as coco_mask

from pipeline.finetune_config import Task
from pipeline.reproducibility import stable_id
from pipeline.shards import SHARD_SCHEMA, Manifest, Shard, write_shard

CLASSES: dict[Task, list[str]] = {
    "classify": ["red", "green", "blue"],
    "detect": ["red", "green", "blue"],
    "segment": ["background", "red", "green", "blue"],
}
_ANNOTATIONS: dict[Task, list[str]] = {
    "classify": ["label"],
    "detect": ["boxes", "box_masks"],
    "segment": ["mask"],
}
_COLOURS = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220)], np.uint8)


def write_labelled_set(
    folder: Path, task: Task, *, num_samples: int = 12, seed: int = 0, num_bad: int = 0
) -> Path:
    """One split of a prepared set, with `num_bad` samples whose bytes are no image."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    rows = [_row(task, generator, f"{seed}/{i}.png", i) for i in range(num_samples)]
    for row in rows[:num_bad]:
        row["image"] = b"not an image"
    table = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
    path = folder / "shard-00000.parquet"
    with pa.OSFile(str(path), "wb") as file:
        write_shard(table, file)
    manifest = Manifest(
        num_samples=num_samples,
        num_bytes=path.stat().st_size,
        classes=CLASSES[task],
        annotations=_ANNOTATIONS[task],
        shards=[
            Shard(
                file=path.name,
                num_samples=num_samples,
                num_bytes=path.stat().st_size,
                sha256="",
                row_groups=[num_samples],
            )
        ],
    )
    manifest.write(fs.LocalFileSystem(), str(folder))
    return folder


def _row(task: Task, generator: np.random.Generator, name: str, i: int) -> dict[str, Any]:
    label = i % len(_COLOURS)
    pixels = generator.integers(90, 130, (72, 80, 3)).astype(np.uint8)
    ids = np.zeros(pixels.shape[:2], np.uint8)
    x, y = (int(v) for v in generator.integers(4, 30, 2))
    ids[y : y + 28, x : x + 34] = label + 1
    pixels[ids > 0] = _COLOURS[label]
    row: dict[str, Any] = {
        "sample_id": stable_id(name),
        "name": name,
        "image": _png(pixels),
        "width": 80,
        "height": 72,
    }
    if task == "classify":
        row["label"] = label
    elif task == "segment":
        row["mask"] = _png(ids)
    else:
        runs = coco_mask.encode(np.asfortranarray((ids > 0).astype(np.uint8)))["counts"]
        row |= {
            "boxes": [[float(x), float(y), float(x + 34), float(y + 28)]],
            "box_labels": [label],
            "box_masks": [bytes(runs)],
            "box_is_crowd": [False],
        }
    return row


def _png(values: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
