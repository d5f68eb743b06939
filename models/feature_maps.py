"""Token features as image-shaped maps: the levels that detection and segmentation heads read.

The surprising fact: the two tasks make different levels from one encoder. Detection takes the
pyramid and average-pools it further; segmentation sets every pyramid level beside the backbone
stage of the same stride and max-pools.
"""

# B batch, N patches, c cells per token side, d channels, F fpn_dim, D embed dim, h x w token grid

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.itpn import ITPNFeatures

OutputFormat = Literal["NCHW", "NHWC", "NLC"]
"""Layouts of a map, as timm names them; NLC is its cells in raster order."""


def fold_cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay the cells of all tokens out as one image.

    Args:
        x: (B, N, c, c, d), tokens in raster order.
        grid: token grid (h, w) with h * w = N.

    Returns:
        (B, d, h*c, w*c).
    """
    B, _, c, _, d = x.shape
    h, w = grid
    x = x.reshape(B, h, w, c, c, d).permute(0, 5, 1, 3, 2, 4)  # (B, d, h, c, w, c)
    return x.reshape(B, d, h * c, w * c)


def feature_maps(
    features: Iterable[Tensor], grid: tuple[int, int], output_fmt: OutputFormat = "NCHW"
) -> list[Tensor]:
    """Stages or levels as maps, in the layout asked for.

    Args:
        features: each (B, N, c, c, d).
        grid: token grid (h, w) with h * w = N.
        output_fmt: NCHW (B, d, h*c, w*c), NHWC (B, h*c, w*c, d) or NLC (B, h*c*w*c, d).

    Raises:
        ValueError: no such layout.
    """
    if output_fmt not in get_args(OutputFormat):
        raise ValueError(
            f"output_fmt={output_fmt!r} is unknown; use one of {', '.join(get_args(OutputFormat))}"
        )
    maps = [fold_cells(x, grid) for x in features]
    if output_fmt == "NCHW":
        return maps
    maps = [x.movedim(1, -1) for x in maps]
    return maps if output_fmt == "NHWC" else [x.flatten(1, 2) for x in maps]


def detection_levels(
    features: ITPNFeatures, grid: tuple[int, int], *, num_levels: int = 5
) -> dict[int, Tensor]:
    """Pyramid levels as maps; strides 32 and 64 are 2x2 averages of the level before.

    Source: det/mmdet/models/backbones/iTPN_pixel.py:376-410 (num_outs 3 to 5).

    Args:
        features: of all tokens (no mask).
        grid: token grid (h, w).
        num_levels: levels, finest first.

    Returns:
        {stride: (B, F, H/stride, W/stride)} in the order 4, 8, 16, 32, 64; sizes round down.

    Raises:
        ValueError: the grid is too small for so many levels.
    """
    _check_grid(grid, num_levels)
    levels = {stride: fold_cells(features.pyramid[stride], grid) for stride in (4, 8, 16)}
    for stride in (32, 64)[: num_levels - 3]:
        levels[stride] = F.avg_pool2d(levels[stride // 2], 2)
    return levels


def segmentation_levels(
    features: ITPNFeatures, grid: tuple[int, int], *, num_levels: int = 4
) -> dict[int, Tensor]:
    """Pyramid level and backbone stage side by side; further strides are 2x2 maxima.

    Source: seg/backbone/iTPN.py:391-430 (num_outs 4; 5 adds stride 64).

    Args:
        features: of all tokens (no mask).
        grid: token grid (h, w).
        num_levels: levels, finest first.

    Returns:
        {stride: (B, F + d, H/stride, W/stride)} in the order 4, 8, 16, 32, ... with d = D/4, D/2,
        D, D, ...; sizes round down.

    Raises:
        ValueError: the grid is too small for so many levels.
    """
    _check_grid(grid, num_levels)
    levels = {
        s: fold_cells(torch.cat([features.pyramid[s], features.stages[s]], dim=-1), grid)
        for s in (4, 8, 16)
    }
    for stride in (32, 64)[: num_levels - 3]:
        levels[stride] = F.max_pool2d(levels[stride // 2], 2)
    return levels


def _check_grid(grid: tuple[int, int], num_levels: int) -> None:
    smallest = 2 ** (num_levels - 3)
    if min(grid) < smallest:
        raise ValueError(
            f"a token grid of {grid[0]}x{grid[1]} has no {num_levels} levels (strides 4 to "
            f"{4 * 2 ** (num_levels - 1)}); both sides of the image must be at least {smallest} "
            "patches long"
        )
