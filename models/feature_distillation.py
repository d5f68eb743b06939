"""Feature distillation: the objective of the released CLIP models (itpn_clip/modeling_pretrain.py).

All tokens are encoded, masked ones as a mask token; two heads predict the token map of a frozen
teacher with smooth L1 at *every* position: the main one from the sum of the pyramid levels, the
auxiliary one from stage 3 at three quarters of its depth, through two blocks of its own.

The surprising fact: as released, a masked token is replaced only after stage 2. Its pixels have
reached stages 1 and 2 by then, and the pyramid takes these in through its skip connections: the
main head sees what it is meant to guess. `mask_at="stem"` (**ours**) puts the mask token in place
of the embedded cells, before anything reads them; `docs/experiments.md` compares the two.
"""

# B batch, N patches, D embed dim, F fpn_dim, T teacher channels, c cells per token side

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.decoder import LEVELS
from models.itpn import ITPN, create_itpn
from models.layers import CELLS, Block, RelativePositions, init_linear_and_norm
from models.mim import weighted_mean
from models.pos_embed import relative_position_index
from models.variants import get_variant

MaskAt = Literal["stage3", "stem"]
_NUM_AUXILIARY_BLOCKS = 2
_AUXILIARY_EPS = 1e-5  # torch's default, where the official code forgets to pass its own


class DistillationLosses(NamedTuple):
    """Float32 scalars of one forward."""

    total: Tensor
    """main + auxiliary."""
    main: Tensor
    """Smooth L1 of the pyramid's prediction, over all tokens."""
    auxiliary: Tensor
    """Smooth L1 of the prediction from within stage 3."""


class DistillationPredictions(NamedTuple):
    """What both heads say at every position, (B, N, T)."""

    main: Tensor
    auxiliary: Tensor


class DistillationHeads(nn.Module):
    """Everything of the objective that is not the encoder.

    Args:
        fpn_dim: channels of the pyramid levels.
        dim: channels of stage 3, a multiple of 16.
        num_heads: attention heads of the auxiliary blocks.
        grid: token grid (h, w) of their relative position tables.
        teacher_dim: channels T of the teacher's tokens.
        mask_at: where masked tokens are replaced; "stage3" as released.
        init_values: layer scale of the auxiliary blocks.
        mlp_ratio: MLP ratio of the auxiliary blocks.
        norm_eps: epsilon of the LayerNorms, but 1e-5 in the auxiliary blocks, as released.
    """

    def __init__(
        self,
        fpn_dim: int,
        *,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        teacher_dim: int,
        mask_at: MaskAt = "stage3",
        init_values: float | None = 0.1,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % 16:
            raise ValueError(f"embed_dim={dim} must be a multiple of 16 (cells at stride 4)")
        self.mask_at = mask_at
        width = dim if mask_at == "stage3" else dim // 4 * CELLS**2
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.embed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(fpn_dim, eps=norm_eps), nn.Linear(fpn_dim, dim // cells))
            for _, cells in LEVELS
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.lm_head = nn.Linear(dim, teacher_dim)
        self.cls_pt_layers = nn.ModuleList(
            Block(
                dim,
                num_heads,
                mlp_ratio,
                eps=_AUXILIARY_EPS,
                rel_pos_grid=grid,
                init_values=init_values,
            )
            for _ in range(_NUM_AUXILIARY_BLOCKS)
        )
        self.norm_cls = nn.LayerNorm(dim, eps=norm_eps)
        self.lm_cls_head = nn.Linear(dim, teacher_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter.

        Linear                      trunc_normal std .02, bias 0
        LayerNorm                   1, 0
        mask_token                  trunc_normal std .02
        bias tables                 0
        gamma_1, gamma_2            init_values
        """
        self.apply(init_linear_and_norm)
        trunc_normal_(self.mask_token, std=0.02)

    def main(self, pyramid: dict[int, Tensor]) -> Tensor:
        """Pyramid levels of all tokens -> (B, N, T)."""
        B, N = pyramid[16].shape[:2]
        levels = zip(LEVELS, self.embed, strict=True)
        x = sum(embed(pyramid[stride]).reshape(B, N, -1) for (stride, _), embed in levels)
        return self.lm_head(self.norm(x))


class FeatureDistillationModel(nn.Module):
    """An encoder learning a frozen teacher's tokens.

    Args:
        encoder: backbone and neck, usually with layer scale and `rel_pos_bias=True`.
        clip: the heads. The name is that of the official models; any teacher will do.

    Raises:
        ValueError: the trunk drops or gathers tokens.
    """

    def __init__(self, encoder: ITPN, clip: DistillationHeads) -> None:
        super().__init__()
        backbone = encoder.backbone
        if backbone.token_migration is not None or backbone.token_gathering is not None:
            raise ValueError(
                "feature distillation reads stage 3 from within, at every token: leave token "
                "migration and token gathering out (--model.migrate-after-block -1, "
                "--model.gather-window 0)"
            )
        self.encoder = encoder
        self.clip = clip

    def predict(self, images: Tensor, mask: Tensor) -> DistillationPredictions:
        """Both predictions at every position.

        Args:
            images: (B, C, H, W), normalised.
            mask: (B, N) bool, True = masked; rows may mask different numbers of patches.
        """
        backbone = self.encoder.backbone
        grid = (images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size)
        cells = backbone.patch_embed(images)  # (B, N, 4, 4, D/4)
        if self.clip.mask_at == "stem":
            cells = torch.where(mask[:, :, None, None, None], self._masked_cells(cells), cells)
        stages, x = backbone.forward_cells(cells)
        if self.clip.mask_at == "stage3":
            x = torch.where(mask[:, :, None], self.clip.mask_token.to(x.dtype), x)
        x = backbone.add_positions(x, grid)
        positions = backbone.relative_positions(grid, None, x.device)
        tap = int(0.75 * backbone.depths[2])
        auxiliary = x
        for i, block in enumerate(backbone.attention_blocks):
            x = block(x, positions)
            auxiliary = x if i == tap else auxiliary
        stages[16] = x[:, :, None, None]  # (B, N, 1, 1, D)
        return DistillationPredictions(
            self.clip.main(self.encoder.pyramid(stages)), self._auxiliary(auxiliary, grid)
        )

    def forward(
        self, images: Tensor, mask: Tensor, targets: Tensor, weight: Tensor | None = None
    ) -> DistillationLosses:
        """Losses of a batch.

        Args:
            images: (B, C, H, W), normalised.
            mask: (B, N) bool, True = masked.
            targets: (B, N, T), the teacher's tokens on the same grid, normalised.
            weight: (B,) factors of the images' losses, 0 leaves an image out; None for ones.
        """
        predictions = self.predict(images, mask)
        main, auxiliary = (
            weighted_mean(F.smooth_l1_loss, p.float(), targets.float(), weight) for p in predictions
        )
        return DistillationLosses(main + auxiliary, main, auxiliary)

    def _masked_cells(self, cells: Tensor) -> Tensor:
        return self.clip.mask_token.to(cells.dtype).reshape(1, 1, *cells.shape[2:])

    def _auxiliary(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        # The tables of these blocks exist whether or not the trunk has any.
        positions = RelativePositions(relative_position_index(grid, x.device), grid)
        for block in self.clip.cls_pt_layers:
            x = block(x, positions)
        return self.clip.lm_cls_head(self.clip.norm_cls(x))


def create_feature_distillation_model(
    name: str,
    *,
    teacher_dim: int,
    img_size: int | None = None,
    mask_at: MaskAt = "stage3",
    **encoder_kwargs: Any,
) -> FeatureDistillationModel:
    """Build a named model for distillation with fresh weights.

    Args:
        name: a key of `models.variants.VARIANTS`; the official objective has the `clip` ones.
        teacher_dim: channels of the teacher's tokens (512 of CLIP-B, 768 of CLIP-L).
        img_size: image side in pixels; None for the variant's own.
        mask_at: where masked tokens are replaced; "stage3" as released, "stem" without the leak.
        **encoder_kwargs: passed to `create_itpn`, such as drop_path_rate (official: 0.1 base, 0.2
            large).

    Raises:
        ValueError: unknown name, or an image size that is not a multiple of 16.
    """
    variant = get_variant(name)
    encoder = create_itpn(name, img_size=img_size or variant.img_size, **encoder_kwargs)
    heads = DistillationHeads(
        encoder.pyramid.fpn_dim,
        dim=variant.embed_dim,
        num_heads=variant.num_heads,
        grid=encoder.backbone.grid,
        teacher_dim=teacher_dim,
        mask_at=mask_at,
        init_values=variant.init_values,
    )
    return FeatureDistillationModel(encoder, heads)
