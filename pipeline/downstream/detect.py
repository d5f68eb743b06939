"""Detection and instance segmentation: torchvision's losses, COCO's average precision.

Surprising: training pads the images of a micro-batch to one size, but evaluation and prediction
take them one by one. The attention of the backbone sees the padding, so together a score would
depend on how many workers share the images.
"""

# n objects or predictions of an image, H x W image

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from models.detector import create_detector
from pipeline.data import Batch
from pipeline.downstream.batches import good_samples, to_pixels, trained_samples
from pipeline.downstream.coco_ap import CocoScores
from pipeline.downstream.detect_samples import mask_runs, unpack_masks
from pipeline.downstream.prediction_pictures import detection_picture
from pipeline.downstream.samples import Arrays
from pipeline.downstream.scores import Scores
from pipeline.encoder_settings import encoder_kwargs
from pipeline.finetune_config import DetectConfig

_PICTURE_SAMPLES = 8
_MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class DetectTask:
    """Object detection (a `task.DownstreamTask`)."""

    config: DetectConfig
    classes: tuple[str, ...]
    pretrain_size: int | None = None
    """Side in pixels of the images of pre-training; None: the variant's own."""
    main_metric: ClassVar[str] = "val/box_ap"

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The sum, then torchvision's names; Cascade has those of the box head once a stage."""
        detector = self.config.detector
        stages = ("_1", "_2", "_3") if "cascade" in detector.kind else ("",)
        box = [f"loss_{part}{stage}" for stage in stages for part in ("classifier", "box_reg")]
        mask = ["loss_mask"] if detector.with_masks else []
        return ("loss", *box, *mask, "loss_objectness", "loss_rpn_box_reg")

    def build(self) -> nn.Module:
        """The detector, its position table built for the images of pre-training."""
        detector, model = self.config.detector, self.config.model
        return create_detector(
            self.config.model_name,
            num_classes=len(self.classes),
            kind=detector.kind,
            pos_embed_size=self.pretrain_size,
            rel_pos_bias=model.rel_pos_bias,
            decomposed_rel_pos=model.decomposed_rel_pos,
            encoder_kwargs=encoder_kwargs(model),
            box_loss=detector.box_loss,
            head_dim=detector.head_dim,
            fc_dim=detector.fc_dim,
            min_size=detector.min_sizes,
            eval_min_size=detector.eval_min_size,
            max_size=detector.max_size,
            samples_per_image=detector.samples_per_image,
            image_mean=self.config.data.mean,
            image_std=self.config.data.std,
        )

    def losses(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """See `DownstreamTask.losses`. An image without objects is all background."""
        samples, weight = trained_samples(batch)
        images = [to_pixels(sample["image"], device) for sample in samples]
        by_name = model(images, [self._training_target(sample, device) for sample in samples])
        parts = torch.stack([by_name[name].float() for name in self.loss_names[1:]])
        return weight * torch.cat([parts.sum().view(1), parts])

    def new_scores(self) -> CocoScores:
        """Empty scores."""
        return CocoScores(list(self.classes), self.config.detector.with_masks)

    def score(self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores) -> None:
        """See `DownstreamTask.score`."""
        assert isinstance(scores, CocoScores), f"{type(scores).__name__} are not of this task"
        rows = [int(row) for row, bad in zip(batch["row"], batch["bad"], strict=True) if not bad]
        for row, sample in zip(rows, good_samples(batch), strict=True):
            height, width = sample["image"].shape[:2]
            prediction = detections(model, sample["image"], device)
            scores.add(row, (height, width), prediction, evaluation_target(sample))

    def pictures(
        self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores
    ) -> dict[str, bytes]:
        """See `DownstreamTask.pictures`; detection has no confusion matrix."""
        samples = good_samples(batch)[:_PICTURE_SAMPLES]
        if not samples:
            return {}
        picture = detection_picture(
            [sample["image"] for sample in samples],
            [detections(model, sample["image"], device) for sample in samples],
            [evaluation_target(sample) for sample in samples],
            list(self.classes),
        )
        return {"predictions": picture}

    def predict(
        self, model: nn.Module, images: list[NDArray[np.uint8]], device: torch.device
    ) -> list[dict[str, Any]]:
        """See `DownstreamTask.predict`: at most 100 objects an image, best first."""
        predictions = []
        for image in images:
            found = {key: values.cpu() for key, values in detections(model, image, device).items()}
            prediction: dict[str, Any] = {
                "boxes": found["boxes"].numpy(),
                "labels": found["labels"].numpy() - 1,  # 0 is the detector's background
                "scores": found["scores"].numpy(),
            }
            if "masks" in found:
                prediction["masks"] = _run_lengths(found["masks"])
            predictions.append(prediction)
        return predictions

    def _training_target(self, sample: Arrays, device: torch.device) -> dict[str, Tensor]:
        target = {key: torch.tensor(sample[key]).to(device) for key in ("boxes", "labels")}
        if self.config.detector.with_masks:
            height, width = sample["image"].shape[:2]
            target["masks"] = torch.tensor(unpack_masks(sample, (height, width))).to(device)
        return target


@torch.no_grad()
def detections(
    model: nn.Module, image: NDArray[np.uint8], device: torch.device
) -> dict[str, Tensor]:
    """What a detector in eval mode finds in an image (H, W, 3), in pixels of that image."""
    assert not model.training, "a detector in training mode returns losses; call model.eval()"
    found: dict[str, Tensor] = model([to_pixels(image, device)])[0]
    return found


def evaluation_target(sample: Arrays) -> dict[str, Any]:
    """The objects of a validation sample as `CocoScores.add` takes them."""
    target: dict[str, Any] = {
        key: torch.tensor(sample[key]) for key in ("boxes", "labels", "is_crowd")
    }
    if "mask_lengths" in sample:
        target["masks"] = mask_runs(sample)
    return target


def _run_lengths(masks: Tensor) -> list[bytes]:
    """Probabilities (n, 1, H, W) -> COCO's compressed run lengths of each mask."""
    pixels = (masks[:, 0] > _MASK_THRESHOLD).byte().numpy()
    return [bytes(coco_mask.encode(np.asfortranarray(mask))["counts"]) for mask in pixels]
