"""Samples of classification: an augmented crop and its label.

Surprising: timm's RandAugment draws from Python's and numpy's global generators. Both are seeded
from the sample's own one and put back, so a sample remains a function of (seed, epoch, id). Only
where RandAugment is asked for does a data process import timm, and with it torch.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.decoding import EncodedImage
from pipeline.downstream.resized_crop import resized_crop
from pipeline.downstream.samples import Arrays, BadAnnotationError
from pipeline.finetune_config import ClassifyConfig
from pipeline.reading import Sample
from pipeline.transforms import random_resized_crop

_CROPPED_UP_TO = 224  # larger evaluation images are not cropped
_GLOBAL_GENERATORS = threading.Lock()


@dataclass(frozen=True)
class ClassifySamples:
    """Makes image (S, S, 3) uint8 and label () int64 (a `samples.TaskSamples`)."""

    config: ClassifyConfig
    num_classes: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Annotations it reads."""
        return ("label",)

    def train(self, sample: Sample, generator: np.random.Generator) -> Arrays:
        """Random resized crop, flip, RandAugment."""
        label, data = self._label(sample), self.config.data
        pixels = random_resized_crop(
            sample.encoded,
            generator,
            image_size=data.image_size,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            flip_prob=data.flip_prob,
        )
        if self.config.augment.rand_augment:
            augment = rand_augment(self.config.augment.rand_augment, data.image_size, data.mean)
            with global_generators_from(generator):
                pixels = np.asarray(augment(Image.fromarray(pixels)))
        return {"image": pixels, "label": label}

    def evaluate(self, sample: Sample) -> Arrays:
        """The middle of the image, by the official rule (itpn_pixel/util/datasets.py:51-65)."""
        label, side = self._label(sample), self.config.data.image_size
        ratio = self.config.eval_crop_ratio if side <= _CROPPED_UP_TO else 1.0
        short = int(side / ratio)
        image = EncodedImage.open(sample.encoded)
        # Truncated, as torchvision's Resize does it; the short side is exact.
        width, height = (int(short * length / min(image.size)) for length in image.size)
        left, upper = (round((length - side) / 2) for length in (width, height))
        crop = (left, upper, left + side, upper + side)
        return {"image": resized_crop(image, (width, height), crop), "label": label}

    def blank(self) -> Arrays:
        """A black image of class 0."""
        side = self.config.data.image_size
        return {"image": np.zeros((side, side, 3), np.uint8), "label": np.array(0, np.int64)}

    def _label(self, sample: Sample) -> NDArray[np.int64]:
        label = sample.annotations["label"]
        if label is None:
            raise BadAnnotationError(
                f"label is null; labels are 0 ... {self.num_classes - 1}: label the image, or "
                "leave it out and prepare the data again"
            )
        if not 0 <= label < self.num_classes:
            raise BadAnnotationError(
                f"label {label} is outside the {self.num_classes} classes, whose labels are 0 ... "
                f"{self.num_classes - 1}; prepare the data again with all classes"
            )
        return np.array(label, np.int64)


@lru_cache(maxsize=4)
def rand_augment(
    policy: str, image_size: int, mean: tuple[float, ...]
) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment with the parameters its `create_transform` gives it.

    Args:
        policy: such as rand-m9-mstd0.5-inc1.
        image_size: side of the images in pixels; the longest shift is 0.45 of it.
        mean: channel means in [0, 1]; what is shifted in has their colour.

    Raises:
        ValueError: no policy timm knows.
    """
    from timm.data.auto_augment import rand_augment_transform

    params: dict[str, Any] = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        augment: Callable[[Image.Image], Image.Image] = rand_augment_transform(policy, params)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"augment.rand_augment='{policy}' is no policy of timm ({error}); use e.g. "
            "rand-m9-mstd0.5-inc1, or '' for none"
        ) from error
    return augment


@contextlib.contextmanager
def global_generators_from(generator: np.random.Generator) -> Iterator[None]:
    """Python's and numpy's global generators, seeded from this one; afterwards as they were."""
    python_seed, numpy_seed = generator.integers(0, 2**32, 2).tolist()
    with _GLOBAL_GENERATORS:  # two threads that make samples would draw from each other's
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            random.seed(python_seed)
            np.random.seed(numpy_seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
