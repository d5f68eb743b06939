"""Masks: which patches the student does not see. True = masked, always an exact count."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_mask(
    generator: np.random.Generator, num_patches: int, num_visible: int
) -> NDArray[np.bool_]:
    """Uniformly random mask (num_patches,) with exactly `num_visible` False entries (MAE)."""
    mask = np.ones(num_patches, dtype=np.bool_)
    mask[generator.permutation(num_patches)[:num_visible]] = False
    return mask
