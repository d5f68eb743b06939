"""One sample: check that its image decodes, fit mask and boxes to it, shrink all if asked.

Encoded bytes are kept as they are unless the image is shrunk. Surprising: width and height are
those after EXIF rotation, and masks or boxes of any other size make the sample bad: nobody can tell
which of the two was meant.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.decoding import BadImageError, EncodedImage, decode_image
from pipeline.prepare.coco import parse_annotations, scale_annotations
from pipeline.prepare.run_lengths import resize_nearest

IGNORE_ID = 255
_JPEG_QUALITY = 95
_MASK_MODES = ("L", "P", "1", "I;16", "I")


class BadMaskError(ValueError):
    """A mask that is no PNG of class ids, or has another size than its image."""


@dataclass
class SampleChecker:
    """Turns encoded bytes into rows of a shard; counts what it had to drop."""

    verify: bool
    short_side: int
    counts: Counter[str] = field(default_factory=Counter)
    highest_mask_id: int = -1

    def row(self, record: dict[str, Any], encoded: bytes, mask: bytes | None) -> dict[str, Any]:
        """Columns of the shard beyond sample_id and name.

        Raises:
            BadImageError, BadMaskError, FrameMismatchError: the sample cannot be used.
        """
        if not encoded:
            raise BadImageError("the image is empty (0 bytes)")
        size, pixels = self._measure(encoded)
        new_size = self._new_size(size)
        if new_size != size:
            pixels = np.asarray(decode_image(encoded)) if pixels is None else pixels
            encoded = _shrink(pixels, new_size)
            self.counts["images_shrunk"] += 1
        row = {"image": encoded, "width": new_size[0], "height": new_size[1]}
        row["label"] = record["label"]
        if record["annotations"] is not None:
            row |= self._boxes(record["annotations"], size, new_size)
        if mask is not None:
            row["mask"] = self._mask(mask, size, new_size)
        return row

    def _measure(self, encoded: bytes) -> tuple[tuple[int, int], NDArray[np.uint8] | None]:
        """(width, height), and the pixels where they had to be decoded."""
        if not self.verify:
            return EncodedImage.open(encoded).size, None
        pixels = np.asarray(decode_image(encoded))
        return (pixels.shape[1], pixels.shape[0]), pixels

    def _new_size(self, size: tuple[int, int]) -> tuple[int, int]:
        short = min(size)
        if not self.short_side or short <= self.short_side:
            return size
        scale = self.short_side / short
        return (round(size[0] * scale), round(size[1] * scale))

    def _boxes(
        self, annotations: str, size: tuple[int, int], new_size: tuple[int, int]
    ) -> dict[str, Any]:
        found = parse_annotations(annotations, *size, self.counts)
        if new_size != size:
            found = scale_annotations(found, size, new_size)
        return {
            "boxes": found.boxes,
            "box_labels": found.labels,
            "box_masks": found.masks,
            "box_is_crowd": found.is_crowd,
        }

    def _mask(self, encoded: bytes, size: tuple[int, int], new_size: tuple[int, int]) -> bytes:
        ids, mode = _decode_mask(encoded)
        if (ids.shape[1], ids.shape[0]) != size:
            raise BadMaskError(
                f"the mask has {ids.shape[1]}x{ids.shape[0]} pixels, the image {size[0]}x{size[1]} "
                "(after EXIF rotation)"
            )
        used = ids[ids != IGNORE_ID]
        self.highest_mask_id = max(self.highest_mask_id, int(used.max()) if used.size else -1)
        if new_size == size and mode != "1":
            return encoded
        buffer = io.BytesIO()
        Image.fromarray(resize_nearest(ids, new_size)).save(buffer, "PNG")
        return buffer.getvalue()


def _shrink(pixels: NDArray[np.uint8], size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _decode_mask(encoded: bytes) -> tuple[NDArray[Any], str]:
    """Class ids (H, W), uint8 or uint16; of a palette image the indices, not the colours."""
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
            mode = image.mode
            ids = np.asarray(image)
    except Exception as error:  # Pillow raises anything from OSError to SyntaxError
        # Not `from error`: the quarantine would then quote the cause, which does not say "mask".
        raise BadMaskError(f"the mask is no whole PNG: {error}") from None
    if mode not in _MASK_MODES:
        raise BadMaskError(
            f"the mask is a colour PNG (mode {mode}); class ids need a grey or palette PNG"
        )
    return ids.astype(np.uint8 if mode in ("L", "P", "1") else np.uint16), mode
