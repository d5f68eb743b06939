"""The table of named variants. Imports no torch, so that a data worker reads it in no time."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True, kw_only=True, slots=True)
class ITPNVariant:
    """The numbers of one named model."""

    embed_dim: int
    """Channels of stage 3."""
    depths: tuple[int, int, int]
    """Blocks of stages 1, 2, 3."""
    num_heads: int
    """Attention heads of stage 3."""
    fpn_dim: int = 256
    """Channels of the pyramid."""
    fpn_depth: int = 2
    """Blocks per pyramid step."""
    decoder_dim: int = 512
    """Width of the pre-training decoder."""
    decoder_depth: int = 8
    """Blocks of the pre-training decoder."""
    decoder_num_heads: int = 16
    """Attention heads of the pre-training decoder."""
    img_size: int = 224
    """Side in pixels the position tables are built for by default."""
    mlp_ratio: float = 4.0
    """MLP ratio of stage 3."""
    init_values: float | None = None
    """Initial layer scale; None for none."""
    rel_pos_bias: bool = False
    """Relative position bias already in pre-training."""
    fast: bool = False
    """The trunk of Fast-iTPN."""


_clip = partial(ITPNVariant, fpn_depth=1, init_values=0.1, rel_pos_bias=True)
_fast = partial(ITPNVariant, fpn_depth=1, init_values=0.1, mlp_ratio=3.0, fast=True)

# Official: base and large (itpn_pixel/models/models_itpn_mim.py:248,256), the clip ones
# (itpn_clip/modeling_pretrain.py:308-338; what the README calls L/14 is patch 16 at 256 pixels),
# the fast ones (fast_itpn/modeling_finetune.py:967-1021) and HiViT's (their neck is ours).
# The others are ours: tiny and nano for laptops, debug for tests.
VARIANTS: dict[str, ITPNVariant] = {
    "itpn_base_patch16_224": ITPNVariant(embed_dim=512, depths=(3, 3, 24), num_heads=8),
    "itpn_large_patch16_224": ITPNVariant(embed_dim=768, depths=(2, 2, 40), num_heads=12),
    "itpn_base_clip_patch16_224": _clip(embed_dim=512, depths=(3, 3, 24), num_heads=8),
    "itpn_large_clip_patch16_224": _clip(embed_dim=768, depths=(2, 2, 40), num_heads=12),
    "itpn_large_clip_patch16_256": _clip(
        embed_dim=768, depths=(2, 2, 40), num_heads=12, img_size=256
    ),
    "fast_itpn_tiny_patch16_224": _fast(embed_dim=384, depths=(1, 1, 12), num_heads=6),
    "fast_itpn_small_patch16_224": _fast(embed_dim=384, depths=(2, 2, 20), num_heads=6),
    "fast_itpn_base_patch16_224": _fast(embed_dim=512, depths=(3, 3, 24), num_heads=8),
    "fast_itpn_large_patch16_256": _fast(
        embed_dim=768, depths=(2, 2, 40), num_heads=12, img_size=256
    ),
    "hivit_tiny_patch16_224": ITPNVariant(embed_dim=384, depths=(2, 2, 10), num_heads=6),
    "hivit_small_patch16_224": ITPNVariant(embed_dim=384, depths=(4, 4, 20), num_heads=6),
    "hivit_base_patch16_224": ITPNVariant(embed_dim=512, depths=(4, 4, 20), num_heads=8),
    "itpn_tiny_patch16_224": ITPNVariant(
        embed_dim=192,
        depths=(1, 1, 6),
        num_heads=3,
        fpn_dim=96,
        fpn_depth=1,
        decoder_dim=192,
        decoder_depth=2,
        decoder_num_heads=6,
    ),
    "itpn_nano_patch16_224": ITPNVariant(
        embed_dim=128,
        depths=(1, 1, 2),
        num_heads=2,
        fpn_dim=32,
        fpn_depth=1,
        decoder_dim=128,
        decoder_depth=2,
        decoder_num_heads=4,
    ),
    "itpn_debug": ITPNVariant(
        embed_dim=32,
        depths=(1, 1, 1),
        num_heads=2,
        fpn_dim=16,
        fpn_depth=1,
        decoder_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
        img_size=64,
    ),
    "fast_itpn_debug": ITPNVariant(
        embed_dim=32,
        depths=(1, 1, 1),
        num_heads=2,
        fpn_dim=16,
        fpn_depth=1,
        decoder_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
        img_size=64,
        mlp_ratio=3.0,
        init_values=0.1,
        fast=True,
    ),
}


def get_variant(name: str) -> ITPNVariant:
    """Look a variant up by name.

    Raises:
        ValueError: no such variant; names the nearest one and all known ones.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ValueError(f"unknown model '{name}'{hint} Known: {', '.join(VARIANTS)}")
    return VARIANTS[name]
