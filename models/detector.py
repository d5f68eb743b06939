"""ITPNDetector: torchvision's Mask R-CNN and Faster R-CNN, or Cascade, on the pre-trained pyramid.

The surprising fact: there is no FPN to add. The encoder's neck *is* the FPN: its three levels and
two average-poolings of the coarsest give strides 4, 8, 16, 32, 64, all `fpn_dim` wide. The proposal
network reads all five, the heads the first four (det/configs/itpn: neck=None).

As the official configs: anchors of 8 strides in three ratios; proposals 2000 / 1000; box head of
four convolutions with batch norm and one linear layer; GIoU box loss times 10; mask head of four
convolutions; relative position bias off, drop path by recipe.

What torchvision cannot express, and what stands instead:
* RPN loss L1 -> smooth L1 (beta 1/9); aligned RoIAlign (half a pixel) -> the unaligned one;
* SyncBN -> BatchNorm2d; convert with `nn.SyncBatchNorm.convert_sync_batchnorm`;
* images are padded to multiples of 64, not 32, because torchvision derives the anchors' stride from
  the shape of the level, which must then divide exactly.
Departures, ours: `fpn_depth` is that of pre-training, so no neck weight is dropped (official: 1 of
2 blocks); the LayerNorm epsilon is 1e-6 as in pre-training (official: 1e-5).
"""

# B batch, C image channels, H x W image, F fpn_dim

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from models.feature_maps import detection_levels
from models.itpn import ITPN, create_itpn
from models.roi_heads import BoxLoss, StagedRoIHeads
from models.variants import get_variant

NUM_LEVELS = 5
ANCHOR_SIZES = ((32,), (64,), (128,), (256,), (512,))  # pixels: 8 strides of each level
ASPECT_RATIOS = ((0.5, 1.0, 2.0),) * NUM_LEVELS
SIZE_DIVISIBLE = 64  # pixels, the coarsest stride
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PyramidBackbone(nn.Module):
    """The encoder as torchvision's detectors want a backbone.

    Args:
        encoder: backbone and neck.
        num_levels: levels from stride 4 on, 3 to 5.
    """

    def __init__(self, encoder: ITPN, *, num_levels: int = NUM_LEVELS) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_levels = num_levels
        self.out_channels = encoder.pyramid.fpn_dim

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Levels of a batch.

        Args:
            images: (B, C, H, W), normalised; both sides multiples of the patch size.

        Returns:
            {"0": (B, F, H/4, W/4), "1": (B, F, H/8, W/8), ...}, sizes rounded down.

        Raises:
            ValueError: H or W is not a multiple of the patch size or too small for the levels.
        """
        side = self.encoder.backbone.patch_size
        grid = (images.shape[-2] // side, images.shape[-1] // side)
        levels = detection_levels(self.encoder(images), grid, num_levels=self.num_levels)
        # In the images' precision also under autocast: torchvision lays the anchors out in that of
        # the levels, and bfloat16 knows whole pixels only up to 256.
        return OrderedDict((str(i), x.to(images.dtype)) for i, x in enumerate(levels.values()))


class ITPNDetector(GeneralizedRCNN):
    """Object detector on an iTPN encoder.

    Called as torchvision's detectors: `model(images, targets)` gives a dict of losses in training
    mode, `model(images)` a list of predictions in eval mode. images: list of (C, H, W) floats in
    [0, 1] of any sizes; targets: list of {"boxes": (n, 4) float x1 y1 x2 y2 in pixels, "labels":
    (n,) int64 from 1, "masks": (n, H, W) uint8 where masks are trained}; predictions: {"boxes",
    "labels", "scores": (n,), "masks": (n, 1, H, W) probabilities}, best first.

    Args:
        encoder: backbone and neck.
        num_classes: object classes, without background; labels run from 1 to num_classes.
        with_masks: Mask R-CNN; False for Faster R-CNN.
        cascade: three box stages at IoU 0.5, 0.6, 0.7 instead of one (arXiv:1712.00726).
        box_loss: "giou" times 10 as the official configs, or torchvision's "smooth_l1".
        head_dim: channels of the convolutions of the box and mask heads.
        fc_dim: width of the box head's linear layer.
        min_size: short side in pixels images are resized to; several, one is drawn in training.
        eval_min_size: short side in pixels in eval mode, None for the last of `min_size`.
        max_size: limit of the long side in pixels.
        samples_per_image: regions the box head learns from (official: 512).
        image_mean, image_std: of the channels, in [0, 1] (ImageNet's, as official).

    Raises:
        ValueError: num_classes is less than 1.
    """

    def __init__(
        self,
        encoder: ITPN,
        num_classes: int,
        *,
        with_masks: bool = True,
        cascade: bool = False,
        box_loss: BoxLoss = "giou",
        head_dim: int = 256,
        fc_dim: int = 1024,
        min_size: int | tuple[int, ...] = 800,
        eval_min_size: int | None = None,
        max_size: int = 1333,
        samples_per_image: int = 512,
        image_mean: tuple[float, ...] = IMAGENET_MEAN,
        image_std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be >= 1, without the background")
        backbone = PyramidBackbone(encoder)
        roi_heads = StagedRoIHeads(
            backbone.out_channels,
            num_classes,
            num_stages=3 if cascade else 1,
            with_masks=with_masks,
            box_loss=box_loss,
            head_dim=head_dim,
            fc_dim=fc_dim,
            samples_per_image=samples_per_image,
        )
        min_sizes = min_size if isinstance(min_size, tuple) else (min_size,)
        transform = DetectionTransform(
            (*min_sizes, eval_min_size or min_sizes[-1]),
            max_size,
            list(image_mean),
            list(image_std),
            size_divisible=SIZE_DIVISIBLE,
        )
        super().__init__(backbone, proposal_network(backbone.out_channels), roi_heads, transform)
        self.num_classes = num_classes

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates in timm's form; see `HiViT.group_matcher`."""
        prefix = r"backbone\.encoder\.backbone\."
        return self.backbone.encoder.backbone.group_matcher(coarse, prefix=prefix)

    def no_weight_decay(self) -> set[str]:
        """Names left undecayed besides biases and 1-D tensors: the position tables."""
        names = self.backbone.encoder.backbone.no_weight_decay()
        return {f"backbone.encoder.backbone.{name}" for name in names}


class DetectionTransform(GeneralizedRCNNTransform):
    """torchvision's normalising and resizing, with a size for eval mode that training never draws.

    `min_size` holds the short sides of training and then that of eval mode, which torchvision takes
    from the last place.
    """

    def torch_choice(self, k: list[int]) -> int:
        """Draw a short side for a training image, from torch's generator."""
        return super().torch_choice(k[:-1])


class PreciseRPNHead(RPNHead):
    """torchvision's head, answering in the precision of the levels also under autocast.

    Boxes are decoded in the precision of the deltas; in bfloat16 they would be pixels off.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """levels [(B, F, h, w)] -> objectness [(B, A, h, w)], deltas [(B, 4A, h, w)]."""
        scores, deltas = super().forward(x)
        dtype = x[0].dtype
        return [s.to(dtype) for s in scores], [d.to(dtype) for d in deltas]


def proposal_network(in_channels: int) -> RegionProposalNetwork:
    """RPN with the official numbers: IoU 0.7 / 0.3, 256 anchors an image, NMS 0.7."""
    anchors = AnchorGenerator(ANCHOR_SIZES, ASPECT_RATIOS)
    return RegionProposalNetwork(
        anchors,
        PreciseRPNHead(in_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )


DetectorKind = Literal["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "cascade_rcnn"]


def create_detector(
    name: str,
    *,
    num_classes: int,
    kind: DetectorKind = "mask_rcnn",
    pos_embed_size: int | None = None,
    rel_pos_bias: bool = False,
    drop_path_rate: float = 0.0,
    decomposed_rel_pos: bool = False,
    encoder_kwargs: Mapping[str, Any] = MappingProxyType({}),
    **detector_kwargs: Any,
) -> ITPNDetector:
    """Build a named detector with fresh weights.

    Args:
        name: a key of `models.variants.VARIANTS`.
        num_classes: object classes, without background.
        kind: heads.
        pos_embed_size: side in pixels of the images of pre-training, which the absolute table is
            built for and keeps; None for the variant's own.
        rel_pos_bias: relative position bias (off in the official configs); its tables are those of
            the variant's image size and interpolated for every other.
        drop_path_rate: stochastic depth of the last block (official: 0.05 for 1x, 0.3 for 3x).
        decomposed_rel_pos: ViTDet's decomposed relative positions instead (official CLIP-L
            detector); they fit images of every size.
        encoder_kwargs: passed to `create_itpn`, such as fpn_dim; overrules the others.
        **detector_kwargs: passed to `ITPNDetector`.

    Raises:
        ValueError: unknown name or kind, or a table size that is not a multiple of the patch size.
    """
    known = DetectorKind.__args__  # type: ignore[attr-defined]
    if kind not in known:
        raise ValueError(f"unknown detector '{kind}'. Known: {', '.join(known)}")
    encoder = create_itpn(
        name,
        img_size=get_variant(name).img_size,
        pos_embed_size=pos_embed_size,
        rel_pos_bias=rel_pos_bias,
        **{
            "drop_path_rate": drop_path_rate,
            "decomposed_rel_pos": decomposed_rel_pos,
            **encoder_kwargs,
        },
    )
    return ITPNDetector(
        encoder,
        num_classes,
        with_masks="mask" in kind,
        cascade="cascade" in kind,
        **detector_kwargs,
    )
