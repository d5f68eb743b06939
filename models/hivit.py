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

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from models.layers import (
    Attention,
    Block,
    MlpBlock,
    PatchEmbed,
    PatchMerge,
    RelativePositions,
    init_linear_and_norm,
)
from models.pos_embed import relative_position_index, resize_pos_embed, sincos_pos_embed_2d
from models.token_reduction import TokenGathering, TokenMigration, check_options, laid_out
from models.tokens import gather_tokens

STRIDES = (4, 8, 16)
"""Strides of the three stages in pixels for patch 16; used as keys of the stage features."""


class TrunkLayers(NamedTuple):
    """What a trunk is made of: constructors with the signatures of `models.layers`."""

    patch_embed: Callable[..., nn.Module] = PatchEmbed
    mlp_block: Callable[..., nn.Module] = MlpBlock
    patch_merge: Callable[..., nn.Module] = PatchMerge
    block: Callable[..., nn.Module] = Block


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
        decomposed_rel_pos: ViTDet's decomposed relative positions in stage 3 instead of the bias
            (the official CLIP-L detector), for dense images only.
        drop_path_rate: stochastic depth, linear from 0 at the first block to this at the last.
        init_values: initial layer scale of the blocks (0.1 in the official CLIP models), None for
            none (pixel).
        norm_eps: epsilon of every LayerNorm.
        layers: what the trunk is made of; `models.fast_itpn.FAST_LAYERS` makes it Fast-iTPN.
        token_migration: redundant tokens skip the last blocks: `models.token_reduction`, ours.
        token_gathering: windows in stage 3 (likewise ours), without relative positions only.

    Raises:
        ValueError: sizes that do not divide, or options that exclude each other.
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
        decomposed_rel_pos: bool = False,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
        layers: TrunkLayers = TrunkLayers(),  # noqa: B008 (immutable)
        token_migration: TokenMigration | None = None,
        token_gathering: TokenGathering | None = None,
    ) -> None:
        super().__init__()
        pos_embed_size = pos_embed_size or img_size
        if embed_dim % 4 or img_size % patch_size or pos_embed_size % patch_size:
            raise ValueError(
                f"embed_dim={embed_dim} must be a multiple of 4 and img_size={img_size} a multiple "
                f"of patch_size={patch_size}, and so must pos_embed_size={pos_embed_size}"
            )
        if rel_pos_bias and decomposed_rel_pos:
            raise ValueError(
                "rel_pos_bias and decomposed_rel_pos are two kinds of relative positions; "
                "switch one of them off"
            )
        check_options(token_migration, token_gathering, depths[2], rel_pos_bias, decomposed_rel_pos)
        self.embed_dim = embed_dim
        self.depths = depths
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.img_size = img_size
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.pos_embed_grid = (pos_embed_size // patch_size, pos_embed_size // patch_size)
        self.rel_pos_bias = rel_pos_bias
        self.decomposed_rel_pos = decomposed_rel_pos
        self.is_fast = layers.patch_merge is not PatchMerge
        self.token_migration = token_migration
        self.token_gathering = token_gathering
        self.grad_checkpointing = False
        self.last_stride = STRIDES[-1]  # of a finer stage once the later ones are pruned
        self.stage_dims = {4: embed_dim // 4, 8: embed_dim // 2, 16: embed_dim}

        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        drops = [rates[a:b] for a, b in pairwise((0, depths[0], sum(depths[:2]), sum(depths)))]

        def mlp_stage(stride: int, drop_paths: list[float]) -> list[nn.Module]:
            dim = self.stage_dims[stride]
            return [
                layers.mlp_block(
                    dim, bridge_mlp_ratio, eps=norm_eps, drop_path=rate, init_values=init_values
                )
                for rate in drop_paths
            ]

        self.patch_embed = layers.patch_embed(
            patch_size, in_chans, self.stage_dims[4], eps=norm_eps
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.pos_embed_grid[0] ** 2, embed_dim))
        self.gathering_tokens = token_gathering.new_tokens(embed_dim) if token_gathering else None
        # One list with the merges in it, as the official checkpoints number it.
        self.blocks = nn.ModuleList(
            [
                *mlp_stage(4, drops[0]),
                layers.patch_merge(self.stage_dims[4], eps=norm_eps),
                *mlp_stage(8, drops[1]),
                layers.patch_merge(self.stage_dims[8], eps=norm_eps),
                *(
                    layers.block(
                        embed_dim,
                        num_heads,
                        mlp_ratio,
                        eps=norm_eps,
                        drop_path=rate,
                        rel_pos_grid=self.grid if rel_pos_bias or decomposed_rel_pos else None,
                        rel_pos="decomposed" if decomposed_rel_pos else "bias",
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
        pos_embed         2-D sin-cos, trainable (official pixel code, models_itpn_mim.py:183; the
                          CLIP and Fast code has trunc_normal std .02 instead)
        relative tables   0
        gathering_tokens  trunc_normal std .02 (ours)
        gamma_1, gamma_2  init_values
        """
        self.apply(init_linear_and_norm)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_pos_embed_2d(self.embed_dim, self.pos_embed_grid)[None])
            for module in self.modules():
                if isinstance(module, Attention):
                    for table in module.parameters(recurse=False):
                        table.zero_()
        if self.gathering_tokens is not None:
            trunc_normal_(self.gathering_tokens, std=0.02)

    def forward(
        self, images: Tensor, ids: Tensor | None = None, *, last_stride: int = STRIDES[-1]
    ) -> dict[int, Tensor]:
        """Stage features of all tokens or of the given ones.

        Args:
            images: (B, C, H, W), normalised.
            ids: (B, V) raster indices of the tokens to encode, or None for all.
            last_stride: stride of the last stage to compute.

        Returns:
            {4: (B, V, 4, 4, D/4), 8: (B, V, 2, 2, D/2), 16: (B, V, 1, 1, D)}, or as many of them as
            asked for and not pruned.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        grid = self.token_grid(images)
        cells = self.patch_embed(images, ids)
        last_stride = min(last_stride, self.last_stride)
        if last_stride < STRIDES[-1]:
            return self._cell_stages(cells, last_stride)
        features, x = self.forward_cells(cells)
        x = self.forward_attention(self.add_positions(x, grid, ids), grid, ids)
        features[16] = x[:, :, None, None]  # (B, V, 1, 1, D)
        return features

    def forward_attention(self, x: Tensor, grid: tuple[int, int], ids: Tensor | None) -> Tensor:
        """Stage 3: tokens (B, V, D) with their positions -> (B, V, D)."""
        num_tokens, depth = x.shape[1], self.depths[2]
        if self.gathering_tokens is not None:  # they follow the tokens of the image
            x = torch.cat([x, self.gathering_tokens.expand(x.shape[0], -1, -1)], dim=1)
        migration = self.token_migration
        first = depth if migration is None else migration.blocks_before(depth)
        x = self._attend(x, slice(first), grid, ids)
        if migration is not None and first < depth:
            kept, kept_ids = migration.kept(x, num_tokens, ids)
            y = self._attend(gather_tokens(x, kept), slice(first, depth), grid, kept_ids)
            x = laid_out(x, kept, y)
        return x[:, :num_tokens]

    def _attend(self, x: Tensor, which: slice, grid: tuple[int, int], ids: Tensor | None) -> Tensor:
        """Tokens (B, L, D) after some blocks of stage 3; ids are those of the image's tokens."""
        positions = self.relative_positions(grid, ids, x.device)
        blocks: list[Callable[..., Tensor]] = list(self.attention_blocks)
        if self.token_gathering is not None:
            blocks = self.token_gathering.windowed(blocks, grid, ids)
        for block in blocks[which]:
            x = self._run(block, x, positions)
        return x

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        """Tokens of images (B, C, H, W) in height and width."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the stages there are, fewer once the later ones are pruned."""
        return STRIDES[: STRIDES.index(self.last_stride) + 1]

    @property
    def merges(self) -> tuple[int, int]:
        """Places of the two merges in `blocks`; each is the first of the stage it opens."""
        return self.depths[0], sum(self.depths[:2]) + 1

    @property
    def attention_blocks(self) -> nn.ModuleList:
        """The blocks of stage 3."""
        return self.blocks[self.merges[1] + 1 :]

    def forward_cells(self, x: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Stages 1 and 2, which work inside a token.

        Args:
            x: (B, V, 4, 4, D/4), embedded cells.

        Returns:
            features {4: (B, V, 4, 4, D/4), 8: (B, V, 2, 2, D/2)}, tokens (B, V, D) of stage 3,
            still without positions.
        """
        features = self._cell_stages(x, last_stride=8)
        return features, self.blocks[self.merges[1]](features[8]).flatten(2)  # one cell is left

    def _cell_stages(self, x: Tensor, last_stride: int) -> dict[int, Tensor]:
        merge1, merge2 = self.merges
        features: dict[int, Tensor] = {}
        for block in self.blocks[:merge1]:
            x = self._run(block, x)
        features[4] = x
        if last_stride == 4:
            return features
        for block in self.blocks[merge1:merge2]:
            x = self._run(block, x)
        features[8] = x
        return features

    def add_positions(self, x: Tensor, grid: tuple[int, int], ids: Tensor | None = None) -> Tensor:
        """Tokens (B, V, D) plus their rows of the absolute table, resized to the grid."""
        # The official forward compares the number of *encoded* tokens with the table's, so a masked
        # image always resamples the table, also at its native size. Pinned by the golden files a1,
        # a2.
        is_masked = ids is not None
        pos_embed = resize_pos_embed(self.pos_embed, grid, "scale_factor", even_if_equal=is_masked)
        if ids is not None:
            pos_embed = gather_tokens(pos_embed.expand(x.shape[0], -1, -1), ids)
        return x + pos_embed

    def _run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """A block, its activations computed again in the backward pass where that is asked for."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs)
        return block(*inputs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep only the inputs of the blocks for the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False, *, prefix: str = "") -> dict[str, Any]:
        """Layers for layer-wise learning rates, in timm's form (`timm.models.group_parameters`).

        The stem and the position table are layer 0, every block is a layer of its own, and a merge
        belongs to the block before it (itpn_pixel/util/lr_decay.py:16); in Fast-iTPN it is a layer
        of its own (fast_itpn/optim_factory.py). What matches nothing, the necks and heads of the
        models around, is the last layer.

        Args:
            coarse: three layers of blocks, one per stage, instead of one per block.
            prefix: regular expression of the path to this module, such as `r"backbone\."`.
        """
        merge1, merge2 = self.merges
        stem = rf"^{prefix}(?:pos_embed|patch_embed)"
        blocks = rf"^{prefix}blocks\."
        if coarse:
            starts = (0, merge1 + 1, merge2 + 1, len(self.blocks))
            stages = [(i, range(a, b)) for i, (a, b) in enumerate(pairwise(starts))]
            names = [(rf"{blocks}(?:{'|'.join(map(str, r))})\.", (i,)) for i, r in stages]
            return {"stem": stem, "blocks": names}
        shared = () if self.is_fast else (merge1, merge2)
        merges = [(rf"{blocks}{m}\.", (m - 1,)) for m in shared]
        return {"stem": stem, "blocks": [*merges, (rf"{blocks}(\d+)\.", None)]}

    def no_weight_decay(self) -> set[str]:
        """Names that official fine-tuning leaves undecayed besides biases and 1-D tensors."""
        tables = ("pos_embed", "relative_position_bias_table", "rel_pos_h", "rel_pos_w")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    def prune_stages(self, last_stride: int) -> None:
        """Drop, for good, the stages after the one of this stride, and the positions with them."""
        if last_stride == STRIDES[-1]:
            return
        self.blocks = self.blocks[: self.merges[STRIDES.index(last_stride)]]
        self.last_stride = last_stride
        if "pos_embed" in self._parameters:  # stage 3 alone reads it
            del self.pos_embed
            self.gathering_tokens = None

    def set_input_size(self, img_size: int) -> None:
        """Build the position tables for another image side, interpolated as when weights are read.

        Images of any size are taken without it: then the tables are interpolated in every forward.
        The tables are new parameters: build the optimizer afterwards.

        Args:
            img_size: side in pixels.

        Raises:
            ValueError: not a multiple of the patch size, stage 3 is pruned, or the relative
                positions are decomposed ones.
        """
        if img_size < self.patch_size or img_size % self.patch_size:
            raise ValueError(
                f"img_size={img_size} must be a multiple of patch_size={self.patch_size}"
            )
        if self.decomposed_rel_pos or self.last_stride < STRIDES[-1]:
            raise ValueError(
                f"img_size={img_size} can not be set with decomposed_rel_pos or without stage 3; "
                "pass images of that size as they are"
            )
        grid = (img_size // self.patch_size, img_size // self.patch_size)
        self.img_size, self.grid, self.pos_embed_grid = img_size, grid, grid
        with torch.no_grad():
            old = self.pos_embed
            table = resize_pos_embed(old.float(), grid, "size").to(old)
            # contiguous: safetensors writes nothing else
            table = table.clone(memory_format=torch.contiguous_format)
            self.pos_embed = nn.Parameter(table, old.requires_grad)
            for module in self.modules():
                if isinstance(module, Attention):
                    module.set_grid(grid)

    def relative_positions(
        self, grid: tuple[int, int], ids: Tensor | None, device: torch.device
    ) -> RelativePositions | None:
        """The relative position index of the encoded tokens; None without relative positions.

        Raises:
            ValueError: some tokens of a model with decomposed positions, which need whole rows.
        """
        if not (self.rel_pos_bias or self.decomposed_rel_pos):
            return None
        if self.decomposed_rel_pos and ids is not None:
            raise ValueError("decomposed relative positions need all tokens of an image, not some")
        index = relative_position_index(grid, device)  # (N, N)
        if ids is not None:
            index = index[ids[:, :, None], ids[:, None, :]]  # (B, V, V)
        return RelativePositions(index, grid)
