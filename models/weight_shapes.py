"""What the encoder of a weights file must look like, read off the shapes of its tensors.

The surprising fact: released files do not all have the dimensions of the released code
(`itpn_base_pixel.pth` has a neck of 512 channels where the code says 256), so names of variants are
guessed from shapes here and never the other way round. Only the number of heads leaves no trace
unless there are relative position tables; it is then that of the variant of these dimensions, or
one head for 64 channels, as in all released models.
"""

# D embed dim, F fpn_dim, H heads, p cell side in pixels

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.fast_itpn import FAST_LAYERS
from models.hivit import HiViT, TrunkLayers
from models.itpn import ITPN
from models.key_layouts import BACKBONE, PYRAMID, to_canonical
from models.layers import CELLS
from models.pyramid import FeaturePyramid
from models.variants import VARIANTS

HEAD_DIM = 64
"""Channels of a head in every released model."""
_SHAPE_OF_VARIANT = ("embed_dim", "depths", "mlp_ratio", "fast")


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The dimensions of an encoder."""

    embed_dim: int
    """Channels of stage 3."""
    depths: tuple[int, int, int]
    """Blocks of stages 1, 2, 3."""
    num_heads: int
    """Attention heads of stage 3."""
    patch_size: int
    """Token side in pixels."""
    in_chans: int
    """Image channels."""
    bridge_mlp_ratio: float
    """MLP ratio of stages 1 and 2."""
    mlp_ratio: float
    """MLP ratio of stage 3."""
    layer_scale: bool
    """Whether stage 3 has layer scale."""
    rel_pos_bias: bool
    """Whether stage 3 has relative position bias tables."""
    decomposed_rel_pos: bool
    """Whether stage 3 has decomposed relative positions."""
    fast: bool
    """The trunk of Fast-iTPN."""
    pos_embed_side: int
    """Tokens along a side of the absolute position table."""
    rel_pos_side: int
    """Tokens along a side that the relative positions are made for; 0: there are none. Official
    segmenters have tables for 512 pixels beside an absolute one for 224."""
    fpn_dim: int
    """Channels of the pyramid; 0: the file has no neck, or not a whole one."""
    fpn_depth: int
    """Blocks per pyramid step."""

    @property
    def img_size(self) -> int:
        """Side in pixels of the images the absolute table is made for."""
        return self.pos_embed_side * self.patch_size

    @property
    def variants(self) -> list[str]:
        """Named variants with this trunk, those with this neck first."""
        names = [
            name
            for name, v in VARIANTS.items()
            if all(getattr(v, key) == getattr(self, key) for key in _SHAPE_OF_VARIANT)
            and v.num_heads == self.num_heads
        ]
        neck = (self.fpn_dim, self.fpn_depth)
        scale = self.layer_scale
        return sorted(
            names,
            key=lambda name: (
                (VARIANTS[name].fpn_dim, VARIANTS[name].fpn_depth) != neck,
                (VARIANTS[name].init_values is not None) != scale,
                VARIANTS[name].img_size != self.img_size,
            ),
        )


def infer_shape(state: Mapping[str, Tensor]) -> EncoderShape:
    """Dimensions of the encoder in a state dict of any layout `models.weights` reads.

    Raises:
        ValueError: there is no trunk in it, or one of shapes that no HiViT has.
    """
    tensors, _ = to_canonical(state)
    trunk = {k.removeprefix(BACKBONE): t for k, t in tensors.items() if k.startswith(BACKBONE)}
    neck = {k.removeprefix(PYRAMID): t for k, t in tensors.items() if k.startswith(PYRAMID)}
    try:
        return _infer(trunk, neck)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"no iTPN, HiViT or Fast-iTPN trunk among {len(state)} tensors ({error}); give a file "
            "of one of these models, such as encoder.safetensors"
        ) from error


def _infer(trunk: dict[str, Tensor], neck: dict[str, Tensor]) -> EncoderShape:
    embed_dim = trunk["pos_embed"].shape[-1]
    indices = sorted({int(key.split(".")[1]) for key in trunk if key.startswith("blocks.")})
    merges = [i for i in indices if f"blocks.{i}.reduction.weight" in trunk]
    if len(merges) != 2 or indices != list(range(len(indices))):
        raise ValueError(f"merges at {merges} among blocks {indices}")
    depths = (merges[0], merges[1] - merges[0] - 1, len(indices) - merges[1] - 1)
    last = f"blocks.{indices[-1]}."
    fast = f"{last}attn.q_bias" in trunk
    hidden = trunk[f"{last}mlp.w1.weight" if fast else f"{last}mlp.fc1.weight"].shape[0]
    bridge = trunk["blocks.0.mlp.fc1.weight"].shape
    ratio, side = hidden / embed_dim, round(trunk["pos_embed"].shape[1] ** 0.5)
    return EncoderShape(
        embed_dim=embed_dim,
        depths=depths,
        num_heads=_num_heads(trunk, last, embed_dim, depths, ratio, fast),
        patch_size=trunk["patch_embed.proj.weight"].shape[-1] * CELLS,
        in_chans=trunk["patch_embed.proj.weight"].shape[1],
        bridge_mlp_ratio=bridge[0] / bridge[1],
        mlp_ratio=ratio,
        layer_scale=f"{last}gamma_1" in trunk,
        rel_pos_bias=f"{last}attn.relative_position_bias_table" in trunk,
        decomposed_rel_pos=f"{last}attn.rel_pos_h" in trunk,
        fast=fast,
        pos_embed_side=side,
        rel_pos_side=_rel_pos_side(trunk, last),
        **_neck_shape(neck),
    )


def _rel_pos_side(trunk: dict[str, Tensor], last: str) -> int:
    if (table := trunk.get(f"{last}attn.relative_position_bias_table")) is not None:
        return (math.isqrt(table.shape[0]) + 1) // 2
    table = trunk.get(f"{last}attn.rel_pos_h")
    return 0 if table is None else (table.shape[0] + 1) // 2


def _num_heads(
    trunk: dict[str, Tensor],
    last: str,
    embed_dim: int,
    depths: tuple[int, int, int],
    mlp_ratio: float,
    fast: bool,
) -> int:
    if (table := trunk.get(f"{last}attn.relative_position_bias_table")) is not None:
        return table.shape[1]
    if (table := trunk.get(f"{last}attn.rel_pos_h")) is not None:
        return embed_dim // table.shape[1]
    found = (embed_dim, depths, mlp_ratio, fast)
    for variant in VARIANTS.values():
        if tuple(getattr(variant, key) for key in _SHAPE_OF_VARIANT) == found:
            return variant.num_heads
    return max(1, embed_dim // HEAD_DIM)


def _neck_shape(neck: dict[str, Tensor]) -> dict[str, int]:
    if "align_dim_8to4.weight" not in neck or "split_16to8.reduction.weight" not in neck:
        return {"fpn_dim": 0, "fpn_depth": 0}
    depth = len({key.split(".")[1] for key in neck if key.startswith("block_8to4.")})
    return {"fpn_dim": neck["align_dim_8to4.weight"].shape[0], "fpn_depth": depth}


def create_encoder(shape: EncoderShape, **backbone_kwargs: Any) -> ITPN:
    """Build an encoder of these dimensions with fresh weights.

    Args:
        shape: such as `infer_shape` gives; without a neck, one of 256 channels is built.
        **backbone_kwargs: passed to `HiViT`, such as drop_path_rate, or img_size with
            pos_embed_size.
    """
    own = {
        "img_size": shape.rel_pos_side * shape.patch_size or shape.img_size,
        "pos_embed_size": shape.img_size,
        "rel_pos_bias": shape.rel_pos_bias,
        "decomposed_rel_pos": shape.decomposed_rel_pos,
        "init_values": 0.1 if shape.layer_scale else None,
    }
    backbone = HiViT(
        shape.embed_dim,
        depths=shape.depths,
        num_heads=shape.num_heads,
        patch_size=shape.patch_size,
        in_chans=shape.in_chans,
        bridge_mlp_ratio=shape.bridge_mlp_ratio,
        mlp_ratio=shape.mlp_ratio,
        layers=FAST_LAYERS if shape.fast else TrunkLayers(),
        **{**own, **backbone_kwargs},
    )
    pyramid = FeaturePyramid(
        backbone.stage_dims, fpn_dim=shape.fpn_dim or 256, fpn_depth=shape.fpn_depth or 1
    )
    return ITPN(backbone, pyramid)
