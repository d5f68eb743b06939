"""Patchify and back, visible and masked indices, gathering, and image sizes that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokens import gather_tokens, patchify, split_tokens, unpatchify
from tests.models import tiny

small = st.integers(1, 4)


@settings(deadline=None, max_examples=40)
@given(batch_size=small, channels=small, h=small, w=small, patch_size=small)
def test_unpatchify_inverts_patchify(
    batch_size: int, channels: int, h: int, w: int, patch_size: int
):
    shape = (batch_size, channels, h * patch_size, w * patch_size)
    images = torch.arange(torch.Size(shape).numel()).reshape(shape)
    patches = patchify(images, patch_size)
    assert patches.shape == (batch_size, h * w, patch_size**2 * channels)
    assert torch.equal(unpatchify(patches, (h, w), patch_size), images)


def test_patch_pixels_are_ordered_row_column_channel_and_patches_in_raster_order():
    num_rows, num_columns, patch_size, channels = 2, 3, 4, 3
    images = torch.arange(2 * channels * 8 * 12).reshape(2, channels, 8, 12)
    patches = patchify(images, patch_size)
    for y in range(num_rows):
        for x in range(num_columns):
            for row in range(patch_size):
                for column in range(patch_size):
                    for c in range(channels):
                        ours = patches[:, y * 3 + x, (row * patch_size + column) * channels + c]
                        pixel = images[:, c, y * patch_size + row, x * patch_size + column]
                        assert torch.equal(ours, pixel), (y, x, row, column, c)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_split_tokens_yields_visible_and_masked_indices_each_in_raster_order(data: st.DataObject):
    num_patches = data.draw(st.integers(2, 30))
    num_visible = data.draw(st.integers(1, num_patches - 1))
    row = [False] * num_visible + [True] * (num_patches - num_visible)
    mask = torch.tensor([data.draw(st.permutations(row)) for _ in range(3)])
    ids_visible, ids_masked = split_tokens(mask)
    for i in range(3):
        assert ids_visible[i].tolist() == [j for j in range(num_patches) if not mask[i, j]]
        assert ids_masked[i].tolist() == [j for j in range(num_patches) if mask[i, j]]


def test_split_tokens_with_a_given_count_equals_counting():
    mask = tiny.mask()
    for given_count, counted in zip(
        split_tokens(mask, tiny.NUM_VISIBLE), split_tokens(mask), strict=True
    ):
        assert torch.equal(given_count, counted)


def test_a_ragged_mask_is_refused():
    mask = torch.tensor([[True, False, True], [True, False, False]])
    with pytest.raises(ValueError, match=r"different numbers of patches \(\[1, 2\]\).*exact count"):
        split_tokens(mask)


@pytest.mark.parametrize("trailing", [(5,), (4, 4, 3)])
def test_gather_tokens_picks_each_images_own_tokens(trailing: tuple[int, ...]):
    x = torch.randn(2, 6, *trailing)
    ids = torch.tensor([[4, 0, 2], [1, 1, 5]])
    picked = gather_tokens(x, ids)
    assert picked.shape == (2, 3, *trailing)
    for i in range(2):
        for j in range(3):
            assert torch.equal(picked[i, j], x[i, ids[i, j]])


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(60, 64, "64x64"), (100, 8, "96x16"), (64, 250, "64x256"), (0, 32, "16x32")],
)
def test_an_image_size_between_patches_is_refused_and_the_nearest_named(
    height: int, width: int, nearest: str
):
    images = torch.zeros(1, 3, height, width)
    message = f"{height}x{width} is not a multiple of the patch size 16; use {nearest}$"
    with pytest.raises(ValueError, match=message):
        patchify(images, 16)
    with pytest.raises(ValueError, match=message):
        tiny.backbone()(images)
