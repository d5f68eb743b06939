"""Encoded bytes -> training crop: random resized crop, flip, uint8. Normalising is the device's.

Boxes are drawn by torchvision's rule; the crop is resized with antialiased bicubic interpolation of
the pixels inside the box alone, as torchvision does. Surprising: of a large JPEG only a half,
quarter or eighth of the resolution is decoded, as long as the crop keeps twice the pixels it needs.
"""

from __future__ import annotations

import math

import numpy as np
from cykooz_resizer import (
    CropBox,
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)
from numpy.typing import NDArray

from pipeline.decoding import EncodedImage, reduced_box

Box = tuple[int, int, int, int]
"""left, upper, right, lower in pixels."""
_KEPT_FACTOR = 2  # a decoded crop has at least this many times the pixels per side that are needed


def random_resized_crop(
    encoded: bytes,
    generator: np.random.Generator,
    *,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip_prob: float,
) -> NDArray[np.uint8]:
    """Decode, crop, resize and flip -> (image_size, image_size, 3) uint8 RGB.

    Args:
        encoded: bytes of an image file.
        generator: source of the numbers.
        image_size: side of the crop in pixels.
        scale: range of the crop's area, as a share of the image.
        ratio: range of width / height, drawn uniformly in the logarithm.
        flip_prob: probability of a horizontal flip.

    Raises:
        BadImageError: see `decoding.decode_image`.
    """
    image = EncodedImage.open(encoded)
    box = random_crop_box(generator, image.size, scale, ratio)
    is_flipped = generator.random() < flip_prob
    pixels = image.decode(_reduction(box, image_size))
    crop = _resize_box(pixels, reduced_box(image, box, pixels), image_size)
    return _flip(crop) if is_flipped else crop


def random_crop_box(
    generator: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Box of a random resized crop, with torchvision's rule (10 tries, then a central crop).

    Args:
        generator: source of the numbers.
        size: image (width, height).
        scale: range of the area, as a share of the image.
        ratio: range of width / height, drawn uniformly in the logarithm.
    """
    width, height = size
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            upper = int(generator.integers(0, height - h + 1))
            return (left, upper, left + w, upper + h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = max(1, min(width, round(height * aspect)))
    h = max(1, min(height, round(width / aspect)))
    left, upper = (width - w) // 2, (height - h) // 2
    return (left, upper, left + w, upper + h)


def resize(
    pixels: NDArray[np.uint8], width: int, height: int, box: CropBox | None = None
) -> NDArray[np.uint8]:
    """Antialiased bicubic resize of (H, W, 3) uint8 to (height, width, 3).

    The kernel is Pillow's BICUBIC (a = -0.5), in SIMD integer arithmetic that gives the same bytes
    on every processor; values differ from Pillow's by 0.2 levels in the mean.

    Args:
        pixels: image.
        width: of the result, in pixels.
        height: of the result, in pixels.
        box: part to resize, in fractions of pixels; None for all of it.
    """
    source = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
    target = ImageData(width, height, PixelType.U8x3)
    options = ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom), crop_box=box)
    Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, 3)


def _resize_box(
    pixels: NDArray[np.uint8], box: tuple[float, float, float, float], side: int
) -> NDArray[np.uint8]:
    """A box of the image, in fractions of its pixels, resized to (side, side, 3)."""
    left, upper, right, lower = box
    x, y = math.floor(left), math.floor(upper)
    part = pixels[y : math.ceil(lower), x : math.ceil(right)]
    if part.shape[:2] == (lower - upper, right - left):  # a box of whole pixels
        return resize(part, side, side)
    return resize(part, side, side, CropBox(left - x, upper - y, right - left, lower - upper))


def _flip(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mirror left and right. Channel by channel: six times as fast as copying `pixels[:, ::-1]`."""
    flipped = np.empty_like(pixels)
    for channel in range(pixels.shape[2]):
        flipped[..., channel] = pixels[:, ::-1, channel]
    return flipped


def _reduction(box: Box, image_size: int) -> int:
    """Largest of 8, 4, 2, 1 by which a decoder may divide the sides of the image."""
    side = min(box[2] - box[0], box[3] - box[1])
    return next((r for r in (8, 4, 2) if side >= r * _KEPT_FACTOR * image_size), 1)
