"""Pictures of what a fine-tuned model predicts, as PNG bytes: truth and prediction side by side.

Surprising: a confusion matrix of many classes is drawn of the ones with most errors only, with the
rest of each row in one column; a thousand cells a side could not be read.
"""

# B batch, S side of the crops, K classes

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.downstream.overlays import (
    IGNORED_COLOUR,
    MOST_DRAWN,
    Objects,
    Pixels,
    class_colours,
    colour_map,
    draw_objects,
    predicted_objects,
    true_objects,
)
from pipeline.picture_grid import picture_grid, png_bytes

_FONT_PX = 12
_LINE_PX = 16
_TITLE_PX = 22
_MAX_CLASSES = 30
"""Rows of a confusion matrix."""
_MAX_NAME_PX = 140
_MAX_LEGEND = 40
_RIGHT, _WRONG = (0, 110, 40), (190, 0, 0)


def confusion_picture(confusion: Tensor, classes: list[str]) -> bytes:
    """Draw a confusion matrix (K, K) of counts, rows = true.

    A cell shows its share of the row in percent: blue on the diagonal, red off it. Of more than 30
    classes, the 30 with most errors are shown.
    """
    counts = confusion.cpu().double()
    errors = counts.sum(1) - counts.diag()
    shown = torch.arange(len(classes))
    if len(classes) > _MAX_CLASSES:
        shown = errors.argsort(descending=True, stable=True)[:_MAX_CLASSES].sort().values
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    cells = shares[shown][:, shown]
    columns = [classes[i] for i in shown.tolist()]
    title = "rows: true class, columns: predicted class, percent of the row"
    if len(shown) < len(classes):
        cells = torch.cat([cells, shares[shown].sum(1, keepdim=True) - cells.sum(1, True)], 1)
        columns.append("(all others)")
        title += f"; the {len(shown)} of {len(classes)} classes with most errors"
    return png_bytes(_matrix(cells, [classes[i] for i in shown.tolist()], columns, title))


def _matrix(cells: Tensor, rows: list[str], columns: list[str], title: str) -> Image.Image:
    font = _font()
    cell = 30
    left = int(max(font.getlength(_short(name)) for name in rows)) + 14
    name_px = int(max(font.getlength(_short(name)) for name in columns)) + 14
    top = _TITLE_PX + name_px
    width = max(left + cell * len(columns) + 10, int(font.getlength(title)) + 12)
    canvas = Image.new("RGB", (width, top + cell * len(rows) + 10), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), title, fill="black", font=font)
    for j, name in enumerate(columns):
        column = Image.new("RGB", (name_px, cell), "white")
        ImageDraw.Draw(column).text((6, cell / 2), _short(name), "black", font, anchor="lm")
        canvas.paste(column.rotate(90, expand=True), (left + j * cell, _TITLE_PX))
    for i, name in enumerate(rows):
        y = top + i * cell
        draw.text((left - 6, y + cell / 2), _short(name), "black", font, anchor="rm")
        for j, share in enumerate(cells[i].tolist()):
            x = left + j * cell
            full = np.array((30, 80, 170) if i == j else (200, 40, 30))
            # The root lets rare errors be seen.
            colour = 255 - (255 - full) * share**0.5
            box = (x, y, x + cell, y + cell)
            draw.rectangle(box, fill=tuple(colour.round().astype(int)), outline=(225, 225, 225))
            if share >= 0.005:
                ink = "white" if share > 0.4 else "black"
                middle = (x + cell / 2, y + cell / 2)
                draw.text(middle, f"{100 * share:.0f}", ink, font, anchor="mm")
    return canvas


def classification_picture(
    images: Tensor | Pixels,
    predicted: Sequence[tuple[str, float]],
    true: Sequence[str],
    *,
    tile_px: int = 160,
    num_columns: int = 6,
) -> bytes:
    """Draw images with the predicted class under them, green if right, else red over the true one.

    Args:
        images: (B, S, S, 3) uint8.
        predicted: name and probability in [0, 1] of each.
        true: name of each.
        tile_px: side of an image in the picture.
        num_columns: images in a row.
    """
    font = _font()
    tiles = []
    for pixels, (name, probability), truth in zip(_arrays(images), predicted, true, strict=True):
        tile = Image.new("RGB", (tile_px, tile_px + 2 * _LINE_PX + 4), "white")
        tile.paste(Image.fromarray(pixels).resize((tile_px, tile_px)), (0, 0))
        draw = ImageDraw.Draw(tile)
        ending = f" {100 * probability:.0f} %"
        line = _short(name, tile_px - font.getlength(ending)) + ending
        draw.text((0, tile_px + 2), line, _RIGHT if name == truth else _WRONG, font)
        if name != truth:
            line = _short(f"true: {truth}", tile_px)
            draw.text((0, tile_px + 2 + _LINE_PX), line, "black", font)
        tiles.append(tile)
    rows = [tiles[i : i + num_columns] for i in range(0, len(tiles), num_columns)]
    return png_bytes(picture_grid(rows))


def detection_picture(
    images: Sequence[Pixels],
    predictions: Sequence[dict[str, Tensor]],
    targets: Sequence[dict[str, Any]],
    classes: list[str],
    *,
    min_score: float = 0.3,
    tile_px: int = 400,
) -> bytes:
    """Draw a row an image: truth | prediction.

    Args:
        images: (H, W, 3) uint8 of any sizes.
        predictions: as torchvision's detectors return them, in pixels of the images.
        targets: as `CocoScores.add` takes them.
        classes: names.
        min_score: predictions below are not drawn.
        tile_px: longest side of an image in the picture.
    """
    rows = []
    for image, prediction, target in zip(_arrays(images), predictions, targets, strict=True):
        truth = true_objects(target, image.shape[:2], classes)
        found = predicted_objects(prediction, classes, min_score)
        rows.append([_detection_tile(image, objects, tile_px) for objects in (truth, found)])
    titles = ["truth", f"prediction: {MOST_DRAWN} best of score >= {min_score:g}"]
    return png_bytes(picture_grid(rows, titles))


def _detection_tile(image: Pixels, objects: Objects, tile_px: int) -> Image.Image:
    """Resized before drawing, so that lines and names are sharp."""
    resized = np.array(_resize(image, tile_px, Image.Resampling.BICUBIC))
    scale = tile_px / max(image.shape[:2])
    return Image.fromarray(draw_objects(resized, objects.resized(scale, resized.shape[:2])))


def segmentation_picture(
    images: Sequence[Pixels],
    predicted: Sequence[Tensor],
    targets: Sequence[Tensor],
    classes: list[str],
    *,
    tile_px: int = 240,
) -> bytes:
    """Draw a row an image: input | truth | prediction, and the names of the colours below.

    Args:
        images: (H, W, 3) uint8 of any sizes.
        predicted: (H, W) labels of each.
        targets: (H, W) labels of each; 255 = ignored is drawn grey.
        classes: names.
        tile_px: longest side of an image in the picture.
    """
    rows = []
    for image, *maps in zip(_arrays(images), targets, predicted, strict=True):
        tiles = [_resize(image, tile_px, Image.Resampling.BICUBIC)]
        for labels in maps:
            colours = colour_map(labels, len(classes))
            tiles.append(_resize(colours, tile_px, Image.Resampling.NEAREST))
        rows.append(tiles)
    grid = picture_grid(rows, ["input", "truth", "prediction"])
    pixels = torch.cat([labels.cpu().long().flatten() for labels in (*targets, *predicted)])
    legend = _legend(pixels, classes, grid.width)
    canvas = Image.new("RGB", (grid.width, grid.height + legend.height), "white")
    canvas.paste(grid, (0, 0))
    canvas.paste(legend, (0, grid.height))
    return png_bytes(canvas)


def _legend(pixels: Tensor, classes: list[str], width: int) -> Image.Image:
    """Colours and names of the classes among `pixels`, the most frequent first."""
    palette = class_colours(len(classes)).tolist()
    numbers, counts = pixels.unique(return_counts=True)
    present = numbers[counts.argsort(descending=True, stable=True)].tolist()
    known = [k for k in present if 0 <= k < len(classes)]
    entries = [(tuple(palette[k]), _short(classes[k])) for k in known[:_MAX_LEGEND]]
    if len(known) < len(present):
        entries.append((IGNORED_COLOUR, "ignored"))
    if len(known) > _MAX_LEGEND:
        entries.append(((255, 255, 255), f"and {len(known) - _MAX_LEGEND} more"))
    font = _font()
    column = max(int(font.getlength(name)) for _, name in entries) + 30
    per_row = max(1, width // column)
    canvas = Image.new("RGB", (width, 8 + _LINE_PX * -(-len(entries) // per_row)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (colour, name) in enumerate(entries):
        x, y = 6 + i % per_row * column, 2 + i // per_row * _LINE_PX
        draw.rectangle((x, y + 2, x + 12, y + 13), fill=colour)
        draw.text((x + 18, y + _LINE_PX / 2), name, "black", font, anchor="lm")
    return canvas


def _arrays(images: Any) -> list[Pixels]:
    """Tensors or arrays (H, W, 3) uint8 -> arrays."""
    return [np.ascontiguousarray(torch.as_tensor(image).cpu().numpy()) for image in images]


def _resize(pixels: Pixels, longest_px: int, resampling: Image.Resampling) -> Image.Image:
    height, width = pixels.shape[:2]
    scale = longest_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(pixels).resize(size, resampling)


def _short(name: str, max_px: float = _MAX_NAME_PX) -> str:
    """The name cut off with dots where it would be wider than `max_px`."""
    font = _font()
    if font.getlength(name) <= max_px:
        return name
    lengths = range(min(len(name), int(max_px)))  # no letter is narrower than a pixel
    cut = [f"{name[:n]}..." for n in lengths]
    return cut[max(0, bisect_right(cut, max_px, key=font.getlength) - 1)]


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(size=_FONT_PX)
