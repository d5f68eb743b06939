"""Masks of boxes as COCO run lengths: made from polygons, checked, scaled.

Surprising: pycocotools neither checks that run lengths fill the image (it then returns memory it
does not own) nor bounds the memory a polygon takes, so both are checked before it sees them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

_MAX_COORDINATE = 1e5
"""pycocotools allocates memory in proportion to a polygon's length in pixels."""


def run_lengths(segmentation: Any, width: int, height: int, counts: Counter[str]) -> bytes | None:
    """Compressed run lengths of polygons or of (compressed or plain) run lengths."""
    if segmentation is None:
        return None
    if isinstance(segmentation, dict):
        encoded = _checked_run_lengths(segmentation, width, height)
        counts["masks_dropped"] += encoded is None
        return encoded
    given = segmentation if isinstance(segmentation, list) else [segmentation]
    polygons = [p for p in given if _is_polygon(p)]
    counts["polygons_dropped"] += len(given) - len(polygons)
    if not polygons:
        counts["masks_dropped"] += 1
        return None
    parts = coco_mask.frPyObjects([[float(v) for v in p] for p in polygons], height, width)
    return bytes(coco_mask.merge(parts)["counts"])


def _is_polygon(polygon: Any) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(v, int | float) and abs(v) <= _MAX_COORDINATE for v in polygon)
    )


def _checked_run_lengths(segmentation: dict[str, Any], width: int, height: int) -> bytes | None:
    """Compressed run lengths; None when they do not describe an image of this size."""
    runs = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return None
    if isinstance(runs, str):
        plain = decode_runs(runs.encode())
        return runs.encode() if plain and _fills(plain, width, height) else None
    if not isinstance(runs, list) or not _fills(runs, width, height):
        return None
    rle = {"size": [height, width], "counts": runs}
    return bytes(coco_mask.frPyObjects(rle, height, width)["counts"])


def _fills(runs: list[Any], width: int, height: int) -> bool:
    return all(isinstance(r, int) and r >= 0 for r in runs) and sum(runs) == width * height


def decode_runs(encoded: bytes) -> list[int] | None:
    """Run lengths of COCO's compressed form (rleFrString of maskApi.c); None when malformed."""
    runs: list[int] = []
    value = shift = 0
    for byte in encoded:
        if not 48 <= byte < 112:
            return None
        bits = byte - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs


def scale_run_lengths(encoded: bytes, size: tuple[int, int], new_size: tuple[int, int]) -> bytes:
    """Nearest-pixel resize of a mask from size to new_size, both (width, height)."""
    pixels = coco_mask.decode({"size": [size[1], size[0]], "counts": encoded})
    small = resize_nearest(pixels, new_size)
    return bytes(coco_mask.encode(np.asfortranarray(small))["counts"])


def resize_nearest(pixels: NDArray[Any], new_size: tuple[int, int]) -> NDArray[Any]:
    """(H, W) -> (new H, new W), each pixel the source pixel its centre falls into."""
    height, width = pixels.shape
    rows = ((np.arange(new_size[1]) + 0.5) * height / new_size[1]).astype(np.int64)
    columns = ((np.arange(new_size[0]) + 0.5) * width / new_size[0]).astype(np.int64)
    return pixels[rows[:, None], columns]
