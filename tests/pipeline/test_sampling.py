"""The order of samples: permutations, windows, and the stream that steps and ranks share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.sampling import SampleStream, epoch_order, step_positions

GROUP_SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=30).map(np.array)


@settings(deadline=None)
@given(sizes=GROUP_SIZES, window=st.integers(1, 200), epoch=st.integers(0, 10**6))
def test_order_of_an_epoch_is_a_permutation_of_all_rows(
    sizes: NDArray[np.int64], window: int, epoch: int
) -> None:
    order = epoch_order(0, epoch, sizes, window)
    assert sorted(order.tolist()) == list(range(sizes.sum()))


@settings(deadline=None)
@given(sizes=GROUP_SIZES, window=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_a_window_border_splits_at_most_one_group(
    sizes: NDArray[np.int64], window: int, seed: int
) -> None:
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(seed, 0, sizes, window)
    windows = [order[first : first + window] for first in range(0, len(order), window)]
    reads = sum(len(np.unique(group_of_row[rows])) for rows in windows)
    assert reads <= len(sizes) + len(windows) - 1


@pytest.mark.parametrize("sizes", [np.ones(100, dtype=int), np.full(10, 10)])
def test_order_depends_on_epoch_and_seed_alone(sizes: NDArray[np.int64]) -> None:
    places = list(itertools.product((0, 1), (0, 1)))
    orders = [epoch_order(seed, epoch, sizes, 50).tolist() for seed, epoch in places]
    assert orders == [epoch_order(seed, epoch, sizes, 50).tolist() for seed, epoch in places]
    assert len({tuple(order) for order in orders}) == 4


def test_rows_of_a_group_are_shuffled_among_the_other_groups_of_their_window() -> None:
    sizes = np.full(8, 50)
    order = epoch_order(0, 0, sizes, window=400)
    neighbours = np.diff(order // 50) == 0
    # Neighbours share a group with a chance of 1/8; in file order they would in 49 of 50 cases.
    assert neighbours.mean() < 0.25


@pytest.mark.parametrize("sizes", [np.ones(23, dtype=int), np.array([5, 5, 5, 5, 3])])
def test_stream_covers_each_sample_once_an_epoch_whatever_the_batch(
    sizes: NDArray[np.int64],
) -> None:
    stream = SampleStream(0, sizes, window=8)
    steps = [stream.at(step_positions(step, global_batch_size=6)) for step in range(23)]
    epochs, rows = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    assert epochs.tolist() == np.repeat(np.arange(6), 23).tolist()
    for epoch in range(6):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(23))
    assert any(len(np.unique(e)) == 2 for e, _ in steps), "a step spans two epochs"


def test_batch_larger_than_the_data_set_takes_from_several_epochs() -> None:
    epochs, rows = SampleStream(0, np.ones(3, dtype=int), window=1).at(np.arange(10))
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [sorted(rows[i : i + 3].tolist()) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


def test_stream_forgets_old_epochs_without_changing_them() -> None:
    stream = SampleStream(5, np.ones(7, dtype=int), window=1)
    first = stream.at(np.arange(7))[1].tolist()
    stream.at(np.arange(7 * 20))
    assert len(stream._orders) <= 4
    assert stream.at(np.arange(7))[1].tolist() == first


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_partition_a_step(world_size: int) -> None:
    shares = [
        step_positions(3, global_batch_size=8, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {8 // world_size}
    assert np.concatenate(shares).tolist() == list(range(24, 32))


def test_starting_at_a_later_step_equals_skipping_to_it() -> None:
    def rows(stream: SampleStream, steps: range) -> list[int]:
        parts = [stream.at(step_positions(step, global_batch_size=6))[1] for step in steps]
        return np.concatenate(parts).tolist()

    sizes = np.array([4, 4, 4, 1])
    uninterrupted = rows(SampleStream(1, sizes, window=5), range(20))
    assert rows(SampleStream(1, sizes, window=5), range(9, 20)) == uninterrupted[9 * 6 :]
