"""ITPNSegmenter: UPerNet on the encoder's four levels, with an auxiliary FCN head.

Source: seg/configs/itpn and seg/backbone/iTPN.py for the levels; the heads follow UPerNet
(arXiv:1807.10221) with the official numbers: pooling scales 1, 2, 3, 6, 768 channels, auxiliary
head on stride 16 with weight 0.4, dropout 0.1.

The surprising facts: the heads read pyramid *and* backbone channels of each level; the absolute
position table stays that of pre-training and is interpolated in every forward; any image size
works (the official model is fixed to 512x512).

Departures, ours: plain BatchNorm2d where the official configs use SyncBN (convert with
`nn.SyncBatchNorm.convert_sync_batchnorm` for several workers); the LayerNorm epsilon is 1e-6 as in
pre-training (official: 1e-5).
"""

# B batch, K classes, H x W image, h x w token grid

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.feature_maps import segmentation_levels
from models.itpn import ITPN, create_itpn
from models.variants import get_variant

IGNORE_INDEX = 255
"""Label of pixels without a class; they take no part in the loss."""
POOL_SCALES = (1, 2, 3, 6)
AUXILIARY_LEVEL = 2  # stride 16
AUXILIARY_WEIGHT = 0.4


class SegmentationLogits(NamedTuple):
    """What the segmenter yields for a batch."""

    main: Tensor
    """(B, K, H/4, W/4)."""
    auxiliary: Tensor | None
    """(B, K, H/16, W/16); None in eval mode or without an auxiliary head."""


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest level, a top-down path, all levels fused (arXiv:1807.10221).

    Args:
        in_channels: channels of the levels, finest first.
        channels: width of every convolution.
        num_classes: outputs.
        dropout: rate of dropping whole channels before the classifier.
    """

    def __init__(
        self, in_channels: tuple[int, ...], *, channels: int, num_classes: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        *fine, last = in_channels
        self.pooled = nn.ModuleList(ConvNormReLU(last, channels, 1) for _ in POOL_SCALES)
        self.bottleneck = ConvNormReLU(last + len(POOL_SCALES) * channels, channels, 3)
        self.lateral = nn.ModuleList(ConvNormReLU(dim, channels, 1) for dim in fine)
        self.smooth = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in fine)
        self.fuse = ConvNormReLU(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions: kaiming_normal (fan out, ReLU). Classifier: normal std .01, bias 0."""
        init_head(self, self.classify)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """levels [(B, d_i, H_i, W_i)], finest first -> logits (B, K, H_0, W_0)."""
        *fine, last = levels
        context = [last]
        for scale, conv in zip(POOL_SCALES, self.pooled, strict=True):
            context.append(resize(conv(F.adaptive_avg_pool2d(last, scale)), last))
        top = self.bottleneck(torch.cat(context, dim=1))

        laterals = [conv(x) for conv, x in zip(self.lateral, fine, strict=True)] + [top]
        for i in reversed(range(len(fine))):
            laterals[i] = laterals[i] + resize(laterals[i + 1], laterals[i])
        outputs = [conv(x) for conv, x in zip(self.smooth, laterals[:-1], strict=True)] + [top]
        x = self.fuse(torch.cat([resize(x, outputs[0]) for x in outputs], dim=1))
        return self.classify(self.dropout(x))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier: the auxiliary head.

    Args:
        in_channels: channels of the level it reads.
        channels: width of the convolution.
        num_classes: outputs.
        dropout: rate of dropping whole channels before the classifier.
    """

    def __init__(
        self, in_channels: int, *, channels: int = 256, num_classes: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.conv = ConvNormReLU(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions: kaiming_normal (fan out, ReLU). Classifier: normal std .01, bias 0."""
        init_head(self, self.classify)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, d, h, w) -> logits (B, K, h, w)."""
        return self.classify(self.dropout(self.conv(x)))


class ITPNSegmenter(nn.Module):
    """Semantic segmentation on an iTPN encoder.

    Args:
        encoder: backbone and neck, usually with `rel_pos_bias=True` as the official models.
        num_classes: classes, without the ignored label 255.
        channels: width of the UPerHead (official: 768 for base and large).
        auxiliary: build the auxiliary head (used in training only).

    Raises:
        ValueError: num_classes is less than 1.
    """

    def __init__(
        self, encoder: ITPN, num_classes: int, *, channels: int = 768, auxiliary: bool = True
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be >= 1")
        self.encoder = encoder
        self.num_classes = num_classes
        dims = [encoder.pyramid.fpn_dim + encoder.backbone.stage_dims[s] for s in (4, 8, 16, 16)]
        self.decode_head = UPerHead(tuple(dims), channels=channels, num_classes=num_classes)
        self.auxiliary_head = (
            FCNHead(dims[AUXILIARY_LEVEL], num_classes=num_classes) if auxiliary else None
        )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates in timm's form; see `HiViT.group_matcher`."""
        return self.encoder.backbone.group_matcher(coarse, prefix=r"encoder\.backbone\.")

    def no_weight_decay(self) -> set[str]:
        """Names left undecayed besides biases and 1-D tensors: the position tables."""
        return {f"encoder.backbone.{n}" for n in self.encoder.backbone.no_weight_decay()}

    def levels(self, images: Tensor) -> list[Tensor]:
        """images (B, C, H, W) -> [(B, F + d_s, H/s, W/s)] of the strides 4, 8, 16, 32."""
        side = self.encoder.backbone.patch_size
        grid = (images.shape[-2] // side, images.shape[-1] // side)
        return list(segmentation_levels(self.encoder(images), grid).values())

    def forward(self, images: Tensor) -> SegmentationLogits:
        """Segment a batch.

        Args:
            images: (B, C, H, W), normalised; both sides multiples of the patch size, at least two
                patches long. In training B must be over 1: the batch norm after the 1x1 pooling
                needs more than one value per channel.

        Raises:
            ValueError: H or W does not fit.
        """
        levels = self.levels(images)
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            auxiliary = self.auxiliary_head(levels[AUXILIARY_LEVEL])
        return SegmentationLogits(self.decode_head(levels), auxiliary)

    @torch.no_grad()
    def predict(
        self, images: Tensor, *, window: int | None = None, stride: int | None = None
    ) -> Tensor:
        """Class logits of every pixel, of the whole image or averaged over sliding windows.

        Images and windows are padded at the right and bottom with zeros (the mean pixel) to
        multiples of the patch size; what falls on the padding is cut off.

        Args:
            images: (B, C, H, W), normalised, of any size.
            window: side of a window in pixels (official: 512); None takes the image whole.
            stride: step of the windows in pixels, None for two thirds of it (official: 341).

        Returns:
            (B, K, H, W).

        Raises:
            ValueError: window or stride is not positive, the stride exceeds the window, or the
                model is in training mode (its batch norms would learn from the test images).
        """
        if self.training:
            raise ValueError("predict() needs the model in eval mode; call model.eval() first")
        if window is None:
            return self._predict_whole(images)
        stride = stride or max(1, window * 2 // 3)
        if window < 1 or not 1 <= stride <= window:
            raise ValueError(
                f"stride={stride} must be between 1 and window={window}: windows must leave no gap"
            )
        B, _, H, W = images.shape
        logits = images.new_zeros(B, self.num_classes, H, W)
        count = images.new_zeros(1, 1, H, W)
        for top in window_starts(H, window, stride):
            for left in window_starts(W, window, stride):
                rows, columns = slice(top, top + window), slice(left, left + window)
                logits[..., rows, columns] += self._predict_whole(images[..., rows, columns])
                count[..., rows, columns] += 1
        return logits / count

    def _predict_whole(self, images: Tensor) -> Tensor:
        H, W = images.shape[-2:]
        side = self.encoder.backbone.patch_size
        # two patches are the smallest image with a stride-32 level
        height, width = (max(2, -(-size // side)) * side for size in (H, W))
        padded = F.pad(images, (0, width - W, 0, height - H))
        logits = resize(self(padded).main, padded)
        return logits[..., :H, :W].to(images.dtype)


def segmentation_loss(
    logits: SegmentationLogits, labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> dict[str, Tensor]:
    """Cross-entropy of the upsampled logits, averaged over the labelled pixels (ours).

    Args:
        logits: of the model in training mode.
        labels: (B, H, W) int64 classes; `ignore_index` where there is none.
        ignore_index: the label that takes no part.

    Returns:
        {"loss_seg": main, "loss_aux": 0.4 * auxiliary, where there is one}; train on the sum. A
        batch without a labelled pixel gives zeros, not NaN.
    """
    num_labelled = (labels != ignore_index).sum().clamp(min=1)

    def cross_entropy(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(x, labels, ignore_index=ignore_index, reduction="sum")
        return total / num_labelled

    losses = {"loss_seg": cross_entropy(logits.main)}
    if logits.auxiliary is not None:
        losses["loss_aux"] = AUXILIARY_WEIGHT * cross_entropy(logits.auxiliary)
    return losses


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window ends at the edge."""
    last = max(0, size - window)
    return [*range(0, last, stride), last]


class ConvNormReLU(nn.Sequential):
    """Convolution without bias at unchanged size, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


def init_head(head: nn.Module, classify: nn.Conv2d) -> None:
    """Convolutions: kaiming_normal (fan out, ReLU). Classifier: normal std .01, bias 0."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(classify.weight, std=0.01)
    assert classify.bias is not None
    nn.init.zeros_(classify.bias)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear interpolation to the height and width of another map."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def create_segmenter(
    name: str,
    *,
    num_classes: int,
    img_size: int = 512,
    pos_embed_size: int | None = None,
    channels: int = 768,
    rel_pos_bias: bool = True,
    drop_path_rate: float = 0.0,
    **encoder_kwargs: Any,
) -> ITPNSegmenter:
    """Build a named segmenter with fresh weights.

    Args:
        name: a key of `models.variants.VARIANTS`.
        num_classes: classes, without the ignored label.
        img_size: side in pixels of the crops; sets the size of the relative position tables.
        pos_embed_size: side in pixels of the images of pre-training, which the absolute table is
            built for and keeps; None for the variant's own.
        channels: width of the UPerHead.
        rel_pos_bias: relative position bias (zero at first).
        drop_path_rate: stochastic depth of the last block (official: 0.1 pixel base, 0.2 others).
        **encoder_kwargs: passed to `create_itpn`, such as fpn_depth or init_values.

    Raises:
        ValueError: unknown name, or an image size that is not a multiple of the patch size.
    """
    encoder = create_itpn(
        name,
        img_size=img_size,
        pos_embed_size=pos_embed_size or get_variant(name).img_size,
        rel_pos_bias=rel_pos_bias,
        drop_path_rate=drop_path_rate,
        **encoder_kwargs,
    )
    return ITPNSegmenter(encoder, num_classes, channels=channels)
