"""Micro-batches as tensors: which samples count, and their pixels on the device.

Surprising: bad samples are taken out before the forward pass, so that neither a batch norm nor
mixup sees them, and the losses are scaled by the share that is left. Only a micro-batch without a
good sample goes through the model, with weight 0: workers in parallel wait for its gradients.
"""

# B batch, S side of the crops

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import SampleConfig
from pipeline.data import Batch
from pipeline.downstream.samples import Arrays, unpack


def good_samples(batch: Batch) -> list[Arrays]:
    """The samples that could be read, in order."""
    return [sample for sample, bad in zip(unpack(batch), batch["bad"], strict=True) if not bad]


def trained_samples(batch: Batch, *, fewest: int = 1) -> tuple[list[Arrays], float]:
    """The samples of a training micro-batch that go through the model, and their losses' weight.

    Args:
        batch: a micro-batch.
        fewest: good samples below which the blank ones go through the model too.

    Returns:
        Samples; share of good ones in the micro-batch, 0 if there are none.
    """
    good = good_samples(batch)
    return good if len(good) >= fewest else unpack(batch), len(good) / len(batch["bad"])


def to_pixels(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float in [0, 1] on the device."""
    pixels = torch.tensor(image).to(device, non_blocking=True)
    return pixels.permute(2, 0, 1).float().div(255)


def normalize(pixels: Tensor, data: SampleConfig) -> Tensor:
    """Pixels (..., 3, H, W) in [0, 1] -> the same with the means and deviations of `data`."""
    mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    return (pixels - mean) / std
