"""The order of samples: permutations, windows, and the stream that every step is cut from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.reproducibility import sample_generator
from pipeline.sampling import KeyedPermutation, SampleStream

Sizes = int | NDArray[np.int64]
GROUP_SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=30).map(np.array)
SIZES = st.one_of(st.integers(1, 400), st.just(np.array([1])), GROUP_SIZES)
WINDOWS = st.integers(1, 200)
BATCHES = st.integers(1, 60)
SEEDS = st.integers(0, 2**32)
property_test = settings(deadline=None, max_examples=40)


def permutation(n: int, seed: int) -> KeyedPermutation:
    return KeyedPermutation(n, np.random.default_rng(seed))


def number(sizes: Sizes) -> int:
    return sizes if isinstance(sizes, int) else int(sizes.sum())


def epoch_rows(stream: SampleStream, epoch: int) -> NDArray[np.int64]:
    """Rows of an epoch in the order of the stream."""
    n = stream.num_samples
    epochs, rows = stream.at(np.arange(epoch * n, (epoch + 1) * n))
    assert (epochs == epoch).all()
    return rows


def group_of_row(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(sizes)), sizes)


# ---- the cipher ----


@property_test
@given(n=st.one_of(st.integers(1, 70), st.integers(1, 5000)), seed=SEEDS)
def test_keyed_permutation_takes_each_number_to_another_in_the_range(n: int, seed: int) -> None:
    assert sorted(permutation(n, seed)(np.arange(n)).tolist()) == list(range(n))


@property_test
@given(data=st.data(), n=st.integers(2**20, 2**45), seed=SEEDS)
def test_keyed_permutation_of_a_range_too_large_for_memory_has_no_collisions(
    data: st.DataObject, n: int, seed: int
) -> None:
    first = data.draw(st.integers(0, n - 1000))
    images = permutation(n, seed)(np.arange(first, first + 1000))
    assert images.min() >= 0 and images.max() < n
    assert len(np.unique(images)) == 1000


def test_keyed_permutation_depends_on_the_key_alone() -> None:
    numbers = np.arange(100)
    keyed = [permutation(100, seed)(numbers).tolist() for seed in range(50)]
    assert keyed == [permutation(100, seed)(numbers).tolist() for seed in range(50)]
    assert len({tuple(images) for images in keyed}) == 50


def test_keyed_permutation_answers_for_single_numbers_as_for_all() -> None:
    cipher = permutation(77, 3)
    whole = cipher(np.arange(77))
    assert [int(cipher(np.array([i]))[0]) for i in range(77)] == whole.tolist()


@pytest.mark.parametrize("n", [2, 3, 7, 17])
def test_every_place_is_equally_likely_for_every_number(n: int) -> None:
    draws = 1000
    images = np.stack([permutation(n, seed)(np.arange(n)) for seed in range(draws)])
    counts = np.stack([np.bincount(column, minlength=n) for column in images.T])
    # 5 standard deviations: one of 289 counts strays that far in 1 of 6,000 choices of keys
    assert np.abs(counts - draws / n).max() < 5 * np.sqrt(draws / n * (1 - 1 / n))


# ---- an epoch ----


@property_test
@given(sizes=SIZES, window=WINDOWS, seed=SEEDS, epoch=st.integers(0, 10**6))
def test_an_epoch_holds_every_sample_exactly_once(
    sizes: Sizes, window: int, seed: int, epoch: int
) -> None:
    rows = epoch_rows(SampleStream(seed, sizes, window), epoch)
    assert sorted(rows.tolist()) == list(range(number(sizes)))


@property_test
@given(sizes=GROUP_SIZES, window=WINDOWS, seed=SEEDS)
def test_rows_of_a_window_come_from_the_groups_that_lie_in_it(
    sizes: NDArray[np.int64], window: int, seed: int
) -> None:
    """Groups laid end to end in some order: each lies in consecutive windows, all of it."""
    rows = epoch_rows(SampleStream(seed, sizes, window), 0)
    groups = group_of_row(sizes)[rows]
    windows = np.arange(len(rows)) // window
    reads = {(w, g) for w, g in zip(windows.tolist(), groups.tolist(), strict=True)}
    assert len(reads) <= len(sizes) + windows[-1], "a border splits at most one group"
    for group in range(len(sizes)):
        touched = sorted(w for w, g in reads if g == group)
        assert touched == list(range(touched[0], touched[-1] + 1))
        assert len(touched) <= 2 + (sizes[group] - 1) // window
        for inner in touched[1:-1]:
            assert (groups[windows == inner] == group).all(), "it fills the windows between"


@pytest.mark.parametrize(
    "sizes", [100, np.full(10, 10), np.array([100])], ids=["files", "groups", "group"]
)
def test_order_of_an_epoch_depends_on_epoch_and_seed_alone(sizes: Sizes) -> None:
    places = list(itertools.product((0, 1), (0, 1)))
    orders = [epoch_rows(SampleStream(seed, sizes, 50), e).tolist() for seed, e in places]
    again = [epoch_rows(SampleStream(seed, sizes, 50), e).tolist() for seed, e in places]
    assert orders == again
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("epoch", range(3))
@pytest.mark.parametrize("n", [10_000, 16_384, 16_385])
def test_files_of_an_epoch_are_well_shuffled(n: int, epoch: int) -> None:
    rows = epoch_rows(SampleStream(1, n, 1), epoch)
    displacement = np.abs(rows - np.arange(n)).mean()
    # Of random permutations: mean n/3, standard deviation sqrt(2n/45); 5 of them are allowed.
    assert abs(displacement - n / 3) < 5 * np.sqrt(2 * n / 45)
    for lag in (1, 2, 64, 128, 1000):  # also the strides that a cipher's halves could leave
        correlation = np.corrcoef(rows[lag:], rows[:-lag])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(n - lag), f"lag {lag}"
    # Fixed points are Poisson of mean 1, neighbours that stay neighbours of mean 2.
    assert (rows == np.arange(n)).sum() < 10
    assert (np.abs(np.diff(rows)) == 1).sum() < 12


def test_epochs_and_seeds_are_shuffled_independently_of_each_other() -> None:
    n = 10_000
    orders = [epoch_rows(SampleStream(seed, n, 1), e) for seed in (0, 1) for e in (0, 1, 2)]
    for left, right in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(n)
        assert (left == right).sum() < 10  # Poisson of mean 1


def test_groups_of_an_epoch_are_shuffled() -> None:
    sizes = np.full(1000, 2)
    rows = epoch_rows(SampleStream(0, sizes, 2), 0)
    groups = rows[::2] // 2
    assert sorted(groups.tolist()) == list(range(1000)), "a window of one group"
    assert abs(np.corrcoef(groups, np.arange(1000))[0, 1]) < 5 / np.sqrt(1000)


def test_windows_are_shuffled_each_in_its_own_way() -> None:
    rows = epoch_rows(SampleStream(0, np.array([400]), window=100), 0)
    windows = {tuple(rows[first : first + 100] - first) for first in range(0, 400, 100)}
    assert len(windows) == 4


def test_rows_of_a_group_are_shuffled_among_the_other_groups_of_their_window() -> None:
    rows = epoch_rows(SampleStream(0, np.full(8, 50), window=400), 0)
    # Neighbours share a group with a chance of 1/8; in file order they would in 49 of 50 cases.
    assert (np.diff(rows // 50) == 0).mean() < 0.25


# ---- the stream ----


@property_test
@given(sizes=SIZES, window=WINDOWS, batch=BATCHES, seed=SEEDS)
def test_steps_hold_each_sample_once_an_epoch_whatever_the_batch(
    sizes: Sizes, window: int, batch: int, seed: int
) -> None:
    """Also batches larger than the data set, and data sets of one sample."""
    n = number(sizes)
    stream = SampleStream(seed, sizes, window)
    num_steps = -(-3 * n // batch)  # at least three epochs
    steps = [stream.step(step, batch) for step in range(num_steps)]
    assert all(len(column) == batch for step in steps for column in step)
    positions, epochs, rows = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    assert sorted(positions.tolist()) == list(range(num_steps * batch))
    assert np.array_equal(epochs, positions // n)
    for epoch in range(3):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(n))


@property_test
@given(sizes=SIZES, window=WINDOWS, batch=BATCHES, seed=SEEDS, start=st.integers(0, 12))
def test_starting_at_step_k_equals_reading_up_to_it(
    sizes: Sizes, window: int, batch: int, seed: int, start: int
) -> None:
    whole = SampleStream(seed, sizes, window)
    for step in range(start):
        whole.step(step, batch)
    resumed = SampleStream(seed, sizes, window)
    for step in (start, start + 1):
        for left, right in zip(whole.step(step, batch), resumed.step(step, batch), strict=True):
            assert np.array_equal(left, right)


@property_test
@given(sizes=SIZES, window=WINDOWS, batch=BATCHES, step=st.integers(0, 50))
def test_a_step_is_a_range_of_the_stream(sizes: Sizes, window: int, batch: int, step: int) -> None:
    stream = SampleStream(0, sizes, window)
    positions, epochs, rows = stream.step(step, batch)
    assert sorted(positions.tolist()) == list(range(step * batch, (step + 1) * batch))
    for left, right in zip(stream.at(positions), (epochs, rows), strict=True):
        assert np.array_equal(left, right)


def test_steps_of_a_data_set_of_a_trillion_files_take_no_memory() -> None:
    stream = SampleStream(0, 10**12, 1)
    _, epochs, rows = stream.step(10**9, 4096)
    assert set(epochs.tolist()) == {4}
    assert len(np.unique(rows)) == 4096 and rows.min() >= 0 and rows.max() < 10**12


def test_stream_forgets_old_epochs_and_windows_without_changing_them() -> None:
    stream = SampleStream(5, np.full(20, 7), window=10)
    first = epoch_rows(stream, 0).tolist()
    for epoch in range(1, 20):
        epoch_rows(stream, epoch)
    assert len(stream._epochs) <= 2
    assert all(len(order._windows) <= 4 for order in stream._epochs.values())
    assert epoch_rows(stream, 0).tolist() == first


@property_test
@given(
    sizes=GROUP_SIZES,
    window=WINDOWS,
    share=st.integers(1, 40),
    num_workers=st.integers(1, 8),
    step=st.integers(0, 9),
)
def test_workers_slices_of_a_step_split_few_groups(
    sizes: NDArray[np.int64], window: int, share: int, num_workers: int, step: int
) -> None:
    """A group is read by two workers only where a border between their slices cuts it."""
    _, epochs, rows = SampleStream(0, sizes, window).step(step, share * num_workers)
    groups = list(zip(epochs.tolist(), group_of_row(sizes)[rows].tolist(), strict=True))
    slices = [set(groups[r * share : (r + 1) * share]) for r in range(num_workers)]
    assert sum(len(part) for part in slices) <= len(set(groups)) + num_workers - 1


def test_a_worker_of_many_reads_few_row_groups_a_step() -> None:
    stream = SampleStream(0, np.full(500, 64), window=1024)  # as prepared data sets are
    for step in range(7):
        _, _, rows = stream.step(step, 4096)
        for rank in range(64):
            assert len(np.unique(rows[rank * 64 : (rank + 1) * 64] // 64)) <= 3


def test_the_order_shares_no_numbers_with_crops_and_masks() -> None:
    streams = [sample_generator(0, 0, 0, name).integers(0, 2**63, 8) for name in ("order", "crop")]
    assert not set(streams[0].tolist()) & set(streams[1].tolist())


# ---- a share of the samples ----


@property_test
@given(data=st.data(), seed=SEEDS, sizes=SIZES, window=WINDOWS)
def test_a_share_is_the_same_samples_in_every_epoch_and_a_smaller_one_is_of_them(
    data: st.DataObject, seed: int, sizes: Sizes, window: int
) -> None:
    few = data.draw(st.integers(1, number(sizes)))
    fewer = data.draw(st.integers(1, few))
    streams = [SampleStream(seed, sizes, window, count) for count in (few, fewer)]
    used = [[set(epoch_rows(stream, epoch).tolist()) for epoch in (0, 3)] for stream in streams]
    assert used[0][0] == used[0][1] and len(used[0][0]) == few
    assert used[1][0] == used[1][1] and len(used[1][0]) == fewer
    assert used[1][0] <= used[0][0] <= set(range(number(sizes)))


def test_all_of_the_samples_are_the_stream_as_it_is_without_a_share() -> None:
    for sizes in (50, np.array([20, 30])):
        whole, all_used = SampleStream(1, sizes, 7), SampleStream(1, sizes, 7, 50)
        assert (epoch_rows(whole, 2) == epoch_rows(all_used, 2)).all()


def test_seeds_share_out_different_samples_and_batches_of_groups_come_sorted() -> None:
    sizes = np.full(40, 25)
    drawn = [set(epoch_rows(SampleStream(s, sizes, 100, 100), 0).tolist()) for s in (0, 1)]
    assert len(drawn[0] & drawn[1]) < 30
    _, _, rows = SampleStream(0, sizes, 100, 100).step(0, 64)
    assert (np.diff(rows) > 0).all()


@property_test
@given(SIZES, SEEDS, WINDOWS, BATCHES, st.integers(0, 50))
def test_positions_are_those_of_the_step(
    sizes: Sizes, seed: int, window: int, batch: int, step: int
) -> None:
    stream = SampleStream(seed, sizes, window)
    assert np.array_equal(stream.positions(step, batch), stream.step(step, batch)[0])
