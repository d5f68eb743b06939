"""Top-1, top-5 and cross-entropy of a classifier.

Surprising: classes with equal logits rank in the order of their numbers, and NaN ranks last. So a
constant classifier scores what its first classes are worth, and one that diverged no more than it;
comparing NaN without care would give it 100 %.
"""

# B batch, K classes

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.downstream.scores import by_class, check_labels, count_pairs, percent


class ClassificationScores:
    """Label, prediction, rank of the true class and loss of every sample.

    Args:
        classes: names, in the order of the logits.
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes = list(classes)
        self._batches: list[dict[str, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, K), labels (B,) integers in 0 ... K-1.

        Raises:
            ValueError: a label outside the classes, or logits of another number of classes.
        """
        num_classes = len(self.classes)
        if logits.shape != (len(labels), num_classes):
            raise ValueError(
                f"logits of {len(labels)} samples have shape {tuple(logits.shape)}, not "
                f"({len(labels)}, {num_classes}); give the model num_classes={num_classes}"
            )
        logits, labels = logits.detach().cpu().double(), labels.cpu()
        check_labels(labels, 0, num_classes - 1, "target")
        labels = labels.long()
        ordered = torch.where(logits.isnan(), -math.inf, logits)
        own = ordered.gather(1, labels[:, None])  # (B, 1)
        is_before = torch.arange(num_classes) < labels[:, None]
        is_ahead = (ordered > own) | (ordered == own) & is_before  # (B, K)
        self._batches.append(
            {
                "labels": labels,
                "predicted": ordered.argmax(1),  # the first of equals
                "ranks": is_ahead.sum(1),
                "losses": F.cross_entropy(logits, labels, reduction="none"),
            }
        )

    def state(self) -> dict[str, Any]:
        """One value a sample (N,): labels, predicted and ranks int64, losses float64."""
        nothing = torch.zeros(0, dtype=torch.int64)
        empty = {"labels": nothing, "predicted": nothing, "ranks": nothing}
        batches = [empty | {"losses": nothing.double()}, *self._batches]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Replace the own content by the union of all workers' states."""
        self._batches = list(states)

    @property
    def confusion(self) -> Tensor:
        """(K, K) int64, rows = true class, columns = predicted class."""
        samples = self.state()
        return count_pairs(samples["labels"], samples["predicted"], len(self.classes))

    def result(self) -> dict[str, float]:
        """val/top1 and, of more than five classes, val/top5 in percent; val/loss, the mean
        cross-entropy without label smoothing.
        """
        samples = self.state()
        ranks, losses = samples["ranks"], samples["losses"]
        if len(ranks) == 0:
            return {}
        metrics = {"val/top1": 100 * int((ranks < 1).sum()) / len(ranks)}
        if len(self.classes) > 5:
            metrics["val/top5"] = 100 * int((ranks < 5).sum()) / len(ranks)
        # fsum rounds once, at the end: the order of the samples cannot matter.
        metrics["val/loss"] = math.fsum(losses.tolist()) / len(losses)
        return metrics

    def per_class(self) -> dict[str, float]:
        """Top-1 in percent over the samples of each class that has any."""
        confusion = self.confusion
        return by_class(self.classes, percent(confusion.diag(), confusion.sum(1)).tolist())
