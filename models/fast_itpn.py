"""The layers of Fast-iTPN (fast_itpn/modeling_finetune.py): `HiViT(layers=FAST_LAYERS)`.

Departures from HiViT (arXiv:2211.12735, journal version):
* stages 1 and 2: a LayerNorm inside the MLP (sub-LN), no layer scale;
* merges: LayerNorm of each cell, then a 2x2 convolution with bias;
* stage 3: queries, keys and values from three projections of which the keys' has no bias; SwiGLU
  with sub-LN, as wide as the MLP it replaces (not two thirds of it);
* no norm after the patch embedding and no relative positions.

The surprising fact: the official code lays stages 1 and 2 out as images and convolves, but its 1x1
and 2x2 stride-2 kernels never leave a token. They are computed here as the matrix products they
are, so Fast-iTPN encodes visible tokens alone just as HiViT does. The weights keep the official
shapes (O, I, k, k).
"""

# B batch, N tokens, D embed dim, H heads, K head dim, c cells per token side, d stage channels

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models.hivit import TrunkLayers
from models.layers import PatchEmbed, RelativePositions, attention, layer_scale, scaled


class CellMlp(nn.Module):
    """LN inside: fc1, GELU, `ffn_ln`, fc2, on the channels of every cell."""

    def __init__(self, dim: int, hidden_dim: int, *, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.ffn_ln = nn.LayerNorm(hidden_dim, eps=eps)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        x = F.gelu(F.linear(x, self.fc1.weight.flatten(1), self.fc1.bias))
        return F.linear(self.ffn_ln(x), self.fc2.weight.flatten(1), self.fc2.bias)


class FastMlpBlock(nn.Module):
    """Residual block of stages 1 and 2 (official `ConvMlpBlock`)."""

    def __init__(self, dim: int, mlp_ratio: float, *, eps: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = CellMlp(dim, int(dim * mlp_ratio), eps=eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FastPatchMerge(nn.Module):
    """Four neighbouring cells -> one of twice the channels (official `ConvPatchMerge`)."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, c, c, d) -> (B, N, c/2, c/2, 2d)."""
        B, N, c, _, d = x.shape
        x = self.norm(x).reshape(B, N, c // 2, 2, c // 2, 2, d)
        x = x.permute(0, 1, 2, 4, 6, 3, 5).reshape(B, N, c // 2, c // 2, 4 * d)  # d, row, column
        return F.linear(x, self.reduction.weight.flatten(1), self.reduction.bias)


class FastAttention(nn.Module):
    """Multi-head self-attention with separate projections and no bias on the keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        B, N, D = x.shape
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])  # (3D, D)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, weight, bias).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, N, K)
        x = attention(q, k, v)  # (B, H, N, K)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class SubNormSwiGLU(nn.Module):
    """w3(ffn_ln(SiLU(w1 x) * w2 x)); timm's `SwiGLU` with the official names."""

    def __init__(self, dim: int, hidden_dim: int, *, eps: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(dim, hidden_dim)
        self.ffn_ln = nn.LayerNorm(hidden_dim, eps=eps)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class FastBlock(nn.Module):
    """Pre-norm transformer block of stage 3.

    Args:
        dim: channels D.
        num_heads: attention heads.
        mlp_ratio: width of the SwiGLU over D.
        eps: epsilon of every LayerNorm.
        drop_path: stochastic depth rate.
        init_values: initial layer scale of both branches; None builds none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        eps: float,
        drop_path: float = 0.0,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = FastAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SubNormSwiGLU(dim, int(dim * mlp_ratio), eps=eps)
        self.gamma_1 = layer_scale(dim, init_values)
        self.gamma_2 = layer_scale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, positions: RelativePositions | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); positions must be None."""
        assert positions is None, "Fast-iTPN has no relative positions"
        x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma_1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))


def _patch_embed(patch_size: int, in_chans: int, dim: int, *, eps: float) -> PatchEmbed:
    return PatchEmbed(patch_size, in_chans, dim, eps=None)  # patch_norm=False in every variant


def _mlp_block(
    dim: int, mlp_ratio: float, *, init_values: float | None, **kwargs: Any
) -> nn.Module:
    return FastMlpBlock(dim, mlp_ratio, **kwargs)  # officially init_values=0 here: no layer scale


def _block(
    dim: int, num_heads: int, mlp_ratio: float, *, rel_pos_grid: Any, rel_pos: Any, **kwargs: Any
) -> FastBlock:
    if rel_pos_grid is not None:
        raise ValueError(
            "Fast-iTPN has no relative positions: set rel_pos_bias and decomposed_rel_pos to False "
            "(--model.no-rel-pos-bias)"
        )
    return FastBlock(dim, num_heads, mlp_ratio, **kwargs)


FAST_LAYERS = TrunkLayers(_patch_embed, _mlp_block, FastPatchMerge, _block)
"""What makes a `HiViT` the trunk of Fast-iTPN."""
