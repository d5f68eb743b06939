"""Configs, samples and pictures with known annotations for the tests of the downstream samples."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.config import RunConfig
from pipeline.config_values import apply_overrides
from pipeline.finetune_config import (
    ClassifyConfig,
    DetectConfig,
    FinetuneOptimConfig,
    LabelledDataConfig,
    SegmentConfig,
)
from pipeline.reading import Sample
from tests.pipeline.samples import encode

PALETTE = np.array([(i * 37 % 251 + 2, i * 91 % 239 + 5, 255 - i) for i in range(256)], np.uint8)
"""A colour for each of 256 classes, all different."""


def _sections(**data: Any) -> dict[str, Any]:
    values = {"path": "train", "val_path": "val", "image_size": 64, "global_batch_size": 4}
    return {
        "run": RunConfig(name="samples"),
        "data": LabelledDataConfig(**(values | data)),
        "optim": FinetuneOptimConfig(num_steps=1),
    }


def classify_config(**overrides: Any) -> ClassifyConfig:
    """Crops of 64 pixels; overrides are written data__flip_prob for data.flip_prob."""
    return apply_overrides(ClassifyConfig(**_sections()), _dotted(overrides))


def detect_config(**overrides: Any) -> DetectConfig:
    """Mask R-CNN."""
    return apply_overrides(DetectConfig(**_sections()), _dotted(overrides))


def segment_config(**overrides: Any) -> SegmentConfig:
    """Crops of 64 pixels."""
    return apply_overrides(SegmentConfig(**_sections()), _dotted(overrides))


def _dotted(overrides: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in overrides.items()}


def make_sample(encoded: bytes, **annotations: Any) -> Sample:
    """A sample as the reader returns it."""
    return Sample(7, encoded, annotations)


def rng(seed: int = 0) -> np.random.Generator:
    """A sample's generator."""
    return np.random.default_rng(seed)


def png(values: NDArray[Any]) -> bytes:
    """A PNG of grey values (H, W) or colours (H, W, 3)."""
    return encode(Image.fromarray(values))


def run_lengths(mask: NDArray[Any]) -> bytes:
    """COCO's compressed run lengths of (H, W), nonzero = object."""
    return bytes(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])


def random_rectangles(
    generator: np.random.Generator, size: tuple[int, int], num: int
) -> tuple[NDArray[np.uint8], list[list[float]]]:
    """Ids (H, W) of rectangles drawn one over the other, 0 = none, and their whole boxes."""
    width, height = size
    ids, boxes = np.zeros((height, width), np.uint8), []
    for i in range(1, num + 1):
        x0, x1 = _span(generator, width)
        y0, y1 = _span(generator, height)
        ids[y0:y1, x0:x1] = i
        boxes.append([float(x0), float(y0), float(x1), float(y1)])
    return ids, boxes


def _span(generator: np.random.Generator, length: int) -> tuple[int, int]:
    low, high = sorted(generator.integers(0, length + 1, 2).tolist())
    return (low, high) if low < high else (0, length)


def detection_sample(ids: NDArray[np.uint8], boxes: list[list[float]], **options: Any) -> Sample:
    """Rectangles in the colours of their ids, with their visible pixels as masks.

    Args:
        ids: of `random_rectangles`.
        boxes: of `random_rectangles`.
        options: of the PNG file.
    """
    buffer = io.BytesIO()
    Image.fromarray(PALETTE[ids]).save(buffer, "PNG", **options)
    return make_sample(
        buffer.getvalue(),
        boxes=boxes,
        box_labels=list(range(len(boxes))),
        box_is_crowd=[False] * len(boxes),
        box_masks=[run_lengths(ids == i) for i in range(1, len(boxes) + 1)],
    )
