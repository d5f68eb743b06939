"""COCO annotation files: boxes, polygons and run lengths -> the columns of a shard.

Rules for what is wrong in a file (each counted, see `COUNTS`; each tested):

* An annotation of an unknown image or category is an error: the file is broken.
* Boxes and masks are in the frame of the file's width and height. An image whose decoded size
  (EXIF rotation applied) differs is set aside; with no size in the file, the image's own is taken.
* A box is clipped to its image. One without area before or after that, or that is not four finite
  numbers, is dropped with its mask.
* A polygon of fewer than 6 numbers, of an odd number, or with absurd ones is dropped; a box all of
  whose polygons are dropped, or whose run lengths do not fill the image, keeps a null mask.
* Categories are numbered 0 ... K-1 in order of their ids, gaps closed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.prepare.records import Source, make_records
from pipeline.prepare.run_lengths import run_lengths, scale_run_lengths

COUNTS = (
    "boxes_clipped",
    "boxes_dropped_outside",
    "boxes_dropped_empty",
    "boxes_dropped_malformed",
    "polygons_dropped",
    "masks_dropped",
)


class FrameMismatchError(ValueError):
    """Annotations are for an image of another size."""


class Annotations(NamedTuple):
    """Those of one image, as a shard holds them."""

    boxes: list[list[float]]
    """(x0, y0, x1, y1) in pixels."""
    labels: list[int]
    masks: list[bytes | None] | None
    """Compressed run lengths; None when no box of the whole file has a mask."""
    is_crowd: list[bool]


def coco_source(path: str, image_root: str, sizes: dict[str, int]) -> Source:
    """Records of a COCO file; one of an image keeps that image's annotations as JSON.

    Args:
        path: the annotation file.
        image_root: folder that the file's `file_name`s are relative to.
        sizes: bytes of each file there; images missing from it are found missing when read.

    Raises:
        ValueError: not a COCO file, or one that contradicts itself.
    """
    data = _load(path)
    categories = sorted(data.get("categories", []), key=lambda c: c["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    annotations = data.get("annotations")
    by_image: dict[Any, list[list[Any]]] = {image["id"]: [] for image in data["images"]}
    for annotation in annotations or []:
        _check_references(path, annotation, by_image, number)
        by_image[annotation["image_id"]].append(
            [
                number[annotation["category_id"]],
                annotation.get("bbox"),
                bool(annotation.get("iscrowd", 0)),
                annotation.get("segmentation") or None,
            ]
        )
    has_masks = any(a.get("segmentation") for a in annotations or [])
    records = make_records(
        {
            "name": image["file_name"],
            "path": image["file_name"],
            "num_bytes": sizes.get(image["file_name"], 0),
            "annotations": None
            if annotations is None
            else json.dumps(
                {
                    "size": [image.get("width"), image.get("height")],
                    "boxes": by_image[image["id"]],
                    "has_masks": has_masks,
                }
            ),
        }
        for image in data["images"]
    )
    unlisted = len(set(sizes) - set(records["path"].to_pylist()))
    return Source(
        kind="coco",
        image_root=image_root,
        records=records,
        classes=[str(category["name"]) for category in categories],
        notes=[f"{unlisted} files in {image_root} are not in {path}"] if unlisted else [],
    )


def _load(path: str) -> dict[str, Any]:
    filesystem, inner = storage.resolve(path)
    try:
        data = json.loads(storage.read_bytes(filesystem, inner))
        ids = [image["id"] for image in data["images"]]
        files = [image["file_name"] for image in data["images"]]
        categories = [category["id"] for category in data.get("categories", [])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no COCO file ({type(error).__name__}: {error}); it needs 'images' with id "
            "and file_name, 'annotations', 'categories'"
        ) from error
    if not files:
        raise ValueError(f"{path} lists no images; give another annotation file")
    for what, values in (("image", ids), ("category", categories)):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: {what} id {twice[0]} is given twice; mend the file")
    if any("segments_info" in annotation for annotation in data.get("annotations", [])[:1]):
        raise ValueError(
            f"{path} is a panoptic file; give the instances_*.json, or the masks as --images DIR "
            "--masks DIR"
        )
    plain: dict[str, Any] = data
    return plain


def _check_references(
    path: str, annotation: dict[str, Any], images: dict[Any, Any], categories: dict[Any, int]
) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        if annotation.get(key) not in known:
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} has {key}={annotation.get(key)}, which "
                f"is not among the {len(known)} listed; mend the file"
            )


def parse_annotations(text: str, width: int, height: int, counts: Counter[str]) -> Annotations:
    """Annotations of one image of the given decoded size.

    Args:
        text: the record's JSON.
        width, height: of the decoded image in pixels.
        counts: what was dropped is added here.

    Raises:
        FrameMismatchError: the annotations are for another size.
    """
    values = json.loads(text)
    _check_frame(values["size"], width, height)
    found = Annotations([], [], [] if values["has_masks"] else None, [])
    for label, bbox, is_crowd, segmentation in values["boxes"]:
        box = _clip(bbox, width, height, counts)
        if box is None:
            continue
        found.boxes.append(box)
        found.labels.append(label)
        found.is_crowd.append(is_crowd)
        if found.masks is not None:
            found.masks.append(run_lengths(segmentation, width, height, counts))
    return found


def _check_frame(size: list[int | None], width: int, height: int) -> None:
    if size == [width, height] or None in size:
        return
    hint = " (rotated by its EXIF tag)" if size == [height, width] else ""
    raise FrameMismatchError(
        f"the annotations are for {size[0]}x{size[1]} pixels, the image has {width}x{height}{hint}"
    )


def _clip(bbox: Any, width: int, height: int, counts: Counter[str]) -> list[float] | None:
    """[x, y, w, h] -> (x0, y0, x1, y1) inside the image; None when nothing is left."""
    try:
        x, y, w, h = (float(value) for value in bbox)
    except (TypeError, ValueError):
        x = y = w = h = math.nan
    if not all(math.isfinite(value) for value in (x, y, w, h)):
        counts["boxes_dropped_malformed"] += 1
        return None
    if w <= 0 or h <= 0:
        counts["boxes_dropped_empty"] += 1
        return None
    box = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
    if box[0] >= box[2] or box[1] >= box[3]:
        counts["boxes_dropped_outside"] += 1
        return None
    counts["boxes_clipped"] += box != [x, y, x + w, y + h]
    return box


def scale_annotations(
    found: Annotations, size: tuple[int, int], new_size: tuple[int, int]
) -> Annotations:
    """Annotations of an image resized from size to new_size, both (width, height)."""
    x, y = new_size[0] / size[0], new_size[1] / size[1]
    boxes = [[x0 * x, y0 * y, x1 * x, y1 * y] for x0, y0, x1, y1 in found.boxes]
    masks = found.masks and [m and scale_run_lengths(m, size, new_size) for m in found.masks]
    return found._replace(boxes=boxes, masks=masks)
