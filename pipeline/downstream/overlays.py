"""Predictions drawn onto their images: boxes with names, masks, label maps.

Surprising: a class's colour depends on its number alone, so it is the same in every picture, of
every run, and whatever the number of classes.
"""

# n objects of an image, K classes

from __future__ import annotations

import colorsys
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

Pixels = NDArray[np.uint8]
IGNORED_COLOUR = (128, 128, 128)
MOST_DRAWN = 20
"""Boxes drawn on an image; a model that has learnt little is sure of a hundred."""
_GOLDEN = 0.618034  # steps of the golden ratio keep the hues of any first K classes apart
_TONES = ((0.85, 0.95), (0.65, 0.6), (0.5, 1.0))  # saturation, value; none near grey
_MASK_ALPHA = 0.45
_MAP_ALPHA = 0.6


class Objects(NamedTuple):
    """What is drawn on one image."""

    boxes: Tensor
    """(n, 4) float (x0, y0, x1, y1) in pixels."""
    classes: list[int]
    """Numbers from 0, for the colours."""
    texts: list[str]
    masks: Tensor | None
    """(n, H, W) bool."""

    def resized(self, scale: float, size: tuple[int, int]) -> Objects:
        """The same on an image resized by `scale` to `size` (H, W)."""
        masks = self.masks
        if masks is not None and len(masks):
            masks = torch.nn.functional.interpolate(masks[:, None].float(), size)[:, 0] > 0.5
        return self._replace(boxes=self.boxes * scale, masks=masks)


def class_colours(num_classes: int) -> Pixels:
    """(K, 3) colours, the first K of one endless list."""
    colours = [
        colorsys.hsv_to_rgb(i * _GOLDEN % 1, *_TONES[i % len(_TONES)]) for i in range(num_classes)
    ]
    return (np.array(colours).reshape(-1, 3) * 255).round().astype(np.uint8)


def overlay_detection(
    image: Pixels, prediction: dict[str, Tensor], classes: list[str], *, min_score: float = 0.3
) -> Pixels:
    """The image with its predicted boxes, names, probabilities and half transparent masks.

    Args:
        image: (H, W, 3).
        prediction: what torchvision's detectors return for it: boxes (n, 4), labels (n,) from 1,
            scores (n,), perhaps masks (n, 1, H, W).
        classes: names.
        min_score: predictions below are not drawn.
    """
    return draw_objects(image, predicted_objects(prediction, classes, min_score))


def overlay_segmentation(image: Pixels, predicted: Tensor | Pixels, classes: list[str]) -> Pixels:
    """The image (H, W, 3) under the colours of its predicted labels (H, W)."""
    colours = colour_map(predicted, len(classes))
    mixed = (1 - _MAP_ALPHA) * image.astype(np.float32) + _MAP_ALPHA * colours
    return mixed.round().astype(np.uint8)


def colour_map(labels: Tensor | Pixels, num_classes: int) -> Pixels:
    """Labels (H, W) -> colours (H, W, 3); what is no class, such as 255, is grey."""
    numbers = torch.as_tensor(labels).cpu().long().numpy()
    palette = np.concatenate([class_colours(num_classes), np.array([IGNORED_COLOUR], np.uint8)])
    is_class = (numbers >= 0) & (numbers < num_classes)
    return palette[np.where(is_class, numbers, num_classes)]


def predicted_objects(
    prediction: dict[str, Tensor], classes: list[str], min_score: float
) -> Objects:
    """The MOST_DRAWN best predictions of at least `min_score`, the best last, hence on top."""
    boxes, scores = prediction["boxes"].detach().cpu(), prediction["scores"].detach().cpu()
    order = scores.argsort(stable=True)
    order = order[(scores >= min_score)[order] & boxes.isfinite().all(1)[order]]
    order = order[-MOST_DRAWN:]
    numbers = (prediction["labels"].cpu()[order] - 1).tolist()
    masks = prediction["masks"].detach().cpu()[order, 0] > 0.5 if "masks" in prediction else None
    percents = (100 * scores[order]).tolist()
    return Objects(
        boxes=boxes[order],
        classes=numbers,
        texts=[f"{classes[k]} {p:.0f} %" for k, p in zip(numbers, percents, strict=True)],
        masks=masks,
    )


def true_objects(target: dict[str, Any], size: tuple[int, int], classes: list[str]) -> Objects:
    """Objects of a target as `CocoScores.add` takes it, of an image of `size` (H, W)."""
    numbers = (target["labels"].cpu().long() - 1).tolist()
    is_crowd = target["is_crowd"].tolist()
    masks = None
    if target.get("masks"):
        nothing = np.zeros(size, np.uint8)
        drawn = [
            nothing if counts is None else coco_mask.decode({"size": list(size), "counts": counts})
            for counts in target["masks"]
        ]
        masks = torch.as_tensor(np.stack(drawn)).bool()
    return Objects(
        boxes=torch.as_tensor(target["boxes"]).cpu().reshape(-1, 4),
        classes=numbers,
        texts=[
            classes[k] + (" (crowd)" if crowd else "")
            for k, crowd in zip(numbers, is_crowd, strict=True)
        ],
        masks=masks,
    )


def draw_objects(image: Pixels, objects: Objects) -> Pixels:
    """Draw objects on an image (H, W, 3), the last on top; lines and names fit the image's size."""
    if not objects.classes:
        return image.copy()
    longest = max(image.shape[:2])
    palette = class_colours(max(objects.classes) + 1).tolist()
    colours = [tuple(palette[k]) for k in objects.classes]
    canvas = torch.from_numpy(image.copy()).permute(2, 0, 1)
    if objects.masks is not None:
        # One by one: torchvision mixes the colours of masks drawn together where they overlap.
        for mask, colour in zip(objects.masks, colours, strict=True):
            canvas = draw_segmentation_masks(canvas, mask, _MASK_ALPHA, colour)
    # torchvision refuses boxes whose corners are swapped; a model's may be by rounding.
    boxes = torch.cat([objects.boxes[:, :2], objects.boxes[:, 2:].max(objects.boxes[:, :2])], 1)
    canvas = draw_bounding_boxes(canvas, boxes, colors=colours, width=max(1, round(longest / 200)))
    picture = Image.fromarray(np.ascontiguousarray(canvas.permute(1, 2, 0).numpy()))
    # torchvision would need a font file for text of another size than its default.
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(9, round(longest / 32)))
    for box, colour, text in zip(boxes.tolist(), colours, objects.texts, strict=True):
        _draw_name(draw, (box[0], box[1]), text, colour, font)
    return np.asarray(picture).copy()


def _draw_name(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, ...],
    font: Any,
) -> None:
    """A name on its colour, above the box's upper left corner where there is room."""
    width, height = draw.textbbox((0, 0), text, font=font, anchor="lt")[2:]
    width, height = width + 4, height + 4
    canvas_width, canvas_height = draw.im.size
    left = min(max(0.0, corner[0]), max(0.0, canvas_width - width))
    top = corner[1] - height if corner[1] >= height else corner[1]
    top = min(max(0.0, top), max(0.0, canvas_height - height))
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = "black" if luminance > 130 else "white"
    draw.text((left + 2, top + 2), text, fill=ink, font=font, anchor="lt")
