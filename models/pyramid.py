"""FeaturePyramid: the top-down neck that is pre-trained with the backbone (arXiv:2211.12735,
section 3.2).

Like the first two stages it never mixes tokens: a pyramid over visible tokens is the dense pyramid
restricted to them. The surprising fact: the skip connections go in *before* the level's blocks, and
the output modules are not fed to the next level.
"""

# B batch, V tokens, F fpn_dim

from __future__ import annotations

from torch import Tensor, nn

from models.layers import MlpBlock, PatchSplit, init_linear_and_norm


class FeaturePyramid(nn.Module):
    """Stage features -> three pyramid levels of one width.

    Args:
        stage_dims: channels of the backbone stages by stride, {4: ., 8: ., 16: .}.
        fpn_dim: channels of every level.
        fpn_depth: MLP blocks on the way down at strides 8 and 4.
        mlp_ratio: MLP ratio of the pyramid's blocks.
        norm_eps: epsilon of every LayerNorm.
    """

    def __init__(
        self,
        stage_dims: dict[int, int],
        *,
        fpn_dim: int = 256,
        fpn_depth: int = 2,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.fpn_dim = fpn_dim
        self.fpn_depth = fpn_depth
        dim4, dim8, dim16 = stage_dims[4], stage_dims[8], stage_dims[16]

        def blocks(depth: int) -> nn.ModuleList:
            return nn.ModuleList(MlpBlock(fpn_dim, mlp_ratio, eps=norm_eps) for _ in range(depth))

        # The official model has no such layer (nor key) when the widths agree.
        self.align_dim_16tofpn = nn.Identity() if dim16 == fpn_dim else nn.Linear(dim16, fpn_dim)
        self.align_dim_16to8 = nn.Linear(dim8, fpn_dim, bias=False)
        self.split_16to8 = PatchSplit(dim16, fpn_dim, eps=norm_eps)
        self.block_16to8 = blocks(fpn_depth)
        self.align_dim_8to4 = nn.Linear(dim4, fpn_dim, bias=False)
        self.split_8to4 = PatchSplit(fpn_dim, fpn_dim, eps=norm_eps)
        self.block_8to4 = blocks(fpn_depth)
        self.fpn_modules = blocks(3)  # output modules of strides 16, 8, 4
        self.init_weights()

    def init_weights(self) -> None:
        """Linear: trunc_normal std .02, bias 0. LayerNorm: 1, 0. Nothing else has parameters."""
        self.apply(init_linear_and_norm)

    def forward(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        """Pyramid levels of the encoded tokens.

        Args:
            features: {4: (B, V, 4, 4, D/4), 8: (B, V, 2, 2, D/2), 16: (B, V, 1, 1, D)}.

        Returns:
            {4: (B, V, 4, 4, F), 8: (B, V, 2, 2, F), 16: (B, V, 1, 1, F)}.
        """
        p16 = self.align_dim_16tofpn(features[16])
        p8 = self.split_16to8(features[16]) + self.align_dim_16to8(features[8])
        for block in self.block_16to8:
            p8 = block(p8)
        p4 = self.split_8to4(p8) + self.align_dim_8to4(features[4])
        for block in self.block_8to4:
            p4 = block(p4)
        out16, out8, out4 = self.fpn_modules
        return {4: out4(p4), 8: out8(p8), 16: out16(p16)}
