"""MIM: masked image modelling, the pixel objective (arXiv:2211.12735; He et al., arXiv:2111.06377).

The surprising fact: per-patch normalisation divides by the *unbiased* standard deviation
(itpn_pixel/models/masked_autoencoder.py:76-92); the biased one moves the loss by 1.3e-3.
"""

# B batch, M masked patches, D decoder dim, P patch side, C image channels

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import init_linear_and_norm
from models.tokens import gather_tokens, patchify

NORM_PIX_EPS = 1e-6


class MaskedImageModeling(nn.Module):
    """Linear prediction of the pixels of masked patches.

    Args:
        decoder_dim: width of the decoder's tokens.
        patch_size: patch side in pixels.
        in_chans: image channels.
        norm_pix_loss: predict pixels normalised by each patch's own mean and deviation.
    """

    def __init__(
        self, decoder_dim: int, *, patch_size: int = 16, in_chans: int = 3, norm_pix_loss: bool
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss
        self.pred = nn.Linear(decoder_dim, patch_size * patch_size * in_chans)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear: trunc_normal std .02, bias 0."""
        self.apply(init_linear_and_norm)

    def targets(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, N, P*P*C), what every patch's prediction is held against."""
        patches = patchify(images.float(), self.patch_size)
        if not self.norm_pix_loss:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def forward(self, latent: Tensor) -> Tensor:
        """Decoder tokens (..., D) -> pixels (..., P*P*C)."""
        return self.pred(latent)

    def loss(
        self, latent: Tensor, images: Tensor, ids_masked: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Mean squared error over the masked patches, a float32 scalar.

        Args:
            latent: (B, N, D) decoder output.
            images: (B, C, H, W), normalised.
            ids_masked: (B, M) raster indices of the masked patches.
            weight: (B,) factors of the images' losses; None for ones.
        """
        pred = self(gather_tokens(latent, ids_masked)).float()  # (B, M, P*P*C)
        target = gather_tokens(self.targets(images), ids_masked)
        return weighted_mean(F.mse_loss, pred, target, weight)


def weighted_mean(
    loss_fn: Callable[..., Tensor], pred: Tensor, target: Tensor, weight: Tensor | None
) -> Tensor:
    """Mean of an elementwise loss of (B, ...) tensors, each image times its weight (B,).

    The divisor counts every image: one of weight 0 adds nothing and leaves the others as they are.
    """
    if weight is None:
        return loss_fn(pred, target)
    by_image = loss_fn(pred, target, reduction="none").flatten(1).mean(1)  # (B,)
    return (by_image * weight).mean()


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, sqrt(unbiased var + eps), of each patch: both (B, N, 1)."""
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True, unbiased=True)
    return mean, (var + NORM_PIX_EPS).sqrt()
