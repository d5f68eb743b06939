"""The pre-training decoder: three pyramid levels -> one token map, shared by MIM and MFM.

The surprising fact: a hidden position starts from *three* mask tokens, because the official code
adds the same token to each level before it sums them (models_itpn_mim.py:220-245).
"""

# B batch, N patches, V visible patches, D decoder dim, F fpn_dim

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers import Block, init_linear_and_norm
from models.pos_embed import sincos_pos_embed_2d

LEVELS = ((16, 1), (8, 4), (4, 16))
"""(stride, cells per token) of the pyramid levels, in the order of the official `decoder_embed`."""


class Decoder(nn.Module):
    """Sum of the embedded pyramid levels, mask tokens, sin-cos positions, attention blocks, norm.

    Args:
        fpn_dim: channels of the pyramid levels.
        grid: token grid (h, w).
        dim: width D, a multiple of 16.
        depth: attention blocks.
        num_heads: attention heads.
        norm_eps: epsilon of every LayerNorm.
    """

    def __init__(
        self,
        fpn_dim: int,
        *,
        grid: tuple[int, int],
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % 16:
            raise ValueError(f"decoder dim={dim} must be a multiple of 16 (cells at stride 4)")
        self.dim = dim
        self.grid = grid
        self.embed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(fpn_dim, eps=norm_eps), nn.Linear(fpn_dim, dim // cells))
            for _, cells in LEVELS
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        # A frozen parameter, not a buffer: the official parameter counts include it.
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter.

        Linear      trunc_normal std .02, bias 0
        LayerNorm   1, 0
        mask_token  normal std .02
        pos_embed   2-D sin-cos, frozen
        """
        self.apply(init_linear_and_norm)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_pos_embed_2d(self.dim, self.grid)[None])

    def embed_levels(self, pyramid: dict[int, Tensor], ids_visible: Tensor) -> Tensor:
        """Pyramid levels of the visible tokens -> decoder input without positions, (B, N, D)."""
        B, V = ids_visible.shape
        levels = zip(LEVELS, self.embed, strict=True)
        visible = sum(embed(pyramid[stride]).reshape(B, V, -1) for (stride, _), embed in levels)
        assert isinstance(visible, Tensor)
        num_patches = self.grid[0] * self.grid[1]
        hidden = (len(LEVELS) * self.mask_token).to(visible.dtype).expand(B, num_patches, -1)
        index = ids_visible[:, :, None].expand(-1, -1, self.dim)
        return hidden.scatter(1, index, visible)

    def forward(self, pyramid: dict[int, Tensor], ids_visible: Tensor) -> Tensor:
        """Decode every position of the image.

        Args:
            pyramid: levels of the visible tokens, {4: (B, V, 4, 4, F), 8: ..., 16: ...}.
            ids_visible: (B, V) raster indices of those tokens.

        Returns:
            z (B, N, D).
        """
        x = self.embed_levels(pyramid, ids_visible) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
