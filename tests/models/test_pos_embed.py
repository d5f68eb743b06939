"""Position tables against official numbers: sin-cos, both ways of resizing, relative index."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.layers import Attention, RelativePositions
from models.pos_embed import (
    ResizeMode,
    relative_position_index,
    resize_by_matrices,
    resize_pos_embed,
    sincos_pos_embed_2d,
)
from tests.models.golden import GOLDEN_DIR

# Same arithmetic in the same precision: only the order of float32 operations may differ.
ATOL = 1e-6


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return load_file(GOLDEN_DIR / "extras" / "misc.safetensors")


@pytest.mark.parametrize(
    ("name", "embed_dim", "side", "channel_step"),
    [("d48_g5", 48, 5, 1), ("d64_g4", 64, 4, 1), ("d512_g14", 512, 14, 8)],  # 14: every 8th stored
)
def test_sincos_table_matches_official(
    official: dict[str, Tensor], name: str, embed_dim: int, side: int, channel_step: int
):
    table = sincos_pos_embed_2d(embed_dim, (side, side))[:, ::channel_step]
    torch.testing.assert_close(table, official[f"sincos/{name}"], atol=ATOL, rtol=0)


def test_sincos_first_half_depends_on_the_column_only_and_second_on_the_row():
    table = sincos_pos_embed_2d(16, (2, 3)).reshape(2, 3, 16)
    columns, rows = table.chunk(2, dim=-1)
    assert torch.equal(columns[0], columns[1])
    assert torch.equal(rows[:, 0], rows[:, 2])
    assert not torch.equal(columns[:, 0], columns[:, 1])
    assert not torch.equal(rows[0], rows[1])


def test_sincos_refuses_a_width_that_is_not_a_multiple_of_four():
    with pytest.raises(ValueError, match="embed_dim=30 must be divisible by 4"):
        sincos_pos_embed_2d(30, (2, 2))


@pytest.mark.parametrize("even_if_equal", [False, True])
@pytest.mark.parametrize("mode", ["size", "scale_factor"])
@pytest.mark.parametrize("grid", [(4, 4), (4, 7), (9, 4), (5, 5), (1, 2), (31, 3)])
def test_matrices_resize_as_the_branches_do(
    mode: ResizeMode, grid: tuple[int, int], even_if_equal: bool
):
    table = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    expected = resize_pos_embed(table, grid, mode, even_if_equal=even_if_equal)
    found = resize_by_matrices(table, grid, mode, even_if_equal=even_if_equal)
    # Sums of 16 products in another order, of values up to 3.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    if grid == (4, 4) and not even_if_equal:
        assert torch.equal(found, table)


@pytest.mark.parametrize("side", [3, 6, 8])
@pytest.mark.parametrize(("mode", "stored"), [("size", "size"), ("scale_factor", "scale")])
def test_resized_pos_embed_matches_official(
    official: dict[str, Tensor], mode: ResizeMode, stored: str, side: int
):
    ours = resize_pos_embed(official["resize/pos_src_4x4"], (side, side), mode)
    expected = official[f"resize/pos_{stored}_bicubic_{side}x{side}"]
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


def test_the_two_resize_modes_differ(official: dict[str, Tensor]):
    table = official["resize/pos_src_4x4"]
    by_size, by_factor = (
        resize_pos_embed(table, (6, 6), mode) for mode in ("size", "scale_factor")
    )
    assert float((by_size - by_factor).abs().max()) > 1e-2


def test_resizing_to_a_rectangle_keeps_rows_and_columns_apart():
    ramp = torch.arange(4.0)  # each token holds its row number
    table = ramp.repeat_interleave(4).reshape(1, 16, 1)
    resized = resize_pos_embed(table, (2, 8), "size").reshape(2, 8)
    assert torch.allclose(resized, resized[:, :1].expand(2, 8), atol=ATOL)
    assert float(resized[1, 0] - resized[0, 0]) > 1


def test_a_fitting_table_is_returned_as_it_is(official: dict[str, Tensor]):
    table = official["resize/pos_src_4x4"]
    assert resize_pos_embed(table, (4, 4), "scale_factor") is table
    assert resize_pos_embed(table, (4, 4), "size") is table


def test_even_if_equal_is_the_identity_by_size_but_not_by_scale_factor(
    official: dict[str, Tensor],
):
    table = official["resize/pos_src_4x4"]
    by_size = resize_pos_embed(table, (4, 4), "size", even_if_equal=True)
    by_factor = resize_pos_embed(table, (4, 4), "scale_factor", even_if_equal=True)
    torch.testing.assert_close(by_size, table, atol=ATOL, rtol=0)
    assert float((by_factor - table).abs().max()) > 1e-2


def test_relative_position_index_matches_official(official: dict[str, Tensor]):
    expected = official["index/relative_position_index_3x3"]
    assert torch.equal(relative_position_index((3, 3)), expected)


def test_relative_position_index_of_a_rectangle_numbers_every_offset_once():
    index = relative_position_index((2, 3))
    offsets: dict[tuple[int, int], set[int]] = {}
    for i in range(6):
        for j in range(6):
            offset = (i // 3 - j // 3, i % 3 - j % 3)
            offsets.setdefault(offset, set()).add(int(index[i, j]))
    assert all(len(entries) == 1 for entries in offsets.values())
    in_raster_order = [offsets[key].pop() for key in sorted(offsets)]
    assert in_raster_order == list(range(3 * 5))


@pytest.mark.parametrize("grid_side", [6, 8])
def test_bias_table_is_resized_for_another_grid_as_official(
    official: dict[str, Tensor], grid_side: int
):
    source = official["resize/rpe_table_src_7x7"]
    attention = Attention(4, source.shape[1], rel_pos_grid=(4, 4))
    attention.load_state_dict({"relative_position_bias_table": source}, strict=False)
    index = relative_position_index((grid_side, grid_side))
    bias = attention.position_bias(RelativePositions(index, (grid_side, grid_side)))
    side = 2 * grid_side - 1
    expected = official[f"resize/rpe_table_bicubic_{side}x{side}"]
    torch.testing.assert_close(bias, expected[index].permute(2, 0, 1), atol=ATOL, rtol=0)


def test_bias_table_is_resized_to_a_rectangular_grid():
    attention = Attention(4, 2, rel_pos_grid=(4, 4))
    table = torch.randn(49, 2, generator=torch.Generator().manual_seed(0))
    attention.load_state_dict({"relative_position_bias_table": table}, strict=False)
    index = relative_position_index((2, 5))
    bias = attention.position_bias(RelativePositions(index, (2, 5)))
    image = table.T.reshape(1, 2, 7, 7)
    resized = F.interpolate(image, size=(3, 9), mode="bicubic").reshape(2, 27)
    torch.testing.assert_close(bias, resized[:, index], atol=ATOL, rtol=0)
