"""The data sets of a run, opened and looked at before anything expensive starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data import SampleFactory
from pipeline.decoding import BadImageError, EncodedImage
from pipeline.pretrain_config import PretrainConfig
from pipeline.reading import UnreadableSampleError
from pipeline.sources import Index, build_index

SYNTHETIC_SAMPLES = 1_281_167  # of ImageNet-1k, so that epochs turn into familiar numbers of steps


@dataclass(frozen=True)
class DataSets:
    """Indices of a run; None when the data are synthetic."""

    train: Index | None
    val: Index | None
    facts: dict[str, Any]
    """What `probe` found in the training images; empty when they are synthetic."""

    @classmethod
    def open(cls, config: PretrainConfig) -> DataSets:
        """Build the indices once, here, and look at a few images.

        Raises:
            ValueError: no images, or none that can be decoded, or too many damaged files.
            FileNotFoundError: a path does not exist.
        """
        data = config.data
        if data.synthetic:
            return cls(None, None, {})
        train = build_index(data.path, "data.path", data.max_bad_fraction)
        facts = probe(config, train)
        if not data.val_path:
            return cls(train, train, facts)
        return cls(train, build_index(data.val_path, "data.val_path", data.max_bad_fraction), facts)

    @property
    def num_samples(self) -> int:
        """Training images."""
        return self.train.num_samples if self.train else SYNTHETIC_SAMPLES


def probe(config: PretrainConfig, index: Index, num_images: int = 32) -> dict[str, Any]:
    """Decode a few images before any worker is started.

    Returns:
        Counts, sizes, time per image, and what was wrong with unreadable ones.

    Raises:
        ValueError: not one of the probed images can be decoded.
    """
    factory = SampleFactory.build(config, index)
    rows = np.unique(np.linspace(0, len(factory.reader) - 1, num_images).astype(int)).tolist()
    sizes: list[tuple[int, int]] = []
    problems: list[str] = []
    seconds = 0.0
    for row in rows:
        try:
            sizes.append(EncodedImage.open(factory.reader.read(row).encoded).size)
            start = time.perf_counter()
            factory.sample(0, row)
            seconds += time.perf_counter() - start
        except (BadImageError, UnreadableSampleError) as error:
            problems.append(f"{factory.reader.location(row)}: {error}")
    if not sizes:
        raise ValueError(
            f"data.path='{config.data.path}': none of {len(rows)} probed images can be decoded; "
            f"first problem: {problems[0]}"
        )
    widths, heights = zip(*sizes, strict=True)
    return {
        "num_samples": len(factory.reader),
        "num_probed": len(rows),
        "problems": problems,
        "smallest": (min(widths), min(heights)),
        "largest": (max(widths), max(heights)),
        "seconds_per_image": seconds / len(sizes),
    }
