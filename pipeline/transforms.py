"""Encoded bytes -> crop: decode, random resized crop, flip, uint8. Pillow and numpy only.

Importing torch here would add seconds to every data worker. Normalising happens on the device.
Rules of decoding: EXIF rotation is applied, 16-bit greys are scaled to 8 bits, everything else goes
through Pillow's conversion to RGB (alpha is dropped, of an animation the first frame is used).
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Box = tuple[float, float, float, float]
"""left, upper, right, lower in pixels of the decoded image."""


class BadImageError(ValueError):
    """The bytes are not an image Pillow can decode."""


def decode_image(encoded: bytes) -> Image.Image:
    """Decode to an RGB image.

    Raises:
        BadImageError: truncated, corrupt, not an image, or a decompression bomb.
    """
    try:
        file = Image.open(io.BytesIO(encoded))
        file.load()
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16- or 32-bit grey: RGB conversion would clip at 255
            grey = np.asarray(image).astype(np.float32)
            scale = 255 / 65535 if grey.max() > 255 else 1.0
            image = Image.fromarray((grey * scale).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
        raise BadImageError(f"{type(error).__name__}: {error}") from error


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
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, upper = (width - w) // 2, (height - h) // 2
    return (left, upper, left + w, upper + h)


def crop_image(
    image: Image.Image,
    generator: np.random.Generator,
    *,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip_prob: float,
) -> NDArray[np.uint8]:
    """Random resized crop (antialiased bicubic) and flip -> (image_size, image_size, 3) uint8."""
    box = random_crop_box(generator, image.size, scale, ratio)
    crop = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(crop)
    if generator.random() < flip_prob:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
