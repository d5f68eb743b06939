"""The order of samples: an endless stream that depends on the seed alone.

Stream position k is use k % n of epoch k // n; step s of a run takes positions s*B to (s+1)*B of
the global batch B. So the cursor of a run is its step, nothing is dropped at an epoch's end, and
any worker can compute its share of any step without asking the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.reproducibility import sample_generator

_CACHED_EPOCHS = 4


def epoch_order(seed: int, epoch: int, sizes: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Permutation of all index rows for one epoch.

    Groups (Parquet row groups) are shuffled, then rows are permuted inside consecutive windows, so
    that a reader needs few groups at a time. Groups of one row (files) need no second pass.

    Args:
        seed: seed of the run.
        epoch: pass over the data, from 0.
        sizes: rows of each group, in index order.
        window: rows permuted together.
    """
    generator = sample_generator(seed, epoch, 0, "order")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    groups = generator.permutation(len(sizes))
    if len(sizes) == int(sizes.sum()):
        return groups
    order = np.concatenate([np.arange(starts[g], starts[g] + sizes[g]) for g in groups])
    for first in range(0, len(order), window):
        order[first : first + window] = generator.permutation(order[first : first + window])
    return order


class SampleStream:
    """The endless stream of (epoch, index row) of a data set.

    Args:
        seed: seed of the run.
        sizes: rows of each group that is read together, in index order.
        window: rows permuted together when groups have more than one row.
    """

    def __init__(self, seed: int, sizes: NDArray[np.int64], window: int) -> None:
        self.seed = seed
        self.sizes = sizes
        self.window = window
        self.num_samples = int(sizes.sum())
        self._orders: dict[int, NDArray[np.int64]] = {}

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and index rows at stream positions, each of the same shape."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch)[offsets[here]]
        return epochs, rows

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            if len(self._orders) >= _CACHED_EPOCHS:
                self._orders.pop(min(self._orders))
            self._orders[epoch] = epoch_order(self.seed, epoch, self.sizes, self.window)
        return self._orders[epoch]


def step_positions(
    step: int, *, global_batch_size: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Stream positions of one worker's share of a step."""
    share = global_batch_size // world_size
    first = step * global_batch_size + rank * share
    return np.arange(first, first + share)
