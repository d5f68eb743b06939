"""Samples of semantic segmentation: an image and the class of each of its pixels, 255 = none.

The rules of mmsegmentation's ADE20K pipeline: resize by a random factor, crop, flip, pad.
Surprising: nothing is resized that is not in the crop. Crops are tried on the mask alone, whose
pixels are picked one by one, and only the one that is taken is cut out of the image.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.decoding import EncodedImage
from pipeline.downstream.resized_crop import Size, mirrored, resized_crop
from pipeline.downstream.samples import Arrays, BadAnnotationError
from pipeline.finetune_config import SegmentConfig
from pipeline.prepare.sample_check import IGNORE_ID
from pipeline.reading import Sample
from pipeline.transforms import Box

_LONG_PER_SHORT = 4  # mmsegmentation's scale (2048, 512): very long images are resized to less
_NUM_REDRAWS = 10
_MASK_MODES = ("L", "P", "1")  # ids of 8 bits; of a palette image the indices, not the colours


@dataclass(frozen=True)
class SegmentSamples:
    """Makes image (H, W, 3) uint8 and target (H, W) uint8 (a `samples.TaskSamples`).

    Args:
        config: the run.
        num_classes: after `reduce_zero_label`.
    """

    config: SegmentConfig
    num_classes: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Annotations it reads."""
        return ("mask",)

    def train(self, sample: Sample, generator: np.random.Generator) -> Arrays:
        """Image and target of `image_size`, padded at the right and lower end where too small."""
        data, segmenter = self.config.data, self.config.segmenter
        image = EncodedImage.open(sample.encoded)
        mask = self._mask(sample, image.size)
        factor = generator.uniform(*segmenter.scale_range)
        size = rescaled(image.size, data.image_size * factor)
        crop, target = self._crop(generator, mask, size)
        pixels = resized_crop(image, size, crop)
        if generator.random() < data.flip_prob:
            pixels, target = mirrored(pixels), target[:, ::-1]
        mean = [round(255 * value) for value in data.mean]
        return {
            "image": _pad(pixels, mean, data.image_size),
            "target": _pad(target, IGNORE_ID, data.image_size),
        }

    def evaluate(self, sample: Sample) -> Arrays:
        """The whole image at the size of evaluation, and its target at its own size."""
        image = EncodedImage.open(sample.encoded)
        target = self._target(self._mask(sample, image.size))
        short_side = self.config.segmenter.eval_short_side
        if not short_side:
            return {"image": image.decode(), "target": target}
        size = rescaled(image.size, short_side)
        return {"image": resized_crop(image, size, (0, 0, *size)), "target": target}

    def blank(self) -> Arrays:
        """A black image whose pixels are of no class."""
        side = self.config.data.image_size
        target = np.full((side, side), IGNORE_ID, np.uint8)
        return {"image": np.zeros((side, side, 3), np.uint8), "target": target}

    def _crop(
        self, generator: np.random.Generator, mask: NDArray[np.uint8], size: Size
    ) -> tuple[Box, NDArray[np.uint8]]:
        """A random part of the resized image, as (left, upper, right, lower), and its target.

        Drawn again while one class has too large a share of the labelled pixels; the last draw is
        taken whatever it holds.
        """
        largest_share = self.config.segmenter.max_class_ratio
        for _ in range(_NUM_REDRAWS + 1):
            crop = _random_crop(generator, size, self.config.data.image_size)
            target = self._target(resized_mask(mask, size, crop))
            if largest_share >= 1 or class_share(target) <= largest_share:
                break
        return crop, target

    def _mask(self, sample: Sample, size: Size) -> NDArray[np.uint8]:
        """Class ids (H, W) as they are stored.

        Raises:
            BadAnnotationError: no mask, of another size than the image, or with ids of no class.
        """
        ids = decode_mask(sample.annotations["mask"], size)
        num_ids = self.num_classes + self.config.segmenter.reduce_zero_label
        highest = int(np.where(ids == IGNORE_ID, 0, ids).max())
        if highest >= num_ids:
            raise BadAnnotationError(
                f"the mask has a pixel of class {highest}; ids are 0 ... {num_ids - 1}, and "
                f"{IGNORE_ID} for pixels of no class; mend the mask and prepare the data again"
            )
        return ids

    def _target(self, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is learnt, of stored ids."""
        if not self.config.segmenter.reduce_zero_label:
            return ids
        return np.where(ids == IGNORE_ID, ids, ids - np.uint8(1))  # 0 wraps around to 255


def decode_mask(encoded: bytes | None, size: Size) -> NDArray[np.uint8]:
    """Class ids (H, W) of a PNG.

    Args:
        encoded: the file.
        size: (width, height) of the image it belongs to.

    Raises:
        BadAnnotationError: none, no PNG of 8-bit ids, or another size.
    """
    if not encoded:
        raise BadAnnotationError("the sample has no mask; give it one, or leave it out")
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as file:
            if file.mode not in _MASK_MODES:
                kind = "16-bit ids" if file.mode.startswith("I") else "colours"
                raise BadAnnotationError(
                    f"the mask is a PNG of {kind} (mode {file.mode}); class ids need a grey or "
                    "palette PNG of 8 bits"
                )
            if file.size != size:
                raise BadAnnotationError(
                    f"the mask has {file.width}x{file.height} pixels, the image {size[0]}x{size[1]}"
                    " (after EXIF rotation); both must be of one size"
                )
            return np.asarray(file).astype(np.uint8)
    except BadAnnotationError:
        raise
    except Exception as error:  # Pillow raises anything from OSError to SyntaxError
        # Not `from error`: the quarantine would then quote the cause, which does not say "mask".
        raise BadAnnotationError(f"the mask is no whole PNG: {error}") from None


def rescaled(size: Size, short_side: float) -> Size:
    """Size of an image resized to a short side; the long one is at most four times as long.

    As mmcv.imrescale to (4 * short_side, short_side), which truncates these two.
    """
    short, long = int(short_side), int(_LONG_PER_SHORT * short_side)
    factor = min(short / min(size), long / max(size))
    width, height = (max(1, int(side * factor + 0.5)) for side in size)
    return width, height


def resized_mask(mask: NDArray[np.uint8], size: Size, crop: Box) -> NDArray[np.uint8]:
    """A part of a mask resized to `size` by nearest pixels (see `run_lengths.resize_nearest`)."""
    left, upper, right, lower = crop
    rows = ((np.arange(upper, lower) + 0.5) * mask.shape[0] / size[1]).astype(np.int64)
    columns = ((np.arange(left, right) + 0.5) * mask.shape[1] / size[0]).astype(np.int64)
    return mask[rows[:, None], columns]


def class_share(target: NDArray[np.uint8]) -> float:
    """Share of the most frequent class among the labelled pixels; 1 where none is labelled."""
    counts = np.bincount(target.ravel(), minlength=IGNORE_ID + 1)[:IGNORE_ID]
    labelled = int(counts.sum())
    return int(counts.max()) / labelled if labelled else 1.0


def _random_crop(generator: np.random.Generator, size: Size, side: int) -> Box:
    width, height = min(size[0], side), min(size[1], side)
    upper = int(generator.integers(0, size[1] - height + 1))
    left = int(generator.integers(0, size[0] - width + 1))
    return (left, upper, left + width, upper + height)


def _pad(values: NDArray[np.uint8], fill: Any, side: int) -> NDArray[np.uint8]:
    """(h, w, ...) -> (side, side, ...), filled up at the right and lower end."""
    padded = np.full((side, side, *values.shape[2:]), fill, np.uint8)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded
