"""Classification: cross-entropy with erasing, mixup and label smoothing; top-1.

Surprising: mixup draws once for a whole micro-batch (timm's batch mode, as official fine-tuning),
so the size of micro-batches decides how many different mixtures a step sees.
"""

# B batch, S side of the crops, K classes

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from timm.data import Mixup
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomErasing

from models.classifier import create_classifier
from pipeline.data import Batch
from pipeline.downstream.accuracy import ClassificationScores
from pipeline.downstream.batches import good_samples, normalize, to_pixels, trained_samples
from pipeline.downstream.classify_samples import ClassifySamples
from pipeline.downstream.prediction_pictures import classification_picture, confusion_picture
from pipeline.downstream.samples import Arrays
from pipeline.downstream.scores import Scores
from pipeline.encoder_settings import encoder_kwargs
from pipeline.finetune_config import AugmentConfig, ClassifyConfig
from pipeline.reading import Sample

_ERASED_AREA = (0.02, 1 / 3)  # shares of the image, as timm
_ERASED_RATIO = (0.3, 1 / 0.3)  # height / width, as timm
_PICTURE_SAMPLES = 24


@dataclass(frozen=True)
class ClassifyTask:
    """Image classification (a `task.DownstreamTask`)."""

    config: ClassifyConfig
    classes: tuple[str, ...]
    main_metric: ClassVar[str] = "val/top1"
    loss_names: ClassVar[tuple[str, ...]] = ("loss",)

    def build(self) -> nn.Module:
        """The classifier, its position tables built for the size of the crops."""
        return create_classifier(
            self.config.model_name,
            num_classes=len(self.classes),
            img_size=self.config.data.image_size,
            rel_pos_bias=self.config.model.rel_pos_bias,
            decomposed_rel_pos=self.config.model.decomposed_rel_pos,
            **encoder_kwargs(self.config.model),
        )

    def losses(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """See `DownstreamTask.losses`. Images are erased one by one and then mixed, as in timm."""
        samples, weight = trained_samples(batch)
        images, labels = self._images(samples, device), _labels(samples).to(device)
        augment = self.config.augment
        if augment.erase_prob:
            images = erased(images, augment.erase_prob)
        targets = labels
        if augment.mixup or augment.cutmix:
            images, targets = mixed(images, labels, augment, num_classes=len(self.classes))
        logits = model(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=augment.label_smoothing)
        return (weight * loss).view(1)

    def new_scores(self) -> ClassificationScores:
        """Empty scores."""
        return ClassificationScores(list(self.classes))

    def score(self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores) -> None:
        """See `DownstreamTask.score`."""
        assert isinstance(scores, ClassificationScores), f"{type(scores).__name__} are not mine"
        if samples := good_samples(batch):
            scores.add(self._logits(model, self._images(samples, device)), _labels(samples))

    def pictures(
        self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores
    ) -> dict[str, bytes]:
        """See `DownstreamTask.pictures`."""
        assert isinstance(scores, ClassificationScores), f"{type(scores).__name__} are not mine"
        pictures = {"confusion": confusion_picture(scores.confusion, list(self.classes))}
        if samples := good_samples(batch)[:_PICTURE_SAMPLES]:
            probability, best = self._logits(model, self._images(samples, device)).softmax(1).max(1)
            names = [self.classes[k] for k in best.tolist()]
            pictures["predictions"] = classification_picture(
                torch.from_numpy(np.stack([sample["image"] for sample in samples])),
                list(zip(names, probability.tolist(), strict=True)),
                [self.classes[k] for k in _labels(samples).tolist()],
            )
        return pictures

    def predict(
        self, model: nn.Module, images: list[NDArray[np.uint8]], device: torch.device
    ) -> list[dict[str, Any]]:
        """See `DownstreamTask.predict`: label, score and scores (K,), probabilities."""
        predictions: list[dict[str, Any]] = []
        size = self.config.batch_size_per_worker
        for first in range(0, len(images), size):
            part = [{"image": self._evaluated(image)} for image in images[first : first + size]]
            for scores in self._logits(model, self._images(part, device)).softmax(1).cpu().numpy():
                label = int(scores.argmax())
                predictions.append(
                    {"label": label, "score": float(scores[label]), "scores": scores}
                )
        return predictions

    @torch.no_grad()
    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images).float()

    def _evaluated(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The middle (S, S, 3) of an image (H, W, 3). It goes through a lossless file, so that the
        rule of evaluation stands in one place.
        """
        file = io.BytesIO()
        Image.fromarray(image).save(file, "BMP")
        sample = Sample(0, file.getvalue(), {"label": 0})
        middle = ClassifySamples(self.config, len(self.classes)).evaluate(sample)["image"]
        return middle

    def _images(self, samples: list[Arrays], device: torch.device) -> Tensor:
        """(B, 3, S, S), normalised."""
        pixels = torch.stack([to_pixels(sample["image"], device) for sample in samples])
        return normalize(pixels, self.config.data)


def erased(images: Tensor, prob: float) -> Tensor:
    """Images (B, 3, S, S), each with a random rectangle of normal noise with a probability."""
    erase = RandomErasing(prob, _ERASED_AREA, _ERASED_RATIO, value="random")
    return torch.stack([erase(image) for image in images])


def mixed(
    images: Tensor, labels: Tensor, augment: AugmentConfig, *, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of each image with the one at its mirrored place in the batch.

    timm wants an even number. Of an odd one, the image in the middle is its own partner: it enters
    twice, and one of the two, unchanged both, is taken out again.

    Args:
        images: (B, 3, S, S), normalised.
        labels: (B,) int64.
        augment: alphas and probabilities. Smoothing is left to the loss, where it is the same.
        num_classes: K.

    Returns:
        images (B, 3, S, S), probabilities (B, K).
    """
    mix = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=0.0,
        num_classes=num_classes,
    )
    if len(images) % 2 == 0:
        images, targets = mix(images.clone(), labels)
        return images, targets
    count = len(images)
    middle = count // 2
    places = [*range(middle + 1), *range(middle, count)]
    images, targets = mix(images[places], labels[places])
    kept = [i for i in range(count + 1) if i != middle]
    return images[kept], targets[kept]


def _labels(samples: list[Arrays]) -> Tensor:
    return torch.tensor([sample["label"].item() for sample in samples])
