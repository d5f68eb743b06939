"""StagedRoIHeads: box heads in one stage (Faster / Mask R-CNN) or three (Cascade), and a mask head.

Each stage is a stock torchvision `RoIHeads` used for its parts: matching, sampling, pooling, box
head, final suppression. What is ours is the passing of refined boxes from stage to stage and the
GIoU loss. The surprising fact: with one stage and the smooth L1 loss this *is* torchvision's Mask
R-CNN head, number for number (tests/models/test_detector.py).

Cascade R-CNN is arXiv:1712.00726: IoU 0.5, 0.6, 0.7; boxes refined by one stage are the proposals
of the next; class-agnostic boxes; losses weighted 1, 0.5, 0.25; scores averaged over the stages.
Departure from the official cascade config: one mask head, on the last stage's boxes, not three.
"""

# R regions of a batch, K classes with background, F channels of a level

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.ops import (
    MultiScaleRoIAlign,
    clip_boxes_to_image,
    generalized_box_iou_loss,
)
from torchvision.ops.poolers import initLevelMapper

BoxLoss = Literal["giou", "smooth_l1"]
GIOU_WEIGHT = 10.0
STAGE_IOUS = (0.5, 0.6, 0.7)
STAGE_LOSS_WEIGHTS = (1.0, 0.5, 0.25)
STAGE_BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LEVELS = ["0", "1", "2", "3"]  # strides 4 to 32
Targets = list[dict[str, Tensor]]
Detections = list[dict[str, Tensor]]


def region_pooling(output_size: int) -> MultiScaleRoIAlign:
    """RoIAlign over strides 4 to 32.

    Left alone, torchvision infers the strides from the first image it sees and keeps them; of a
    narrow one, whose coarse levels were rounded down, it infers others.
    """
    pooling = MultiScaleRoIAlign(LEVELS, output_size=output_size, sampling_ratio=0)
    pooling.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pooling.map_levels = initLevelMapper(
        2, 5, canonical_scale=pooling.canonical_scale, canonical_level=pooling.canonical_level
    )
    return pooling


class StagedRoIHeads(nn.Module):
    """Second half of a two-stage detector.

    Args:
        in_channels: channels F of the levels.
        num_classes: object classes, without background.
        num_stages: 1, or 3 for Cascade.
        with_masks: build a mask head.
        box_loss: "giou" times 10, or "smooth_l1".
        head_dim: channels of the convolutions of the box and mask heads.
        fc_dim: width of the box heads' linear layer.
        samples_per_image: regions a stage learns from, a quarter of them objects.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_stages: int = 1,
        with_masks: bool = True,
        box_loss: BoxLoss = "giou",
        head_dim: int = 256,
        fc_dim: int = 1024,
        samples_per_image: int = 512,
    ) -> None:
        super().__init__()
        assert 1 <= num_stages <= len(STAGE_IOUS), f"num_stages={num_stages} is not 1 to 3"
        self.box_loss: BoxLoss = box_loss
        self.num_outputs = num_classes + 1  # class 0 is the background

        def stage(i: int) -> RoIHeads:
            predictor = FastRCNNPredictor(fc_dim, self.num_outputs)
            if num_stages > 1:  # one box for all classes
                predictor.bbox_pred = nn.Linear(fc_dim, 4)
            return RoIHeads(
                # sampling_ratio 0: as many points as the region has cells, as the official configs
                region_pooling(7),
                FastRCNNConvFCHead(
                    (in_channels, 7, 7), [head_dim] * 4, [fc_dim], norm_layer=nn.BatchNorm2d
                ),
                predictor,
                fg_iou_thresh=STAGE_IOUS[i],
                bg_iou_thresh=STAGE_IOUS[i],
                batch_size_per_image=samples_per_image,
                positive_fraction=0.25,
                bbox_reg_weights=STAGE_BOX_WEIGHTS[i],
                score_thresh=0.05,
                nms_thresh=0.5,
                detections_per_img=100,
            )

        self.stages = nn.ModuleList(stage(i) for i in range(num_stages))
        self.mask_roi_pool: MultiScaleRoIAlign | None = None
        self.mask_head: MaskRCNNHeads | None = None
        self.mask_predictor: MaskRCNNPredictor | None = None
        if with_masks:
            self.mask_roi_pool = region_pooling(14)
            self.mask_head = MaskRCNNHeads(in_channels, [head_dim] * 4, 1)
            self.mask_predictor = MaskRCNNPredictor(head_dim, head_dim, self.num_outputs)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Detections, dict[str, Tensor]]:
        """Detections in eval mode, losses in training mode; the other one is empty.

        Args:
            features: {"0": (B, F, H/4, W/4), ...}.
            proposals: per image (n, 4), x1 y1 x2 y2 in pixels of the resized image.
            image_shapes: (height, width) of the images without padding.
            targets: per image boxes (n, 4), labels (n,) from 1 and, with masks, masks (n, H, W).

        Raises:
            ValueError: targets are missing in training, or a key of them, masks included.
        """
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        if targets is None or (
            self.mask_head is not None and not all("masks" in target for target in targets)
        ):
            raise ValueError("training needs targets, with 'masks' for a detector with masks")
        return [], self._losses(features, proposals, image_shapes, targets)

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        stages: list[RoIHeads] = list(self.stages)
        for i, stage in enumerate(stages):
            proposals, matched, labels, box_targets = stage.select_training_samples(
                proposals, targets
            )
            scores, boxes = self._predict(stage, features, proposals, image_shapes)
            loss_class, loss_box = fastrcnn_loss(scores, boxes, labels, box_targets)
            if self.box_loss == "giou":
                loss_box = giou_box_loss(stage, boxes, proposals, labels, box_targets)
            suffix = f"_{i + 1}" if len(stages) > 1 else ""
            losses[f"loss_classifier{suffix}"] = STAGE_LOSS_WEIGHTS[i] * loss_class
            losses[f"loss_box_reg{suffix}"] = STAGE_LOSS_WEIGHTS[i] * loss_box
            if i + 1 < len(stages):
                proposals = self._refine(stage, boxes.detach(), proposals, image_shapes)
        if self.mask_head is not None:
            objects = [torch.where(label > 0)[0] for label in labels]
            regions = [boxes[keep] for boxes, keep in zip(proposals, objects, strict=True)]
            matched = [index[keep] for index, keep in zip(matched, objects, strict=True)]
            losses["loss_mask"] = maskrcnn_loss(
                self._mask_logits(features, regions, image_shapes),
                regions,
                [t["masks"] for t in targets],
                [t["labels"] for t in targets],
                matched,
            )
        return losses

    def _detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Detections:
        stages: list[RoIHeads] = list(self.stages)
        probabilities = []
        for i, stage in enumerate(stages):
            scores, boxes = self._predict(stage, features, proposals, image_shapes)
            probabilities.append(F.softmax(scores, dim=-1))
            if i + 1 < len(stages):
                proposals = self._refine(stage, boxes, proposals, image_shapes)
        # The stock suppression takes logits: the softmax of log p is p.
        mean_scores = torch.stack(probabilities).mean(dim=0).clamp(min=1e-12).log()
        detections = stages[-1].postprocess_detections(mean_scores, boxes, proposals, image_shapes)
        result = [
            {"boxes": boxes, "labels": labels, "scores": scores}
            for boxes, scores, labels in zip(*detections, strict=True)
        ]
        if self.mask_head is not None:
            logits = self._mask_logits(features, [r["boxes"] for r in result], image_shapes)
            masks = maskrcnn_inference(logits, [r["labels"] for r in result])
            for r, mask in zip(result, masks, strict=True):
                r["masks"] = mask
        return result

    def _predict(
        self,
        stage: RoIHeads,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """Class logits (R, K) and box deltas (R, K*4); one box for all classes is repeated.

        In the precision of the proposals also under autocast, see `PreciseRPNHead`.
        """
        x = stage.box_head(stage.box_roi_pool(features, proposals, image_shapes))
        scores, boxes = (y.to(proposals[0].dtype) for y in stage.box_predictor(x))
        if boxes.shape[1] == 4:
            boxes = boxes.repeat(1, self.num_outputs)
        return scores, boxes

    def _refine(
        self,
        stage: RoIHeads,
        boxes: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """Boxes of a stage as proposals of the next, clipped to their images."""
        decoded = stage.box_coder.decode(boxes, proposals)[:, 0]  # (R, 4), the same for all classes
        parts = decoded.split([len(p) for p in proposals])
        return [clip_boxes_to_image(b, size) for b, size in zip(parts, image_shapes, strict=True)]

    def _mask_logits(
        self,
        features: dict[str, Tensor],
        regions: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        assert self.mask_roi_pool is not None and self.mask_head is not None
        assert self.mask_predictor is not None
        x = self.mask_roi_pool(features, regions, image_shapes)
        return self.mask_predictor(self.mask_head(x))  # (R, K, 28, 28)


def giou_box_loss(
    stage: RoIHeads,
    boxes: Tensor,
    proposals: list[Tensor],
    labels: list[Tensor],
    box_targets: list[Tensor],
) -> Tensor:
    """10 * (1 - GIoU) of the decoded boxes, summed over objects, per sampled region.

    Args:
        stage: whose coder decodes.
        boxes: (R, K*4) deltas.
        proposals: per image (n, 4).
        labels: per image (n,), 0 for background.
        box_targets: per image (n, 4) deltas that lead to the matched boxes.
    """
    label = torch.cat(labels)
    objects = torch.where(label > 0)[0]
    regions = torch.cat(proposals)[objects]
    deltas = boxes.reshape(len(label), -1, 4)[objects, label[objects]]  # (objects, 4)
    predicted = stage.box_coder.decode_single(deltas, regions)
    wanted = stage.box_coder.decode_single(torch.cat(box_targets)[objects], regions)
    loss = generalized_box_iou_loss(predicted, wanted, reduction="sum")
    return GIOU_WEIGHT * loss / label.numel()
