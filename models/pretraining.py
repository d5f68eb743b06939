"""The composed pre-training objective: encoder + decoder + MIM (+ MFM) -> losses.

With no MFM part the model is the public pixel objective, to the last bit. The forward is a pure
function of image, mask and teacher features; the teacher itself lives outside (it is not trained).
"""

# B batch, N patches, V visible patches, M masked patches, D decoder dim

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from models.decoder import Decoder
from models.itpn import ITPN, create_itpn
from models.mfm import MaskedFeatureModeling, MFMLoss
from models.mim import MaskedImageModeling
from models.tokens import split_tokens
from models.variants import get_variant


class PretrainLosses(NamedTuple):
    """Float32 scalars of one forward."""

    total: Tensor
    """mim + mfm_weight * (sum of mfm)."""
    mim: Tensor
    """Mean squared pixel error at masked patches."""
    mfm: dict[int, Tensor]
    """Feature loss at masked patches by stride; empty without MFM."""


class PretrainPredictions(NamedTuple):
    """Predictions at every position, for pictures and evaluation."""

    pixels: Tensor
    """(B, N, P*P*C) in the space of the MIM targets."""
    features: dict[int, Tensor]
    """{stride: (B, N, c, c, d)} in the space of the MFM targets; empty without MFM."""


class PretrainingModel(nn.Module):
    """Masked pre-training of an iTPN.

    Args:
        encoder: backbone and neck.
        decoder: shared by both objectives.
        mim: pixel objective.
        mfm: feature objective, or None for pixels only.
        mfm_weight: factor of the summed stage losses (default of ours: 0.3).
    """

    def __init__(
        self,
        encoder: ITPN,
        decoder: Decoder,
        mim: MaskedImageModeling,
        mfm: MaskedFeatureModeling | None = None,
        mfm_weight: float = 0.3,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.mim = mim
        self.mfm = mfm
        self.mfm_weight = mfm_weight

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        teacher_features: dict[int, Tensor] | None = None,
        num_visible: int | None = None,
        weight: Tensor | None = None,
    ) -> PretrainLosses:
        """Losses of a batch.

        Args:
            images: (B, C, H, W), normalised.
            mask: (B, N) bool, True = masked, the same count in every row.
            teacher_features: {stride: (B, M, c, c, d)} at the masked positions in raster order;
                needed exactly when the model has an MFM part.
            num_visible: visible patches per image; None counts them in the mask.
            weight: (B,) factors of the images' losses, 0 leaves an image out; None for ones.
        """
        ids_visible, ids_masked = split_tokens(mask, num_visible)
        latent = self.decoder(self.encoder(images, ids_visible).pyramid, ids_visible)  # (B, N, D)
        mim = self.mim.loss(latent, images, ids_masked, weight)
        if self.mfm is None:
            return PretrainLosses(mim, mim, {})
        assert teacher_features is not None, "a model with MFM needs teacher_features"
        mfm = self.mfm.losses(latent, teacher_features, ids_masked, weight)
        total = mim + self.mfm_weight * (mfm[4] + mfm[8] + mfm[16])
        return PretrainLosses(total, mim, mfm)

    def predict(self, images: Tensor, mask: Tensor) -> PretrainPredictions:
        """Predictions at every position from the visible patches of `mask` (True = masked)."""
        ids_visible, _ = split_tokens(mask)
        latent = self.decoder(self.encoder(images, ids_visible).pyramid, ids_visible)
        features = {} if self.mfm is None else self.mfm(latent)
        return PretrainPredictions(self.mim(latent), features)


def create_pretraining_model(
    name: str,
    *,
    img_size: int | None = None,
    norm_pix_loss: bool = True,
    mfm_weight: float = 0.3,
    mfm_loss: MFMLoss = "mse",
    target_dims: dict[int, int] | None = None,
    **encoder_kwargs: Any,
) -> PretrainingModel:
    """Build a named model for pre-training, with the decoder of its variant.

    Args:
        name: a key of `models.variants.VARIANTS`.
        img_size: image side in pixels; None for the variant's own.
        norm_pix_loss: per-patch-normalised pixel targets.
        mfm_weight: weight of the feature losses; 0 builds no MFM part at all.
        mfm_loss: regression loss of MFM.
        target_dims: channels of the teacher's features by stride; None for the backbone's own.
        **encoder_kwargs: passed to `create_itpn`, such as drop_path_rate and fpn_dim.

    Raises:
        ValueError: unknown name or an image size that is not a multiple of 16.
    """
    if mfm_weight < 0:
        raise ValueError(f"mfm_weight={mfm_weight} must be >= 0; 0 builds no MFM part")
    variant = get_variant(name)
    encoder = create_itpn(name, img_size=img_size or variant.img_size, **encoder_kwargs)
    decoder = Decoder(
        encoder.pyramid.fpn_dim,
        grid=encoder.backbone.grid,
        dim=variant.decoder_dim,
        depth=variant.decoder_depth,
        num_heads=variant.decoder_num_heads,
    )
    mim = MaskedImageModeling(
        variant.decoder_dim,
        patch_size=encoder.backbone.patch_size,
        norm_pix_loss=norm_pix_loss,
    )
    mfm = None
    if mfm_weight > 0:
        mfm = MaskedFeatureModeling(
            variant.decoder_dim, target_dims or encoder.backbone.stage_dims, loss_type=mfm_loss
        )
    return PretrainingModel(encoder, decoder, mim, mfm, mfm_weight)
