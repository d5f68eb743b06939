"""Encoded bytes -> RGB pixels, without torch: importing it would add seconds to each data worker.

JPEG goes through libjpeg-turbo (simplejpeg), everything else and every JPEG it declines through
Pillow. The rules, for any format:
* EXIF rotation is applied; unreadable EXIF is ignored.
* 16-bit greys are scaled to 8 bits; floats in [0, 1] too; CMYK, palettes and YCbCr are converted.
* Alpha is dropped, as Pillow's conversion to RGB does; of an animation the first frame is used.
* More than MAX_PIXELS pixels is a decompression bomb.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 178_956_970  # where Pillow, too, takes an image for a decompression bomb
_JPEG_START = b"\xff\xd8\xff"
_ORIENTATION_TAG = 0x0112
_PNG_EXIF_MARKERS = (b"eXIf", b"Raw profile type exif")
_TRANSPOSED = (5, 6, 7, 8)
_MIRRORED_X = (2, 3, 6, 7)
_MIRRORED_Y = (3, 4, 7, 8)


class BadImageError(ValueError):
    """The bytes are not an image that can be decoded."""


@dataclass(frozen=True)
class EncodedImage:
    """An image whose size is known and whose pixels are decoded when asked for."""

    encoded: bytes
    stored_size: tuple[int, int]
    """(width, height) of the pixels in the file."""
    orientation: int
    """EXIF orientation, 1 to 8."""
    is_plain_jpeg: bool
    """Whether libjpeg-turbo can decode it to RGB."""

    @classmethod
    def open(cls, encoded: bytes) -> EncodedImage:
        """Read the header.

        Raises:
            BadImageError: empty, not an image, or a decompression bomb.
        """
        if not encoded:
            raise BadImageError("the file is empty")
        image = cls._open_jpeg(encoded) or cls._open_any(encoded)
        width, height = image.stored_size
        if width * height > MAX_PIXELS:
            raise BadImageError(
                f"{width}x{height} pixels are more than {MAX_PIXELS}: a decompression bomb"
            )
        return image

    @classmethod
    def _open_jpeg(cls, encoded: bytes) -> EncodedImage | None:
        if not encoded.startswith(_JPEG_START):
            return None
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        except ValueError:
            return None
        if colorspace in ("CMYK", "YCCK"):
            return None
        orientation = 1
        if _has_exif(encoded):
            orientation = _orientation(encoded)
        return cls(encoded, (int(width), int(height)), orientation, True)

    @classmethod
    def _open_any(cls, encoded: bytes) -> EncodedImage:
        try:
            with _opened(encoded) as file:
                return cls(encoded, file.size, _orientation(encoded), False)
        except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
            raise BadImageError(f"{type(error).__name__}: {error}") from error

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels as a viewer shows them, after rotation."""
        width, height = self.stored_size
        return (height, width) if self.orientation in _TRANSPOSED else (width, height)

    def decode(self, reduction: int = 1) -> NDArray[np.uint8]:
        """RGB pixels (H, W, 3), rotated as EXIF says.

        Args:
            reduction: 1, 2, 4 or 8: a JPEG's sides may come back divided by it (rounded up), which
                is much faster; other formats always come at full size.

        Raises:
            BadImageError: truncated or corrupt.
        """
        pixels = self._decode_jpeg(reduction) if self.is_plain_jpeg else None
        if pixels is None:
            pixels = _decode_any(self.encoded)
        return _rotate(pixels, self.orientation)

    def _decode_jpeg(self, reduction: int) -> NDArray[np.uint8] | None:
        width, height = self.stored_size
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                self.encoded,
                "RGB",
                min_width=math.ceil(width / reduction),
                min_height=math.ceil(height / reduction),
            )
        except ValueError:  # truncated, or merely odd: Pillow tells them apart
            return None
        return pixels


def reduced_box(
    image: EncodedImage, box: tuple[int, int, int, int], pixels: NDArray[np.uint8]
) -> tuple[float, float, float, float]:
    """A box (left, upper, right, lower) of an image, in pixels of what `decode` returned of it.

    A decoder rounds reduced sizes up at the right and lower end of the stored pixels. So the factor
    is the reduction and not the ratio of the sizes, and where the image is mirrored, what was
    rounded up comes first.
    """
    (width, height), (rows, columns) = image.size, pixels.shape[:2]
    reduction = round(width / columns)
    x = columns - width / reduction if image.orientation in _MIRRORED_X else 0.0
    y = rows - height / reduction if image.orientation in _MIRRORED_Y else 0.0
    left, upper, right, lower = (side / reduction for side in box)
    return (left + x, upper + y, min(right + x, columns), min(lower + y, rows))


def decode_image(encoded: bytes) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) of an encoded image at full size, by the rules above.

    Raises:
        BadImageError: not an image, truncated, corrupt, or a decompression bomb.
    """
    return EncodedImage.open(encoded).decode()


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs half the size of ours, of odd metadata
        with Image.open(io.BytesIO(encoded)) as file:
            yield file


def _decode_any(encoded: bytes) -> NDArray[np.uint8]:
    try:
        with _opened(encoded) as file:
            file.load()
            is_deep = file.mode.startswith("I") or file.mode == "F"
            return np.asarray((_to_8_bits(file) if is_deep else file).convert("RGB"))
    except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey images of more than 8 bits; Pillow's conversion to RGB would clip them at 255."""
    grey = np.nan_to_num(np.asarray(image).astype(np.float32))
    largest = float(grey.max())
    scale = 1.0
    if image.mode == "F" and largest <= 1:
        scale = 255.0
    elif largest > 255:
        scale = 255 / 65535
    return Image.fromarray((grey * scale).clip(0, 255).astype(np.uint8))


def _has_exif(jpeg: bytes) -> bool:
    """Whether one of the application segments that precede the image is EXIF."""
    position = 2
    while jpeg[position : position + 1] == b"\xff":
        marker = jpeg[position + 1 : position + 2]
        if not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"):
            return False
        if jpeg[position + 4 : position + 10] == b"Exif\0\0":
            return True
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
    return False


def _orientation(encoded: bytes) -> int:
    """EXIF orientation 1 to 8; 1 when there is none, it cannot be read, or Pillow has obeyed it."""
    try:
        with _opened(encoded) as file:
            if file.format == "TIFF":  # Pillow rotates TIFFs, and only them, while it loads them
                return 1
            if file.format == "PNG" and not any(marker in encoded for marker in _PNG_EXIF_MARKERS):
                return 1  # asking Pillow would decode all pixels, as EXIF may follow them
            value = file.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # whatever Pillow's EXIF reader trips over
        return 1
    return value if value in range(1, 9) else 1


def _rotate(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation: 2 to 4 flip, 5 to 8 swap the axes first."""
    if orientation in _TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _MIRRORED_X:
        pixels = pixels[:, ::-1]
    if orientation in _MIRRORED_Y:
        pixels = pixels[::-1]
    return pixels
