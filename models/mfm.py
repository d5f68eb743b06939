"""MFM: masked feature modelling, teacher features as targets for every pyramid stage.

The idea is the paper's (arXiv:2211.12735, section 3.3 and figure 1); the authors never released
code for it. Loss form, weight, target normalisation and heads are **ours**:
one Linear per stage maps a decoder token to that stage's cells x channels, targets are the
teacher's stage features normalised over channels without affine, and only masked positions count.
"""

# B batch, N patches, M masked patches, D decoder dim, c cells per token side, d stage channels

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.hivit import STRIDES
from models.layers import CELLS, init_linear_and_norm
from models.mim import weighted_mean
from models.tokens import gather_tokens

MFMLoss = Literal["mse", "smooth_l1"]


class MaskedFeatureModeling(nn.Module):
    """Per-stage prediction of teacher features at masked positions.

    Args:
        decoder_dim: width of the decoder's tokens.
        stage_dims: channels of the teacher's stages by stride.
        loss_type: "mse" or "smooth_l1" (beta 1).
    """

    def __init__(
        self, decoder_dim: int, stage_dims: dict[int, int], *, loss_type: MFMLoss = "mse"
    ) -> None:
        super().__init__()
        self.loss_type = loss_type
        self.stage_dims = stage_dims
        self.cells = {
            stride: CELLS * STRIDES[0] // stride for stride in STRIDES
        }  # {4: 4, 8: 2, ...}
        self.pred = nn.ModuleDict(
            {str(s): nn.Linear(decoder_dim, self.cells[s] ** 2 * stage_dims[s]) for s in STRIDES}
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Linear: trunc_normal std .02, bias 0."""
        self.apply(init_linear_and_norm)

    def forward(self, latent: Tensor) -> dict[int, Tensor]:
        """Decoder tokens (B, M, D) -> {stride: (B, M, c, c, d)}."""
        B, M, _ = latent.shape
        return {
            s: self.pred[str(s)](latent).reshape(B, M, self.cells[s], self.cells[s], -1)
            for s in STRIDES
        }

    def losses(
        self,
        latent: Tensor,
        teacher_features: dict[int, Tensor],
        ids_masked: Tensor,
        weight: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Regression loss of each stage, float32 scalars.

        Args:
            latent: (B, N, D) decoder output.
            teacher_features: {stride: (B, M, c, c, d)} at the masked positions, any scale.
            ids_masked: (B, M) raster indices of the masked patches.
            weight: (B,) factors of the images' losses; None for ones.
        """
        loss_fn = F.mse_loss if self.loss_type == "mse" else F.smooth_l1_loss
        predictions = self(gather_tokens(latent, ids_masked))
        targets = normalize_features(teacher_features)
        return {
            s: weighted_mean(loss_fn, predictions[s].float(), targets[s], weight) for s in STRIDES
        }


def normalize_features(features: dict[int, Tensor]) -> dict[int, Tensor]:
    """Channel-normalise targets: zero mean and unit variance over the last axis, float32, detached.

    Without it the coarse stages, whose features have the largest scale, would own the loss, and a
    teacher could make the task trivial by shrinking its features.
    """
    return {s: F.layer_norm(f.detach().float(), f.shape[-1:]) for s, f in features.items()}
