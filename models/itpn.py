"""ITPN: the backbone with its neck.

This is what pre-training trains, what `encoder.safetensors` holds and what every downstream model
takes. Read it first: `HiViT` makes the stage features, `FeaturePyramid` the levels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from models.fast_itpn import FAST_LAYERS, FastBlock, FastMlpBlock, FastPatchMerge
from models.hivit import HiViT, TrunkLayers
from models.layers import Block, MlpBlock, PatchMerge, PatchSplit
from models.pyramid import FeaturePyramid
from models.token_reduction import TokenGathering, TokenMigration
from models.variants import get_variant

REPEATED = (Block, MlpBlock, PatchMerge, PatchSplit, FastBlock, FastMlpBlock, FastPatchMerge)
"""What encoders and decoders are stacked from: units to compile, or to hold in shares."""


class ITPNFeatures(NamedTuple):
    """What the encoder yields, keyed by stride; V tokens, D embed dim, F fpn_dim."""

    stages: dict[int, Tensor]
    """Backbone: {4: (B, V, 4, 4, D/4), 8: (B, V, 2, 2, D/2), 16: (B, V, 1, 1, D)}."""
    pyramid: dict[int, Tensor]
    """Neck: {4: (B, V, 4, 4, F), 8: (B, V, 2, 2, F), 16: (B, V, 1, 1, F)}."""


class ITPN(nn.Module):
    """Integrally pre-trained pyramid network: HiViT backbone + feature pyramid."""

    def __init__(self, backbone: HiViT, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid

    def forward(self, images: Tensor, ids: Tensor | None = None) -> ITPNFeatures:
        """images (B, C, H, W), ids (B, V) of the tokens to encode or None for all."""
        stages = self.backbone(images, ids)
        return ITPNFeatures(stages, self.pyramid(stages))


def create_itpn(
    name: str, *, fpn_dim: int = 0, fpn_depth: int | None = None, **backbone_kwargs: Any
) -> ITPN:
    """Build a named encoder with fresh weights.

    Args:
        name: a key of `models.variants.VARIANTS`, such as "itpn_base_patch16_224".
        fpn_dim: channels of the pyramid, 0 for the variant's own (the released pixel base model has
            512 where its code says 256).
        fpn_depth: blocks per pyramid step, None for the variant's own (the official detector uses 1
            where pre-training has 2).
        **backbone_kwargs: passed to `HiViT`: img_size, pos_embed_size, in_chans, rel_pos_bias,
            decomposed_rel_pos, drop_path_rate, init_values, token_migration, token_gathering (or a
            dict of its fields, as JSON has it); the variant's own by default.

    Raises:
        ValueError: unknown name, or an image size that is not a multiple of the patch size.
    """
    variant = get_variant(name)
    for key, kind in (("token_migration", TokenMigration), ("token_gathering", TokenGathering)):
        if isinstance(fields := backbone_kwargs.get(key), dict):
            backbone_kwargs[key] = kind(**fields)
    own = {
        "img_size": variant.img_size,
        "init_values": variant.init_values,
        "rel_pos_bias": variant.rel_pos_bias and not backbone_kwargs.get("decomposed_rel_pos"),
    }
    backbone = HiViT(
        variant.embed_dim,
        depths=variant.depths,
        num_heads=variant.num_heads,
        mlp_ratio=variant.mlp_ratio,
        layers=FAST_LAYERS if variant.fast else TrunkLayers(),
        **{**own, **backbone_kwargs},
    )
    pyramid = FeaturePyramid(
        backbone.stage_dims,
        fpn_dim=fpn_dim or variant.fpn_dim,
        fpn_depth=variant.fpn_depth if fpn_depth is None else fpn_depth,
    )
    return ITPN(backbone, pyramid)
