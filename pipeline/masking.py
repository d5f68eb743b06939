"""Masks: which patches the student does not see. True = masked, always an exact count."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MaskType = Literal["random", "block"]
_MIN_BLOCK_PATCHES = 16
_MIN_BLOCK_ASPECT = 0.3
_TRIES_PER_BLOCK = 10


def make_mask(
    mask_type: MaskType, generator: np.random.Generator, grid_size: int, num_visible: int
) -> NDArray[np.bool_]:
    """Mask (grid_size * grid_size,) of an image with exactly `num_visible` False entries."""
    if mask_type == "block":
        return block_mask(generator, grid_size, num_visible)
    return random_mask(generator, grid_size * grid_size, num_visible)


def random_mask(
    generator: np.random.Generator, num_patches: int, num_visible: int
) -> NDArray[np.bool_]:
    """Uniformly random mask (num_patches,) with exactly `num_visible` False entries (MAE)."""
    mask = np.ones(num_patches, dtype=np.bool_)
    mask[generator.permutation(num_patches)[:num_visible]] = False
    return mask


def block_mask(
    generator: np.random.Generator, grid_size: int, num_visible: int
) -> NDArray[np.bool_]:
    """Block-wise mask (grid_size * grid_size,) with exactly `num_visible` False entries (BEiT).

    Rectangles of at least 16 patches and aspect 0.3 to 1/0.3 are added until no further one fits
    into the count (arXiv:2106.08254, algorithm 1).
    Differs from the official code (masking_generator.py): it stops there and leaves a third of the
    images with too few masked patches; here the rest is drawn uniformly from the visible ones.
    """
    mask = np.zeros((grid_size, grid_size), dtype=np.bool_)
    num_masked = grid_size * grid_size - num_visible
    while (missing := num_masked - int(mask.sum())) > 0:
        if not _add_block(generator, mask, missing):
            visible = np.flatnonzero(~mask)
            mask.flat[generator.permutation(visible)[:missing]] = True
    return mask.reshape(-1)


def _add_block(generator: np.random.Generator, mask: NDArray[np.bool_], missing: int) -> bool:
    """Mask one rectangle that adds 1 to `missing` patches; False when ten tries found none."""
    grid_size = len(mask)
    smallest = min(_MIN_BLOCK_PATCHES, missing)
    for _ in range(_TRIES_PER_BLOCK):
        area = generator.uniform(smallest, missing)
        aspect = math.exp(
            generator.uniform(math.log(_MIN_BLOCK_ASPECT), -math.log(_MIN_BLOCK_ASPECT))
        )
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if not (0 < height < grid_size and 0 < width < grid_size):
            continue
        top = int(generator.integers(0, grid_size - height + 1))
        left = int(generator.integers(0, grid_size - width + 1))
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - int(block.sum()) <= missing:
            block[:] = True
            return True
    return False
