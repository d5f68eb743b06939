"""Masks: exact count, uniform, and a function of (seed, epoch, sample id)."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.masking import random_mask
from pipeline.reproducibility import sample_generator


@settings(deadline=None)
@given(data=st.data(), num_patches=st.integers(1, 600), seed=st.integers(0, 2**32))
def test_mask_leaves_exactly_the_asked_number_visible(
    data: st.DataObject, num_patches: int, seed: int
) -> None:
    num_visible = data.draw(st.integers(0, num_patches))
    mask = random_mask(np.random.default_rng(seed), num_patches, num_visible)
    assert mask.shape == (num_patches,)
    assert mask.dtype == np.bool_
    assert int((~mask).sum()) == num_visible


def test_visible_patches_and_pairs_of_them_are_uniform() -> None:
    draws, N, V = 4000, 16, 4
    visible = np.stack(
        [~random_mask(sample_generator(0, 0, i, "mask"), N, V) for i in range(draws)]
    ).astype(int)
    together = visible.T @ visible  # (N, N): draws in which both patches are visible
    single, pair = V / N, V * (V - 1) / (N * (N - 1))
    for counts, p in ((np.diag(together), single), (together[np.triu_indices(N, 1)], pair)):
        # 5 standard deviations: one of 136 counts strays that far in 1 of 10,000 seeds.
        assert np.abs(counts - draws * p).max() < 5 * np.sqrt(draws * p * (1 - p))


def test_mask_is_a_function_of_seed_epoch_and_sample_id() -> None:
    def mask(seed: int, epoch: int, sample_id: int) -> bytes:
        return random_mask(sample_generator(seed, epoch, sample_id, "mask"), 196, 49).tobytes()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert [mask(*place) for place in places] == [mask(*place) for place in places]
    assert len({mask(*place) for place in places}) == len(places)
