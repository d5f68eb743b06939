"""A part of a resized image, made without resizing the rest.

What the pixels of the part are does not change: they are made with a margin the kernel needs, which
is cut off again. Surprising: the margin is resized too, although the resizer could be given a box
inside a larger image. cykooz.resizer 4.0 then reads outside its buffer, and dies, whenever the
kernel at the first pixel begins with a weight of exactly 0; at a box that starts in the first pixel
of the image it never does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from cykooz_resizer import CropBox
from numpy.typing import NDArray

from pipeline.decoding import EncodedImage, reduced_box
from pipeline.transforms import Box, resize

Size = tuple[int, int]
"""(width, height) in pixels."""
_KEPT_FACTOR = 2  # a decoded image has at least this many times the pixels per side of the resized
_KERNEL_RADIUS = 2  # of the bicubic kernel, in pixels of the coarser of the two images


def resized_crop(image: EncodedImage, size: Size, crop: Box) -> NDArray[np.uint8]:
    """Decode an image, resize it to `size`, crop it -> (h, w, 3) uint8 RGB.

    Of a large JPEG only a half, quarter or eighth of the resolution is decoded, as long as that
    leaves twice the pixels the resized image has (as in `transforms.py`).

    Args:
        image: to be decoded.
        size: of the whole image after resizing.
        crop: the part wanted, in pixels of the resized image and inside it.

    Raises:
        BadImageError: see `EncodedImage.decode`.
    """
    pixels = image.decode(_reduction(image.size, size))
    x0, y0, x1, y1 = reduced_box(image, (0, 0, *image.size), pixels)
    columns = _Span.around(crop[0], crop[2], size[0], x0, x1)
    rows = _Span.around(crop[1], crop[3], size[1], y0, y1)
    part = pixels[rows.first : rows.last, columns.first : columns.last]
    box = CropBox(columns.start, rows.start, columns.length, rows.length)
    resized = resize(part, columns.num_resized, rows.num_resized, box)
    return resized[rows.wanted, columns.wanted]


@dataclass(frozen=True)
class _Span:
    """Along one axis: resized pixels wanted, with a margin, and the source pixels they lie in."""

    first: int
    """First source pixel."""
    last: int
    """The one after the last."""
    start: float
    """Where the first resized pixel begins, in source pixels from `first`; below 1."""
    length: float
    """Of all resized pixels, in source pixels."""
    num_resized: int
    """Resized pixels with their margin."""
    wanted: slice
    """Those of them that are wanted."""

    @classmethod
    def around(cls, low: int, high: int, num_all: int, begin: float, end: float) -> _Span:
        """Span of the resized pixels low..high-1 of num_all; the image is begin..end in the source,
        in pixels."""
        step = (end - begin) / num_all
        margin = math.ceil(_KERNEL_RADIUS * max(1.0, step) / step)
        lowest, highest = max(0, low - margin), min(num_all, high + margin)
        start, stop = begin + lowest * step, min(begin + highest * step, end)
        first, last = math.floor(start), math.ceil(stop)
        wanted = slice(low - lowest, high - lowest)
        return cls(first, last, start - first, stop - start, highest - lowest, wanted)


def _reduction(size: Size, new_size: Size) -> int:
    """Largest of 8, 4, 2, 1 by which a decoder may divide the sides of the image."""
    factor = min(size[0] / new_size[0], size[1] / new_size[1])
    return next((r for r in (8, 4, 2) if factor >= r * _KEPT_FACTOR), 1)


def mirrored(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3), left and right exchanged; by channels, as copying `pixels[:, ::-1]` is slow."""
    return np.stack([pixels[:, ::-1, channel] for channel in range(pixels.shape[2])], axis=-1)
