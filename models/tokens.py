"""Tokens: which patches are visible, gathering them, and images as rows of patches.

The surprising fact: a token is addressed by its raster index everywhere, and visible tokens are
kept in raster order. (The official code keeps them in the order of the random noise; attention
does not care, and raster order makes the result a function of the mask alone.)
"""

# B batch, N patches, V visible patches, M masked patches, C image channels, P patch side

from __future__ import annotations

import torch
from torch import Tensor


def split_tokens(mask: Tensor, num_visible: int | None = None) -> tuple[Tensor, Tensor]:
    """Split token indices into visible and masked ones, each in raster order.

    Args:
        mask: (B, N) bool, True = masked; every row masks the same number of patches.
        num_visible: visible patches per row. None counts them in the mask, which costs a host
            synchronisation on CUDA; pass the number there.

    Returns:
        ids_visible (B, V) and ids_masked (B, M), int64.

    Raises:
        ValueError: the rows mask different numbers of patches (only checked when counting).
    """
    if num_visible is None:
        counts = (~mask).sum(dim=1)
        num_visible = int(counts[0])
        if bool((counts != num_visible).any()):
            raise ValueError(
                f"mask rows keep different numbers of patches ({counts.tolist()}); every image of "
                "a batch must keep the same number: draw masks with an exact count"
            )
    ids = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)  # (B, N), visible first
    return ids[:, :num_visible], ids[:, num_visible:]


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens: x (B, N, ...) and ids (B, K) -> (B, K, ...)."""
    index = ids.reshape(*ids.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images (B, C, H, W) -> (B, N, P*P*C), each patch flattened row, column, channel.

    Raises:
        ValueError: the image size is not a multiple of the patch size.
    """
    B, C, H, W = images.shape
    check_image_size(H, W, patch_size)
    x = images.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, h, w, P, P, C)
    return x.reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify`: (B, N, P*P*C) -> (B, C, H, W)."""
    B = patches.shape[0]
    h, w = grid
    x = patches.reshape(B, h, w, patch_size, patch_size, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, P, w, P)
    return x.reshape(B, -1, h * patch_size, w * patch_size)


def check_image_size(height: int, width: int, patch_size: int) -> None:
    """Raise ValueError unless both sides are multiples of the patch size."""
    if height % patch_size or width % patch_size or not (height and width):
        raise ValueError(
            f"image size {height}x{width} is not a multiple of the patch size {patch_size}; "
            f"use {_nearest(height, patch_size)}x{_nearest(width, patch_size)}"
        )


def _nearest(size: int, step: int) -> int:
    return max(step, round(size / step) * step)
