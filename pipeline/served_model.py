"""A trained model as MLflow keeps it: uint8 images in, answers out.

Surprising: the model is exported (torch.export), not pickled. So it loads without our code and
without trusting anyone, by `mlflow.pytorch.load_model` as a module and as a pyfunc, and takes whole
batches of uint8 images; normalisation is part of the graph. A detector's control flow depends on
what it finds, which torch.export refuses: a detector is left to `jobs/predict.py`.
"""

# B batch, H x W image, K classes, D embed dim

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.itpn import ITPN
from models.segmenter import ITPNSegmenter

_EXAMPLES = 2  # torch.export takes a batch of 1 for a constant
_TALKATIVE = ("models.model", "utils.requirements_utils")
"""They warn that images make no JSON to serve, and of "+cu132" behind a version."""


class ServedModel(nn.Module):
    """Images in, answers out: images that were cut as for evaluation, of the recipe's size.

    Args:
        model: a classifier, a segmenter or an encoder.
        mean, std: channel means and deviations in [0, 1].
    """

    def __init__(
        self, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = model
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        """images (B, H, W, 3) uint8, RGB -> probabilities (B, K) of a classifier, labels (B, H, W)
        uint8 of a segmenter, mean features (B, D) of stage 16 of an encoder."""
        pixels = images.permute(0, 3, 1, 2).float().div(255)
        mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        pixels = (pixels - mean) / std
        if isinstance(self.model, ITPNSegmenter):
            return self.model.predict(pixels).argmax(1).to(torch.uint8)
        if isinstance(self.model, ITPN):
            return self.model.backbone(pixels)[16].mean((1, 2, 3))
        return self.model(pixels).softmax(1)


def serving_arguments(
    served: ServedModel, *, image_size: int, classes: tuple[str, ...]
) -> dict[str, Any]:
    """What `mlflow.pytorch.log_model` and `save_model` are told beside the model."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    example = np.zeros((_EXAMPLES, image_size, image_size, 3), np.uint8)
    with torch.no_grad():
        answer = served(torch.from_numpy(example)).numpy()
    shape, release = (-1, *answer.shape[1:]), torch.__version__.split("+")[0]
    return {
        "signature": ModelSignature(
            Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]))]),
            Schema([TensorSpec(answer.dtype, shape)]),
        ),
        "input_example": example,
        "serialization_format": "pt2",
        "pip_requirements": [f"torch=={release}", f"mlflow=={mlflow.__version__}", "numpy"],
        "metadata": {"classes": list(classes)},
    }


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Without the warnings MLflow has for every model of images."""
    loggers = [logging.getLogger(f"mlflow.{name}") for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
