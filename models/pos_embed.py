"""Position tables: the 2-D sin-cos table and the two ways the official code resizes a table.

The surprising fact: resizing "by scale factor" (at forward time) and "by size" (when loading a
checkpoint) give different numbers for the same grid, so the caller must name the mode. A graph that
is exported for images of every size cannot branch on the size; there the same numbers come from
matrix products.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ResizeMode = Literal["scale_factor", "size"]


def sincos_pos_embed_2d(embed_dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos table, (h*w, embed_dim), first half columns, second half rows.

    The layout is MAE's: [sin x, cos x, sin y, cos y]. (timm's `build_sincos2d_pos_embed` orders the
    four quarters differently, so it cannot stand in.)

    Raises:
        ValueError: embed_dim is not divisible by 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim={embed_dim} must be divisible by 4 for 2-D sin-cos positions")
    h, w = grid
    bands = torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4)
    omega = 10000.0**-bands  # (embed_dim/4,)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.reshape(-1, 1).to(torch.float64) * omega for axis in (x, y)]
    table = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)
    return table.to(torch.float32)


def resize_pos_embed(
    table: Tensor, grid: tuple[int, int], mode: ResizeMode, *, even_if_equal: bool = False
) -> Tensor:
    """Resize a square position table (1, N, D) to a grid by bicubic interpolation.

    Args:
        table: (1, N, D) with N a square number.
        grid: target (h, w) in tokens.
        mode: "scale_factor" is what the official forward does (factor (h + 0.1) / sqrt(N), see
            itpn_pixel/models/models_itpn.py:318); "size" is what its checkpoint loaders do.
        even_if_equal: resample although the grid already fits. With "scale_factor" that is not the
            identity: the 0.1 shifts the sampling points by up to a tenth of a token.

    Returns:
        (1, h*w, D); the table itself when the grid already fits and nothing is forced.
    """
    side = round(table.shape[1] ** 0.5)
    assert side * side == table.shape[1], f"position table of {table.shape[1]} tokens is not square"
    h, w = grid
    if isinstance(h, torch.SymInt) or isinstance(w, torch.SymInt):
        return resize_by_matrices(table, grid, mode, even_if_equal=even_if_equal)
    if (h, w) == (side, side) and not even_if_equal:
        return table
    image = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    if mode == "size":
        image = F.interpolate(image, size=(h, w), mode="bicubic", align_corners=False)
    else:
        # differs from `size`: the 0.1 that guards the rounding also shifts the sampling points
        factor = ((h + 0.1) / side, (w + 0.1) / side)
        image = F.interpolate(image, scale_factor=factor, mode="bicubic", align_corners=False)
    assert image.shape[-2:] == (h, w), f"resized table is {tuple(image.shape[-2:])}, not {(h, w)}"
    return image.permute(0, 2, 3, 1).reshape(1, h * w, -1)


def resize_by_matrices(
    table: Tensor, grid: tuple[int, int], mode: ResizeMode, *, even_if_equal: bool = False
) -> Tensor:
    """`resize_pos_embed` without a branch on the grid, for graphs of images of every size.

    Differs from it by the rounding of float32, and not at all where the grid already fits: there
    the matrices are identities.
    """
    side = round(table.shape[1] ** 0.5)
    h, w = grid
    rows, columns = (torch.scalar_tensor(n, dtype=torch.float32) for n in (h, w))
    guard = torch.tensor(0.1 if mode == "scale_factor" else 0.0)
    if not even_if_equal:
        guard = torch.where((rows == side) & (columns == side), 0.0, guard)
    image = table.reshape(side, side, -1)
    image = torch.einsum("ha,abd->hbd", bicubic_matrix(h, side, side / (rows + guard)), image)
    image = torch.einsum("wb,hbd->hwd", bicubic_matrix(w, side, side / (columns + guard)), image)
    return image.reshape(1, h * w, -1)


def bicubic_matrix(size: int, old_size: int, step: Tensor) -> Tensor:
    """(size, old_size): the weights of `F.interpolate(mode="bicubic")` along one side.

    Args:
        size: samples to take.
        old_size: samples there are.
        step: distance of the new samples in old ones, a scalar.
    """
    a = -0.75  # torch's coefficient of the cubic convolution
    at = (torch.arange(size) + 0.5) * step - 0.5
    first = at.floor()
    matrix = torch.zeros(())
    for k in (-1, 0, 1, 2):
        d = (at - first - k).abs()
        inner = ((a + 2) * d - (a + 3)) * d * d + 1
        outer = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weight = inner if k in (0, 1) else outer  # |d| <= 1, or 1 <= |d| <= 2
        column = (first.long() + k).clamp(0, old_size - 1)  # the edge repeats
        matrix = matrix + weight[:, None] * (column[:, None] == torch.arange(old_size))
    return matrix


def relative_position_index(
    grid: tuple[int, int], device: torch.device | str | None = None
) -> Tensor:
    """Index of each token pair in a relative position table, (N, N) int64 (the Swin index).

    Entry (i, j) is (dh + h - 1) * (2w - 1) + (dw + w - 1) for the offset (dh, dw) of i from j.
    """
    h, w = grid
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    y, x = y.flatten(), x.flatten()  # (N,)
    dy = y[:, None] - y[None, :] + h - 1  # (N, N)
    dx = x[:, None] - x[None, :] + w - 1
    return dy * (2 * w - 1) + dx
