"""Made-up objects and detections, as the data plane and torchvision's detectors give them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

SIZE = (120, 160)
"""(H, W) of every image."""


class Scene(NamedTuple):
    """One image: what is there, and what a detector found."""

    image_id: int
    prediction: dict[str, Tensor]
    target: dict[str, Any]


def prediction_of(
    boxes: list[list[float]],
    labels: list[int] | None = None,
    scores: list[float] | None = None,
    masks: Tensor | None = None,
) -> dict[str, Tensor]:
    """A detector's output; label 1 and score 0.9 unless given, masks fill their boxes."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    if masks is None:
        masks = torch.from_numpy(filled(corners)).float()[:, None]
    return {
        "boxes": corners,
        "labels": torch.tensor([1] * len(boxes) if labels is None else labels).long(),
        "scores": torch.tensor([0.9] * len(boxes) if scores is None else scores).float(),
        "masks": masks,
    }


def target_of(
    boxes: list[list[float]],
    labels: list[int] | None = None,
    is_crowd: list[bool] | None = None,
    *,
    with_masks: bool = True,
) -> dict[str, Any]:
    """Annotations; label 1 and no crowd unless given, masks fill their boxes."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target: dict[str, Any] = {
        "boxes": corners,
        "labels": torch.tensor([1] * len(boxes) if labels is None else labels).long(),
        "is_crowd": torch.tensor([False] * len(boxes) if is_crowd is None else is_crowd).bool(),
    }
    if with_masks:
        target["masks"] = [encoded(mask) for mask in filled(corners)]
    return target


def filled(boxes: Tensor) -> Any:
    """(n, H, W) bool: the pixels of each box."""
    masks = np.zeros((len(boxes), *SIZE), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[max(0, y0) : y1, max(0, x0) : x1] = True
    return masks


def encoded(mask: Any) -> bytes:
    """Compressed run lengths of (H, W) bool."""
    return bytes(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])


def random_scene(seed: int, num_classes: int) -> Scene:
    """Objects of many sizes, an eighth of them crowds; a detector that shifts, misses, misnames and
    invents, with scores so coarse that many are equal."""
    generator = np.random.default_rng(seed)
    boxes = _random_boxes(generator, int(generator.integers(0, 7)))
    labels = generator.integers(1, num_classes + 1, len(boxes))
    is_crowd = generator.random(len(boxes)) < 0.125
    is_found = generator.random(len(boxes)) < 0.8
    shifted = boxes[is_found] + generator.normal(0, 3, (int(is_found.sum()), 4))
    shifted[:, 2:] = np.maximum(shifted[:, 2:], shifted[:, :2] + 1)
    found = np.concatenate([shifted, _random_boxes(generator, int(generator.integers(0, 4)))])
    names = np.concatenate([labels[is_found], np.ones(len(found) - is_found.sum(), np.int64)])
    is_misnamed = generator.random(len(found)) < 0.15
    names[is_misnamed] = generator.integers(1, num_classes + 1, int(is_misnamed.sum()))
    scores = generator.integers(1, 10, len(found)) / 10
    prediction = prediction_of(found.tolist(), names.tolist(), scores.tolist())
    prediction["masks"] *= torch.from_numpy(generator.random(prediction["masks"].shape)) ** 0.2
    return Scene(
        int(generator.integers(0, 2**64, dtype=np.uint64)),
        prediction,
        target_of(boxes.tolist(), labels.tolist(), is_crowd.tolist()),
    )


def _random_boxes(generator: np.random.Generator, n: int) -> Any:
    height, width = SIZE
    whole = np.array([width, height])
    sides = np.minimum(whole * generator.beta(1, 1.5, (n, 2)) + 4, whole)
    corner = generator.random((n, 2)) * (whole - sides)
    return np.concatenate([corner, corner + sides], 1)
