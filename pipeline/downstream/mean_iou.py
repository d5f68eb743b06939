"""Intersection over union of a segmenter, as mmsegmentation counts it.

Pixels of all images are counted together, then compared class by class. Surprising: a class that
has no pixel in the truth still counts as 0 in the mIoU once it is predicted anywhere, but never in
the mean accuracy (mmseg/evaluation/metrics/iou_metric.py).
"""

# K classes

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.downstream.scores import by_class, check_labels, count_pairs, percent

IGNORED = 255
"""Target label of pixels that count nowhere."""


class SegmentationScores:
    """Pixels of each true and each predicted class.

    Args:
        classes: names, in the order of the labels.

    Raises:
        ValueError: so many classes that 255 would be one.
    """

    def __init__(self, classes: list[str]) -> None:
        if len(classes) > IGNORED:
            raise ValueError(
                f"{len(classes)} classes, but label {IGNORED} is for ignored pixels; "
                f"use at most {IGNORED} classes"
            )
        self.classes = list(classes)
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        """(K, K), rows = true class, columns = predicted class."""

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Add an image or a batch of one size.

        Args:
            predicted: (H, W) or (B, H, W) integers in 0 ... K-1.
            target: of the same shape, 255 = ignored.

        Raises:
            ValueError: a label outside the classes.
        """
        assert predicted.shape == target.shape, (
            f"a prediction of shape {tuple(predicted.shape)} for a target of {tuple(target.shape)}"
        )
        target = target.to(predicted.device)
        is_counted = target != IGNORED
        true = target[is_counted]
        check_labels(true, 0, len(self.classes) - 1, "target")
        check_labels(predicted, 0, len(self.classes) - 1, "predicted")
        self.confusion += count_pairs(true, predicted[is_counted], len(self.classes))

    def state(self) -> dict[str, Any]:
        """The confusion matrix (K, K) int64."""
        return {"confusion": self.confusion.clone()}

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Replace the own content by the union of all workers' states."""
        self.confusion = torch.zeros_like(self.confusion)
        for state in states:
            self.confusion += state["confusion"]

    def result(self) -> dict[str, float]:
        """In percent: val/miou over the classes that appear in the truth or in predictions,
        val/macc over those in the truth, val/pixel_acc over all pixels.
        """
        if not self.confusion.any():
            return {}
        hit = self.confusion.diag()
        return {
            "val/miou": float(self._iou().nanmean()),
            "val/macc": float(percent(hit, self.confusion.sum(1)).nanmean()),
            "val/pixel_acc": float(percent(hit.sum(), self.confusion.sum())),
        }

    def per_class(self) -> dict[str, float]:
        """IoU in percent of each class that appears in the truth or in predictions."""
        return by_class(self.classes, self._iou().tolist())

    def _iou(self) -> Tensor:
        hit = self.confusion.diag()
        return percent(hit, self.confusion.sum(0) + self.confusion.sum(1) - hit)
