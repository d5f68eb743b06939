"""The layers of HiViT and of the pyramid: attention, blocks, patch embed / merge / split.

The surprising fact: nothing here mixes tokens except `Attention`. Stages 1 and 2 and the whole
pyramid work inside one 16x16-pixel token on its own cells, which is why masked tokens can be
dropped before the very first layer.
"""

# B batch, N tokens (visible or all), D embed dim, H heads, K head dim, c cells per token side,
# C image channels, p cell side in pixels

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, resize_rel_pos_bias_table_simple, trunc_normal_
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import Tensor, nn

from models.tokens import check_image_size, gather_tokens

CELLS = 4  # cells per token side at stride 4; merges halve it twice
MOST_PLAIN = 512
"""Tokens up to which attention is computed plainly on CPUs."""


RelPos = Literal["bias", "decomposed"]
"""Kinds of learned relative positions: a table with a number for each offset and head (Swin), or
vectors by row and by column offset, added as products with the query (ViTDet)."""


class RelativePositions(NamedTuple):
    """Where the tokens of a batch stand to each other."""

    pair_index: Tensor
    """(N, N) for all tokens, or (B, N, N) for the visible ones of each image."""
    grid: tuple[int, int]
    """Token grid (h, w) the index refers to."""


class Attention(nn.Module):
    """Multi-head self-attention with optional learned relative positions.

    The tables belong to `rel_pos_grid`; for another grid they are resized on the fly: bicubically
    in two dimensions ("bias"; the official code raises there), linearly in one ("decomposed",
    det/mmdet/models/backbones/iTPN_CLIP.py).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rel_pos_grid: tuple[int, int] | None = None,
        rel_pos: RelPos = "bias",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table: nn.Parameter | None = None
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if rel_pos_grid is None:
            return
        rows, columns = (2 * side - 1 for side in rel_pos_grid)
        if rel_pos == "bias":
            table = torch.zeros(rows * columns, num_heads)
            self.relative_position_bias_table = nn.Parameter(table)
        else:
            self.rel_pos_h = nn.Parameter(torch.zeros(rows, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(columns, dim // num_heads))

    def forward(self, x: Tensor, positions: RelativePositions | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, N, K)
        bias = None if positions is None else self.position_bias(positions, q).to(q.dtype)
        x = attention(q, k, v, bias)  # (B, H, N, K)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))

    def position_bias(self, positions: RelativePositions, q: Tensor | None = None) -> Tensor:
        """Bias added to the scaled scores; decomposed positions need the queries (B, H, N, K).

        Returns:
            (H, N, N), the same for all images; (B, H, N, N) for a per-image index or for decomposed
            positions.
        """
        if self.rel_pos_h is not None:
            assert self.rel_pos_w is not None and q is not None, "decomposed positions need queries"
            bias = get_decomposed_rel_pos_bias(
                q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, positions.grid, positions.grid
            )
            return bias.unflatten(0, q.shape[:2])
        table = self.relative_position_bias_table
        assert table is not None, "positions were passed to an attention without a bias table"
        h, w = positions.grid
        shape = ((2 * h - 1) * (2 * w - 1), self.num_heads)
        table = resize_rel_pos_bias_table_simple(table, (h, w), shape)
        return table[positions.pair_index].movedim(-1, -3)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Build the bias table for another grid, interpolating the one there is, if any."""
        if self.relative_position_bias_table is None:
            return
        old = self.relative_position_bias_table
        shape = ((2 * grid[0] - 1) * (2 * grid[1] - 1), self.num_heads)
        table = resize_rel_pos_bias_table_simple(old.detach().float(), grid, shape).to(old)
        table = table.clone(memory_format=torch.contiguous_format)
        self.relative_position_bias_table = nn.Parameter(table, old.requires_grad)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: q (B, H, N, K), k and v (B, H, M, K) -> (B, H, N, K).

    `mask` broadcasts to (B, H, N, M): floats are added to the scores, of booleans True is seen, as
    in `F.scaled_dot_product_attention`. That is used but for short sequences on CPUs, where the
    plain computation is faster, and has the memory (benchmarks/bench_parts.py); in bfloat16 of any
    length. Exported graphs, which may run anywhere, keep it.
    """
    is_short = q.dtype == torch.bfloat16 or max(q.shape[-2], k.shape[-2]) <= MOST_PLAIN
    if q.device.type != "cpu" or torch.compiler.is_exporting() or not is_short:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    B, H, N, K = q.shape
    q, k, v = (t.reshape(B * H, -1, K) for t in (q, k, v))
    scores = torch.bmm(q * K**-0.5, k.transpose(1, 2)).view(B, H, N, -1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).to(v.dtype).flatten(0, 1)  # (B * H, N, M)
    return torch.bmm(weights, v).view(B, H, N, K)


class MlpBlock(nn.Module):
    """Residual MLP without attention: stages 1-2 and the pyramid.

    Args:
        dim: channels.
        mlp_ratio: hidden over outer width.
        eps: epsilon of the LayerNorm.
        drop_path: stochastic depth rate.
        init_values: initial layer scale `gamma_2`; None builds none (the pixel models).
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        *,
        eps: float,
        drop_path: float = 0.0,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_2 = layer_scale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))


class Block(nn.Module):
    """Pre-norm transformer block: stage 3 and the decoder.

    `init_values` is the initial layer scale of both branches (`gamma_1`, `gamma_2`, as the official
    CLIP models); None builds none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        eps: float,
        drop_path: float = 0.0,
        rel_pos_grid: tuple[int, int] | None = None,
        rel_pos: RelPos = "bias",
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, rel_pos_grid=rel_pos_grid, rel_pos=rel_pos)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = layer_scale(dim, init_values)
        self.gamma_2 = layer_scale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, positions: RelativePositions | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(scaled(self.attn(self.norm1(x), positions), self.gamma_1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))


class PatchEmbed(nn.Module):
    """Pixels of each token -> 4x4 cells of `dim` channels.

    Visible tokens are picked *before* the projection, so hidden pixels are never touched. `proj` is
    the official strided convolution, computed as the matrix product it is.

    Args:
        patch_size: token side in pixels, a multiple of 4.
        in_chans: image channels C.
        dim: channels of a cell.
        eps: epsilon of the LayerNorm; None for no norm (Fast-iTPN).
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, eps: float | None) -> None:
        super().__init__()
        if patch_size % CELLS:
            raise ValueError(f"patch_size={patch_size} must be a multiple of {CELLS}")
        self.patch_size = patch_size
        cell = patch_size // CELLS
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=cell, stride=cell)
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(dim, eps=eps)

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """images (B, C, H, W), ids (B, V) or None for all -> (B, V, 4, 4, dim)."""
        B, C, H, W = images.shape
        check_image_size(H, W, self.patch_size)
        h, w, p = H // self.patch_size, W // self.patch_size, self.patch_size // CELLS
        x = images.reshape(B, C, h, CELLS, p, w, CELLS, p)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, h, w, 4, 4, C, p, p)
        x = x.reshape(B, h * w, CELLS * CELLS * C * p * p)
        if ids is not None:
            x = gather_tokens(x, ids)
        x = x.reshape(B, -1, CELLS, CELLS, C * p * p)  # (B, V, 4, 4, C*p*p)
        x = F.linear(x, self.proj.weight.flatten(1), self.proj.bias)
        return self.norm(x)


class PatchMerge(nn.Module):
    """Four neighbouring cells -> one of twice the channels."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, c, c, d) -> (B, N, c/2, c/2, 2d)."""
        B, N, c, _, d = x.shape
        x = x.reshape(B, N, c // 2, 2, c // 2, 2, d)
        # column before row: the official concatenation order is (r0c0, r1c0, r0c1, r1c1)
        x = x.permute(0, 1, 2, 4, 5, 3, 6).reshape(B, N, c // 2, c // 2, 4 * d)
        return self.reduction(self.norm(x))


class PatchSplit(nn.Module):
    """One cell -> four of `fpn_dim` channels: the inverse direction, used by the pyramid."""

    def __init__(self, dim: int, fpn_dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.reduction = nn.Linear(dim, 4 * fpn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, c, c, d) -> (B, N, 2c, 2c, fpn_dim)."""
        B, N, c, _, _ = x.shape
        x = self.reduction(self.norm(x)).reshape(B, N, c, c, 2, 2, -1)
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(B, N, 2 * c, 2 * c, -1)


def layer_scale(dim: int, init_values: float | None) -> nn.Parameter | None:
    """A learned factor per channel, (dim,), constant at first; None when init_values is None."""
    return None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))


def scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    """The residual branch times its layer scale, where there is one."""
    return branch if gamma is None else gamma * branch


def init_linear_and_norm(module: nn.Module) -> None:
    """Linear: trunc_normal std .02, bias 0. LayerNorm: 1 and 0. Convolutions keep torch's default.

    For `module.apply`; the shared part of every `init_weights` table.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
