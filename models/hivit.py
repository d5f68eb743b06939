"""HiViT: the hierarchical backbone of iTPN.

Departures from a plain ViT (arXiv:2205.14949; arXiv:2211.12735 section 3):
* a token of 16x16 pixels starts as 4x4 cells of embed_dim/4 channels; two merges bring it to 1x1;
* stages 1 and 2 are per-token MLP blocks, only stage 3 has attention;
* three stage features come out, at strides 4, 8 and 16, each tapped just before the next merge;
* because stages 1-2 never mix tokens, a masked image is encoded from its visible tokens alone,
  from the first layer on.

Surprising: there is no final norm. The pixel models normalise in the head or in the decoder.
"""

# B batch, N patches, V tokens encoded (N or the visible ones), D embed dim

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.layers import (
    Block,
    MlpBlock,
    PatchEmbed,
    PatchMerge,
    RelativePositions,
    init_linear_and_norm,
)
from models.pos_embed import relative_position_index, resize_pos_embed, sincos_pos_embed_2d
from models.tokens import gather_tokens

STRIDES = (4, 8, 16)
"""Strides of the three stages in pixels for patch 16; used as keys of the stage features."""


class HiViT(nn.Module):
    """Hierarchical vision transformer on all or on the visible tokens.

    Args:
        embed_dim: channels of stage 3; stages 1 and 2 have a quarter and a half of it.
        depths: blocks of stages 1, 2 (MLP) and 3 (attention); merges are not counted.
        num_heads: attention heads of stage 3.
        img_size: side in pixels the position tables are built for; other sizes are interpolated.
        pos_embed_size: side in pixels the absolute table is built for, None for img_size. The
            official detection and segmentation models keep the 224-pixel table of pre-training and
            interpolate it in every forward; their relative tables are those of img_size.
        patch_size: token side in pixels, a multiple of 4.
        in_chans: image channels.
        bridge_mlp_ratio: MLP ratio of stages 1 and 2.
        mlp_ratio: MLP ratio of stage 3.
        rel_pos_bias: learned relative position bias in stage 3 (off in pixel pre-training).
        drop_path_rate: stochastic depth, linear from 0 at the first block to this at the last.
        init_values: initial layer scale of the blocks (0.1 in the official CLIP models), None for
            none (pixel).
        norm_eps: epsilon of every LayerNorm.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        depths: tuple[int, int, int],
        num_heads: int,
        img_size: int = 224,
        pos_embed_size: int | None = None,
        patch_size: int = 16,
        in_chans: int = 3,
        bridge_mlp_ratio: float = 3.0,
        mlp_ratio: float = 4.0,
        rel_pos_bias: bool = False,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        pos_embed_size = pos_embed_size or img_size
        if embed_dim % 4 or img_size % patch_size or pos_embed_size % patch_size:
            raise ValueError(
                f"embed_dim={embed_dim} must be a multiple of 4 and img_size={img_size} a multiple "
                f"of patch_size={patch_size}, and so must pos_embed_size={pos_embed_size}"
            )
        self.embed_dim = embed_dim
        self.depths = depths
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.img_size = img_size
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.pos_embed_grid = (pos_embed_size // patch_size, pos_embed_size // patch_size)
        self.rel_pos_bias = rel_pos_bias
        self.stage_dims = {4: embed_dim // 4, 8: embed_dim // 2, 16: embed_dim}

        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        drops = [rates[a:b] for a, b in pairwise((0, depths[0], sum(depths[:2]), sum(depths)))]
        rel_pos_grid = self.grid if rel_pos_bias else None

        def mlp_stage(stride: int, drop_paths: list[float]) -> list[MlpBlock]:
            dim = self.stage_dims[stride]
            return [
                MlpBlock(
                    dim, bridge_mlp_ratio, eps=norm_eps, drop_path=rate, init_values=init_values
                )
                for rate in drop_paths
            ]

        self.patch_embed = PatchEmbed(patch_size, in_chans, self.stage_dims[4], eps=norm_eps)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.pos_embed_grid[0] ** 2, embed_dim))
        # One list with the merges in it, as the official checkpoints number it.
        self.blocks = nn.ModuleList(
            [
                *mlp_stage(4, drops[0]),
                PatchMerge(self.stage_dims[4], eps=norm_eps),
                *mlp_stage(8, drops[1]),
                PatchMerge(self.stage_dims[8], eps=norm_eps),
                *(
                    Block(
                        embed_dim,
                        num_heads,
                        mlp_ratio,
                        eps=norm_eps,
                        drop_path=rate,
                        rel_pos_grid=rel_pos_grid,
                        init_values=init_values,
                    )
                    for rate in drops[2]
                ),
            ]
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter.

        Linear            trunc_normal std .02, bias 0
        LayerNorm         1, 0
        patch_embed.proj  torch default
        pos_embed         2-D sin-cos, trainable (official pixel code, models_itpn_mim.py:183)
        bias tables       0
        gamma_1, gamma_2  init_values
        """
        self.apply(init_linear_and_norm)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_pos_embed_2d(self.embed_dim, self.pos_embed_grid)[None])
        for block in self.blocks:
            if isinstance(block, Block) and block.attn.relative_position_bias_table is not None:
                nn.init.zeros_(block.attn.relative_position_bias_table)

    def forward(self, images: Tensor, ids: Tensor | None = None) -> dict[int, Tensor]:
        """Stage features of all tokens or of the given ones.

        Args:
            images: (B, C, H, W), normalised.
            ids: (B, V) raster indices of the tokens to encode, or None for all.

        Returns:
            {4: (B, V, 4, 4, D/4), 8: (B, V, 2, 2, D/2), 16: (B, V, 1, 1, D)}.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        merge1 = self.depths[0]
        merge2 = merge1 + 1 + self.depths[1]
        features: dict[int, Tensor] = {}

        x = self.patch_embed(images, ids)  # (B, V, 4, 4, D/4)
        for block in self.blocks[:merge1]:
            x = block(x)
        features[4] = x
        for block in self.blocks[merge1:merge2]:  # the first of them is the merge
            x = block(x)
        features[8] = x  # (B, V, 2, 2, D/2)
        x = self.blocks[merge2](x).flatten(2)  # (B, V, D): one cell is left

        # The official forward compares the number of *encoded* tokens with the table's, so a masked
        # image always resamples the table, also at its native size. Pinned by the golden files a1,
        # a2.
        is_masked = ids is not None
        pos_embed = resize_pos_embed(self.pos_embed, grid, "scale_factor", even_if_equal=is_masked)
        if ids is not None:
            pos_embed = gather_tokens(pos_embed.expand(x.shape[0], -1, -1), ids)
        x = x + pos_embed
        positions = self.relative_positions(grid, ids, x.device)
        for block in self.blocks[merge2 + 1 :]:
            x = block(x, positions)
        features[16] = x[:, :, None, None]  # (B, V, 1, 1, D)
        return features

    def group_matcher(self, coarse: bool = False, *, prefix: str = "") -> dict[str, Any]:
        """Layers for layer-wise learning rates, in timm's form (`timm.models.group_parameters`).

        The stem and the position table are layer 0, every block is a layer of its own, and a merge
        belongs to the block before it (itpn_pixel/util/lr_decay.py:16). What matches nothing, the
        necks and heads of the models around, is the last layer.

        Args:
            coarse: three layers of blocks, one per stage, instead of one per block.
            prefix: regular expression of the path to this module, such as `r"backbone\."`.
        """
        merge1 = self.depths[0]
        merge2 = merge1 + 1 + self.depths[1]
        stem = rf"^{prefix}(?:pos_embed|patch_embed)"
        blocks = rf"^{prefix}blocks\."
        if coarse:
            starts = (0, merge1 + 1, merge2 + 1, len(self.blocks))
            stages = [(i, range(a, b)) for i, (a, b) in enumerate(pairwise(starts))]
            names = [(rf"{blocks}(?:{'|'.join(map(str, r))})\.", (i,)) for i, r in stages]
            return {"stem": stem, "blocks": names}
        merges = [(rf"{blocks}{m}\.", (m - 1,)) for m in (merge1, merge2)]
        return {"stem": stem, "blocks": [*merges, (rf"{blocks}(\d+)\.", None)]}

    def no_weight_decay(self) -> set[str]:
        """Names that official fine-tuning leaves undecayed besides biases and 1-D tensors."""
        tables = ("pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    def relative_positions(
        self, grid: tuple[int, int], ids: Tensor | None, device: torch.device
    ) -> RelativePositions | None:
        """The relative position index of the encoded tokens; None without relative bias."""
        if not self.rel_pos_bias:
            return None
        index = relative_position_index(grid, device)  # (N, N)
        if ids is not None:
            index = index[ids[:, :, None], ids[:, None, :]]  # (B, V, V)
        return RelativePositions(index, grid)
