"""Samples of detection: an image of any size, its boxes, and their masks as run lengths.

Flip and crop happen here, by DETR's rule; the model resizes. Surprising: DETR's second branch is
resize, crop, resize; here the crop is taken from the original pixels, as large as it would be in
them, so that pixels are resized once. Boxes are clipped to the crop as DETR does it, also those
with masks: they may then be larger than what is left of the mask.
"""

# n objects of an image

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.decoding import EncodedImage
from pipeline.downstream.resized_crop import Size, mirrored
from pipeline.downstream.samples import Arrays, BadAnnotationError
from pipeline.finetune_config import DetectConfig
from pipeline.prepare.run_lengths import decode_runs
from pipeline.reading import Sample
from pipeline.transforms import Box

_CROP_SHORT_SIDES = (400, 500, 600)  # det/configs/itpn: of the image when it is cropped
_CROP_SIDES = (384, 600)  # shortest and longest side of the crop, at that scale
_MIN_BOX_SIDE = 1.0  # pixels; smaller boxes are not learnt
_BLANK_SIDE = 64


class Objects(NamedTuple):
    """Objects of an image, in its pixels."""

    boxes: NDArray[np.float32]
    """(n, 4): x0, y0, x1, y1."""
    labels: NDArray[np.int64]
    """(n,), counted from 1: 0 is the detectors' background."""
    is_crowd: NDArray[np.bool_]
    """(n,): regions with many objects, left out of training and forgiven in evaluation."""
    masks: list[bytes] | None
    """Compressed run lengths, n of them, empty for an object without a mask; None where masks are
    not read."""

    def where(self, is_kept: NDArray[np.bool_]) -> Objects:
        """Those of the objects for which (n,) is true."""
        masks = self.masks
        if masks is not None:
            masks = [masks[i] for i in np.flatnonzero(is_kept)]
        return Objects(self.boxes[is_kept], self.labels[is_kept], self.is_crowd[is_kept], masks)

    def arrays(self) -> Arrays:
        """boxes, labels and, where there are masks, mask_bytes and mask_lengths."""
        arrays: Arrays = {"boxes": self.boxes, "labels": self.labels}
        if self.masks is not None:
            arrays["mask_bytes"] = np.frombuffer(b"".join(self.masks), np.uint8)
            arrays["mask_lengths"] = np.array([len(runs) for runs in self.masks], np.int64)
        return arrays


@dataclass(frozen=True)
class DetectSamples:
    """Makes image (H, W, 3) uint8 and its objects (a `samples.TaskSamples`).

    boxes (n, 4) float32 as x0, y0, x1, y1; labels (n,) int64 from 1; with masks also mask_bytes
    (total,) uint8 and mask_lengths (n,) int64, COCO's compressed run lengths end to end; in
    evaluation is_crowd (n,) bool, and a mask of length 0 is one that was lost in preparation.
    """

    config: DetectConfig
    num_classes: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Annotations it reads."""
        masks = ("box_masks",) if self.config.detector.with_masks else ()
        return ("boxes", "box_labels", "box_is_crowd", *masks)

    def train(self, sample: Sample, generator: np.random.Generator) -> Arrays:
        """The image, or a crop of it, flipped or not; objects that are too small are left out."""
        detector = self.config.detector
        image = EncodedImage.open(sample.encoded)
        objects = self._objects(sample.annotations, image.size)
        is_flipped = generator.random() < self.config.data.flip_prob
        crop: Box = (0, 0, *image.size)
        if generator.random() < detector.crop_prob:
            crop = random_crop_box(generator, image.size, detector.max_size)
        objects = objects.where(~objects.is_crowd)
        _require_masks(objects)
        objects = crop_objects(objects, image.size, crop, is_flipped)
        pixels = image.decode()[crop[1] : crop[3], crop[0] : crop[2]]
        return {"image": mirrored(pixels) if is_flipped else pixels, **objects.arrays()}

    def evaluate(self, sample: Sample) -> Arrays:
        """The whole image and all its objects."""
        image = EncodedImage.open(sample.encoded)
        objects = self._objects(sample.annotations, image.size)
        return {"image": image.decode(), **objects.arrays(), "is_crowd": objects.is_crowd}

    def blank(self) -> Arrays:
        """A small black image without objects."""
        objects = self._objects({}, (_BLANK_SIDE, _BLANK_SIDE))
        pixels = np.zeros((_BLANK_SIDE, _BLANK_SIDE, 3), np.uint8)
        return {"image": pixels, **objects.arrays(), "is_crowd": objects.is_crowd}

    def _objects(self, annotations: dict[str, Any], size: Size) -> Objects:
        """Objects of annotations; null annotations are none.

        Raises:
            BadAnnotationError: a box, label or mask that fits neither the image nor the classes.
        """
        boxes = annotations.get("boxes") or []
        labels = annotations.get("box_labels") or []
        is_crowd = annotations.get("box_is_crowd") or [False] * len(boxes)
        masks = annotations.get("box_masks") or [None] * len(boxes)
        if not len(boxes) == len(labels) == len(is_crowd) == len(masks):
            raise BadAnnotationError(
                f"{len(boxes)} boxes have {len(labels)} labels, {len(is_crowd)} crowd flags and "
                f"{len(masks)} masks; each needs one: prepare the data again"
            )
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            _check_box(i, box, size)
            if label is None or not 0 <= label < self.num_classes:
                raise BadAnnotationError(
                    f"box {i} has label {label}, outside the {self.num_classes} classes, whose "
                    f"labels are 0 ... {self.num_classes - 1}; prepare the data again with all "
                    "classes"
                )
        return Objects(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64) + 1,
            np.array([bool(value) for value in is_crowd], np.bool_),
            _checked_masks(masks, size) if self.config.detector.with_masks else None,
        )


def _check_box(number: int, box: list[float], size: Size) -> None:
    x0, y0, x1, y1 = (math.nan if value is None else value for value in box)
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):  # false for NaN, too
        raise BadAnnotationError(
            f"box {number} is ({x0:g}, {y0:g}, {x1:g}, {y1:g}) in an image of {size[0]}x{size[1]} "
            f"pixels; boxes need 0 <= x0 < x1 <= {size[0]} and 0 <= y0 < y1 <= {size[1]}: prepare "
            "the data again, which clips and drops boxes"
        )


def _checked_masks(masks: list[bytes | None], size: Size) -> list[bytes]:
    """The masks, if each fills the image; pycocotools would return memory it does not own."""
    for i, mask in enumerate(masks):
        if not mask:
            continue
        runs = decode_runs(mask)
        if runs is None or min(runs) < 0 or sum(runs) != size[0] * size[1]:
            covered = "are malformed" if runs is None else f"cover {sum(runs)} pixels"
            raise BadAnnotationError(
                f"the run lengths of mask {i} {covered}, the image has {size[0]}x{size[1]}; "
                "prepare the data again"
            )
    return [mask or b"" for mask in masks]


def _require_masks(objects: Objects) -> None:
    """Evaluation forgives a missing mask, training cannot learn from it."""
    missing = [i for i, mask in enumerate(objects.masks or []) if not mask]
    if missing:
        box = ", ".join(f"{side:g}" for side in objects.boxes[missing[0]])
        raise BadAnnotationError(
            f"{len(missing)} of {len(objects.boxes)} objects lack a mask, the first at ({box}), "
            "and masks are learnt; mend them and prepare the data again, or train without masks: "
            "--detector.kind faster_rcnn"
        )


def random_crop_box(generator: np.random.Generator, size: Size, max_size: int) -> Box:
    """Crop of DETR's second branch, in pixels of the original image.

    The image would be resized to a short side of 400, 500 or 600, then a crop of 384 to 600 pixels
    a side be taken, or all there is.

    Args:
        generator: source of the numbers.
        size: image (width, height).
        max_size: limit of the long side of the resized image.
    """
    short_side = int(generator.choice(_CROP_SHORT_SIDES))
    scale = min(short_side / min(size), max_size / max(size))
    starts, ends = [], []
    for side in size:
        resized = max(1, int(side * scale + 0.5))
        low, high = (min(limit, resized) for limit in _CROP_SIDES)
        cut = int(generator.integers(low, high + 1))
        length = max(1, round(cut * side / resized))
        starts.append(int(generator.integers(0, side - length + 1)))
        ends.append(starts[-1] + length)
    return (starts[0], starts[1], ends[0], ends[1])


def crop_objects(objects: Objects, size: Size, crop: Box, is_flipped: bool) -> Objects:
    """Objects in a crop that is then mirrored or not.

    Dropped are those whose clipped box is less than a pixel wide or high, and those without a pixel
    of their mask in the crop.

    Args:
        objects: of the image.
        size: image (width, height).
        crop: left, upper, right, lower.
        is_flipped: whether left and right are exchanged.
    """
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    boxes = objects.boxes - np.array([crop[0], crop[1], crop[0], crop[1]], np.float32)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    if is_flipped:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    objects = objects._replace(boxes=boxes)
    objects = objects.where((boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= _MIN_BOX_SIDE)
    if objects.masks is None:
        return objects
    masks = objects.masks
    if is_flipped or crop != (0, 0, *size):
        masks = [_crop_mask(mask, size, crop, is_flipped) for mask in masks]
    frame = [height, width]
    areas = [int(coco_mask.area({"size": frame, "counts": mask})) for mask in masks]
    return objects._replace(masks=masks).where(np.array([area > 0 for area in areas], np.bool_))


def _crop_mask(mask: bytes, size: Size, crop: Box, is_flipped: bool) -> bytes:
    """One at a time: all masks of a large photograph would take gigabytes."""
    pixels = coco_mask.decode({"size": [size[1], size[0]], "counts": mask})
    part = pixels[crop[1] : crop[3], crop[0] : crop[2]]
    part = part[:, ::-1] if is_flipped else part
    return bytes(coco_mask.encode(np.asfortranarray(part))["counts"])


def mask_runs(arrays: Arrays) -> list[bytes]:
    """Compressed run lengths of a sample's n masks, empty for one it does not have."""
    ends = np.cumsum(arrays["mask_lengths"])
    return [part.tobytes() for part in np.split(arrays["mask_bytes"], ends)[: len(ends)]]


def unpack_masks(arrays: Arrays, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Masks (n, H, W) uint8, 1 = object, of a sample.

    Args:
        arrays: of `DetectSamples`.
        size: (H, W) of its image.
    """
    runs = mask_runs(arrays)
    masks = np.zeros((len(runs), *size), np.uint8)
    for i, counts in enumerate(runs):
        if counts:
            masks[i] = coco_mask.decode({"size": list(size), "counts": counts})
    return masks
