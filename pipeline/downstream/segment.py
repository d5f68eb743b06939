"""Semantic segmentation: cross-entropy of two heads on distorted crops; mean IoU.

Surprising: the batch norm of the head needs two images. With fewer than two good samples in a
micro-batch, the blank ones go through the model too: without weight in the loss, but seen by the
batch norm and its running statistics.
"""

# B batch, S side of the crops, K classes, h x w resized image, H x W original image

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomPhotometricDistort

from models.segmenter import (
    IGNORE_INDEX,
    ITPNSegmenter,
    SegmentationLogits,
    create_segmenter,
    segmentation_loss,
)
from pipeline.data import Batch
from pipeline.downstream.batches import good_samples, normalize, to_pixels, trained_samples
from pipeline.downstream.mean_iou import SegmentationScores
from pipeline.downstream.prediction_pictures import confusion_picture, segmentation_picture
from pipeline.downstream.samples import Arrays
from pipeline.downstream.scores import Scores
from pipeline.downstream.segment_samples import rescaled
from pipeline.encoder_settings import encoder_kwargs
from pipeline.finetune_config import SegmentConfig
from pipeline.transforms import resize

_FEWEST_IMAGES = 2  # for the batch norm after pooling to 1x1
_PICTURE_SAMPLES = 8


@dataclass(frozen=True)
class SegmentTask:
    """Semantic segmentation (a `task.DownstreamTask`)."""

    config: SegmentConfig
    classes: tuple[str, ...]
    pretrain_size: int | None = None
    """Side in pixels of the images of pre-training; None: the variant's own."""
    main_metric: ClassVar[str] = "val/miou"
    loss_names: ClassVar[tuple[str, ...]] = ("loss", "loss_seg", "loss_aux")

    def build(self) -> nn.Module:
        """The segmenter, its position table built for the images of pre-training."""
        return create_segmenter(
            self.config.model_name,
            num_classes=len(self.classes),
            img_size=self.config.data.image_size,
            pos_embed_size=self.pretrain_size,
            channels=self.config.segmenter.channels,
            rel_pos_bias=self.config.model.rel_pos_bias,
            decomposed_rel_pos=self.config.model.decomposed_rel_pos,
            **encoder_kwargs(self.config.model),
        )

    def losses(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """See `DownstreamTask.losses`. The mean over the labelled pixels of the good samples, times
        the share of good samples.
        """
        samples, weight = trained_samples(batch, fewest=_FEWEST_IMAGES)
        images = self._training_images(samples, device)
        targets = torch.from_numpy(np.stack([sample["target"] for sample in samples]))
        if len(samples) == len(batch["bad"]):  # blank ones may be among them
            targets[torch.from_numpy(batch["bad"] != "")] = IGNORE_INDEX
        logits = model(images)
        parts = segmentation_loss(
            SegmentationLogits(logits.main.float(), logits.auxiliary.float()),
            targets.to(device).long(),
        )
        main, auxiliary = parts["loss_seg"], parts["loss_aux"]
        return weight * torch.stack([main + auxiliary, main, auxiliary])

    def new_scores(self) -> SegmentationScores:
        """Empty scores."""
        return SegmentationScores(list(self.classes))

    def score(self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores) -> None:
        """See `DownstreamTask.score`; predictions are compared in the size of the target."""
        assert isinstance(scores, SegmentationScores), f"{type(scores).__name__} are not mine"
        for sample in good_samples(batch):
            scores.add(self._predicted(model, sample, device), torch.tensor(sample["target"]))

    def pictures(
        self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores
    ) -> dict[str, bytes]:
        """See `DownstreamTask.pictures`."""
        assert isinstance(scores, SegmentationScores), f"{type(scores).__name__} are not mine"
        pictures = {"confusion": confusion_picture(scores.confusion, list(self.classes))}
        if samples := good_samples(batch)[:_PICTURE_SAMPLES]:
            pictures["predictions"] = segmentation_picture(
                [sample["image"] for sample in samples],
                [self._predicted(model, sample, device) for sample in samples],
                [torch.tensor(sample["target"]) for sample in samples],
                list(self.classes),
            )
        return pictures

    def predict(
        self, model: nn.Module, images: list[NDArray[np.uint8]], device: torch.device
    ) -> list[dict[str, Any]]:
        """See `DownstreamTask.predict`."""
        masks = [
            self._labels(model, self._evaluated(image), image.shape[:2], device) for image in images
        ]
        return [{"mask": mask.cpu().numpy()} for mask in masks]

    def _evaluated(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image (H, W, 3) in the size of evaluation, (h, w, 3)."""
        short_side = self.config.segmenter.eval_short_side
        height, width = image.shape[:2]
        return resize(image, *rescaled((width, height), short_side)) if short_side else image

    def _training_images(self, samples: list[Arrays], device: torch.device) -> Tensor:
        """(B, 3, S, S), distorted one by one, normalised."""
        images = [to_pixels(sample["image"], device) for sample in samples]
        if self.config.segmenter.photometric:
            distort = RandomPhotometricDistort()
            images = [distort(image) for image in images]
        return normalize(torch.stack(images), self.config.data)

    def _predicted(self, model: nn.Module, sample: Arrays, device: torch.device) -> Tensor:
        """(H, W) labels of a validation sample, in the size of its target."""
        height, width = sample["target"].shape
        return self._labels(model, sample["image"], (height, width), device)

    @torch.no_grad()
    def _labels(
        self,
        model: nn.Module,
        image: NDArray[np.uint8],
        size: tuple[int, int],
        device: torch.device,
    ) -> Tensor:
        """Labels (H, W) uint8 of an image (h, w, 3), its logits resized to `size` first, as mmseg
        does.
        """
        assert isinstance(model, ITPNSegmenter), f"{type(model).__name__} cannot slide a window"
        pixels = normalize(to_pixels(image, device), self.config.data)[None]
        window, stride = self.config.segmenter.window or None, self.config.segmenter.stride
        logits = model.predict(pixels, window=window, stride=stride)
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
        return logits[0].argmax(0).byte()
