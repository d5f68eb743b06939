"""Predictions as rows of a table, and drawn onto their images.

Surprising: masks of objects are written as the dicts pycocotools takes, size and counts together,
and masks of pixels as grey PNG files of class ids; so nothing of ours is needed to read them.
"""

# n objects of an image, K classes, H x W image

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.downstream.overlays import (
    Objects,
    draw_objects,
    overlay_detection,
    overlay_segmentation,
)
from pipeline.finetune_config import DetectConfig, FinetuneConfig
from pipeline.picture_grid import png_bytes

Pixels = NDArray[np.uint8]
Prediction = dict[str, Any]
"""Of one image; see `DownstreamTask.predict`."""
_JPEG_QUALITY = 92
_RUN_LENGTHS = pa.struct([pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.binary())])


def prediction_schema(config: FinetuneConfig, num_classes: int) -> pa.Schema:
    """Columns of a prediction.

    width, height: pixels after EXIF rotation; boxes and masks are in that frame.
    classify: label (from 0), class_name, score, scores (K,): probabilities.
    detect: boxes (n, 4) as x0, y0, x1, y1 in pixels; labels (n,) from 0; class_names (n,); scores
    (n,), the best first; masks (n,), if the model has them.
    segment: mask, a PNG (H, W) of class ids.
    """
    columns: dict[str, list[tuple[str, pa.DataType]]] = {
        "classify": [
            ("label", pa.int32()),
            ("class_name", pa.string()),
            ("score", pa.float32()),
            ("scores", pa.list_(pa.float32(), num_classes)),
        ],
        "detect": [
            ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
            ("labels", pa.list_(pa.int32())),
            ("class_names", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float32())),
        ],
        "segment": [("mask", pa.binary())],
    }
    if isinstance(config, DetectConfig) and config.detector.with_masks:
        columns["detect"].append(("masks", pa.list_(_RUN_LENGTHS)))
    size = [("width", pa.int32()), ("height", pa.int32())]
    return pa.schema([pa.field(*column) for column in (*size, *columns[config.task])])


def prediction_row(
    prediction: Prediction, size: tuple[int, int], classes: tuple[str, ...]
) -> dict[str, Any]:
    """Values of `prediction_schema` for an image of `size` (H, W)."""
    row: dict[str, Any] = {"height": size[0], "width": size[1]}
    if "label" in prediction:
        return {**row, **prediction, "class_name": classes[prediction["label"]]}
    if "mask" in prediction:
        return {**row, "mask": png_bytes(Image.fromarray(prediction["mask"]))}
    row |= {key: list(prediction[key]) for key in ("boxes", "labels", "scores")}
    row["class_names"] = [classes[label] for label in row["labels"]]
    if "masks" in prediction:
        row["masks"] = [run_lengths(counts, size) for counts in prediction["masks"]]
    return row


def run_lengths(counts: bytes, size: tuple[int, int]) -> dict[str, Any]:
    """A mask of an image of `size` (H, W) as pycocotools takes it."""
    return {"size": list(size), "counts": counts}


def above(prediction: Prediction, min_score: float) -> Prediction:
    """The objects of a detection with at least this score; other predictions as they are."""
    if "boxes" not in prediction:
        return prediction
    kept = np.flatnonzero(prediction["scores"] >= min_score)
    parts = {key: prediction[key][kept] for key in ("boxes", "labels", "scores")}
    if "masks" in prediction:
        parts["masks"] = [prediction["masks"][i] for i in kept]
    return parts


def drawn(image: Pixels, prediction: Prediction, classes: tuple[str, ...]) -> Pixels:
    """The image (H, W, 3) with all that is predicted: a frame and a name, objects, or colours."""
    names = list(classes)
    if "label" in prediction:
        return draw_objects(image, _whole_image(image, prediction, names))
    if "mask" in prediction:
        return overlay_segmentation(image, prediction["mask"], names)
    found = {
        "boxes": torch.from_numpy(prediction["boxes"]),
        "labels": torch.from_numpy(prediction["labels"]) + 1,  # 0 is the detector's background
        "scores": torch.from_numpy(prediction["scores"]),
    }
    if prediction.get("masks"):
        size = image.shape[:2]
        masks = [coco_mask.decode(run_lengths(counts, size)) for counts in prediction["masks"]]
        found["masks"] = torch.from_numpy(np.stack(masks))[:, None].float()
    return overlay_detection(image, found, names, min_score=0.0)


def _whole_image(image: Pixels, prediction: Prediction, names: list[str]) -> Objects:
    """The label of an image as an object that fills it."""
    height, width = image.shape[:2]
    label = int(prediction["label"])
    text = f"{names[label]} {100 * prediction['score']:.0f} %"
    box = torch.tensor([[0.0, 0.0, width - 1, height - 1]])
    return Objects(box, [label], [text], None)


def jpeg_bytes(pixels: Pixels) -> bytes:
    """The picture (H, W, 3) as a JPEG file, with colours at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
