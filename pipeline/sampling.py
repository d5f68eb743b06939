"""The order of samples: an endless stream that depends on the seed alone.

Stream position k is use k % n of epoch k // n; step s of a run takes positions s*B to (s+1)*B of
the global batch B. So the cursor of a run is its step, nothing is dropped at an epoch's end, and
any worker can compute its share of any step without asking the others. Surprising: no permutation
of all samples is ever held. Files are shuffled by a cipher that computes each place on demand;
Parquet rows by shuffling row groups, then the rows inside windows of a bounded size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.reproducibility import sample_generator

Integers = NDArray[np.int64]
_ROUNDS = 6
_CACHED_EPOCHS = 2
_CACHED_WINDOWS = 4


class KeyedPermutation:
    """A pseudo-random permutation of range(n) that takes no memory: a Feistel cipher.

    Each round mixes one half of a number's bits with a hash of the other half, which any hash keeps
    invertible. Numbers that land outside range(n) are enciphered again until they land inside.

    Args:
        n: size of the range.
        generator: source of the round keys.
    """

    def __init__(self, n: int, generator: np.random.Generator) -> None:
        self.n = n
        self._half_bits = np.uint64(max(1, (max(1, n - 1).bit_length() + 1) // 2))
        self._keys = generator.integers(0, 2**64, _ROUNDS, dtype=np.uint64)

    def __call__(self, numbers: Integers) -> Integers:
        """Images of numbers in range(n), element by element."""
        values = self._encipher(numbers.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = self._half_bits
        low_mask = (np.uint64(1) << bits) - np.uint64(1)
        left, right = values >> bits, values & low_mask
        for key in self._keys:
            left, right = right, left ^ (_hash(right ^ key) & low_mask)
        return (left << bits) | right


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, which mixes every bit into every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SampleStream:
    """The endless stream of (epoch, index row) of a data set.

    Args:
        seed: seed of the run.
        sizes: rows of each group that is read together, in index order; or the number of samples
            when each is a file of its own.
        window: rows permuted together when there are groups.
        num_used: use so many samples, the same in every epoch, drawn by the seed; a smaller number
            draws from among those of a larger one. None: all.
    """

    def __init__(
        self, seed: int, sizes: Integers | int, window: int, num_used: int | None = None
    ) -> None:
        self.seed = seed
        self.window = window
        total = sizes if isinstance(sizes, int) else int(sizes.sum())
        self.num_samples = total if num_used is None else num_used
        self.is_grouped = not isinstance(sizes, int)
        self._pick: KeyedPermutation | None = None
        if self.num_samples < total:
            self._pick = KeyedPermutation(total, sample_generator(seed, 0, 0, "used"))
            sizes = self.num_samples  # scattered over the groups, they are shuffled like files
        self.sizes = sizes
        self._epochs: dict[int, _FileOrder | _GroupOrder] = {}

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Epochs and index rows at stream positions, each of the same shape."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch).at(offsets[here])
        return epochs, rows if self._pick is None else self._pick(rows)

    def step(self, step: int, global_batch_size: int) -> tuple[Integers, Integers, Integers]:
        """Positions, epochs and rows of a step's global batch.

        Grouped rows come sorted, so that each worker's slice of the batch touches few groups.
        """
        positions = _positions(step, global_batch_size)
        epochs, rows = self.at(positions)
        if not self.is_grouped:
            return positions, epochs, rows
        order = np.lexsort((rows, epochs))
        return positions[order], epochs[order], rows[order]

    def positions(self, step: int, global_batch_size: int) -> Integers:
        """The first part of `step` alone, for single files without asking for their order."""
        if self.is_grouped:
            return self.step(step, global_batch_size)[0]
        return _positions(step, global_batch_size)

    def _order(self, epoch: int) -> _FileOrder | _GroupOrder:
        if epoch not in self._epochs:
            _make_room(self._epochs, _CACHED_EPOCHS)
            if isinstance(self.sizes, int):
                self._epochs[epoch] = _FileOrder(self.seed, epoch, self.sizes)
            else:
                self._epochs[epoch] = _GroupOrder(self.seed, epoch, self.sizes, self.window)
        return self._epochs[epoch]


def _positions(step: int, global_batch_size: int) -> Integers:
    first = step * global_batch_size
    return np.arange(first, first + global_batch_size)


class _FileOrder:
    """One epoch of single files: all of them permuted together."""

    def __init__(self, seed: int, epoch: int, num_samples: int) -> None:
        self.at = KeyedPermutation(num_samples, sample_generator(seed, epoch, 0, "order"))


class _GroupOrder:
    """One epoch of groups: they are shuffled, then the rows inside consecutive windows."""

    def __init__(self, seed: int, epoch: int, sizes: Integers, window: int) -> None:
        self.seed, self.epoch, self.window = seed, epoch, window
        permutation = KeyedPermutation(len(sizes), sample_generator(seed, epoch, 0, "order"))
        groups = permutation(np.arange(len(sizes)))
        self._ends = np.cumsum(sizes[groups])  # of the shuffled groups, laid end to end
        self._shifts = (np.cumsum(sizes) - sizes)[groups] - (self._ends - sizes[groups])
        self._windows: dict[int, Integers] = {}

    def at(self, offsets: Integers) -> Integers:
        """Index rows at offsets into the epoch."""
        windows, places = np.divmod(offsets, self.window)
        shuffled = np.empty_like(offsets)
        for window in np.unique(windows).tolist():
            here = windows == window
            shuffled[here] = window * self.window + self._permutation(window)[places[here]]
        return shuffled + self._shifts[np.searchsorted(self._ends, shuffled, side="right")]

    def _permutation(self, window: int) -> Integers:
        """Permutation of the offsets inside a window; the last window may be shorter."""
        if window not in self._windows:
            _make_room(self._windows, _CACHED_WINDOWS)
            size = min(self.window, int(self._ends[-1]) - window * self.window)
            generator = sample_generator(self.seed, self.epoch, window + 1, "order")
            self._windows[window] = generator.permutation(size)
        return self._windows[window]


def _make_room(cache: dict[int, Any], size: int) -> None:
    while len(cache) >= size:
        cache.pop(next(iter(cache)))
