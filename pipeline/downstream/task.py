"""What the fine-tuning loop asks of a task; `classify.py`, `detect.py`, `segment.py` answer.

A task owns no state: models and scores are handed in. Everything random in it (mixup, erasing,
dropout, drop path, region sampling) comes from torch's and numpy's global generators, which the
loop seeds anew for every micro-batch; so a resumed run draws the same numbers.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data import Batch
from pipeline.downstream.scores import Scores
from pipeline.finetune_config import FinetuneConfig


class DownstreamTask(Protocol):
    """One task with the classes of its data."""

    @property
    def config(self) -> FinetuneConfig:
        """The run."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        ...

    @property
    def main_metric(self) -> str:
        """The key of `Scores.result` that sums the task up."""
        ...

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of what `losses` returns; the first is `loss`, the sum that is trained."""
        ...

    def build(self) -> nn.Module:
        """The model with fresh weights."""
        ...

    def losses(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Losses of a training micro-batch, with graph.

        Args:
            model: of `build`, in training mode, perhaps wrapped for data parallelism: called once.
            batch: as the training maker yields it.
            device: where the model is.

        Returns:
            (len(loss_names),): sums over the good samples divided by the size of the micro-batch,
            bad ones weigh 0. A micro-batch of bad samples alone gives zeros that reach every
            trained parameter.
        """
        ...

    def new_scores(self) -> Scores:
        """Empty scores."""
        ...

    def score(self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores) -> None:
        """Add the predictions for a validation micro-batch; bad samples are passed over.

        Args:
            model: not wrapped, in eval mode.
            batch: as the evaluation maker yields it; `row` names the samples.
            device: where the model is.
            scores: of `new_scores`.
        """
        ...

    def pictures(
        self, model: nn.Module, batch: Batch, device: torch.device, scores: Scores
    ) -> dict[str, bytes]:
        """PNGs by name (`predictions`, `confusion`): of a validation micro-batch, of all scores."""
        ...

    def predict(
        self, model: nn.Module, images: list[NDArray[np.uint8]], device: torch.device
    ) -> list[dict[str, Any]]:
        """Predictions for whole images.

        Args:
            model: in eval mode.
            images: (H, W, 3) uint8 of any sizes.
            device: where the model is.

        Returns:
            One dict an image, of plain numbers and arrays in the frame of the image: label, score,
            scores (K,) for classification; boxes (n, 4), labels (n,) from 0, scores (n,) and
            masks, COCO compressed run lengths, for detection; mask (H, W) uint8 of class ids for
            segmentation.
        """
        ...
