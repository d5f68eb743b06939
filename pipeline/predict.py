"""Predictions of a fine-tuned model for all images of a data set; see docs/predict.md.

Surprising: the folder of the run is read once, by the driver. The model goes to the actors through
Ray's object store, so the folder need not exist on their machines; the images must.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from numpy.typing import NDArray

from pipeline.batch_inference import Inferred, open_images, run_inference
from pipeline.decoding import decode_image
from pipeline.downstream.finetuned import Finetuned, load_finetuned
from pipeline.inference_actor import PICTURE, InferenceConfig, LoadedImage
from pipeline.prediction_rows import above, drawn, jpeg_bytes, prediction_row, prediction_schema
from pipeline.reading import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(InferenceConfig):
    """What to predict, with which model, and where to write it."""

    run: tyro.conf.Positional[str]
    """Folder of a finished fine-tuning run."""
    overlays: int = 16
    """Pictures of predictions to draw, of images evenly spread over the data set; -1: of all."""
    min_score: float = 0.05
    """Objects a detector is less sure of are left out."""
    overlay_min_score: float = 0.3
    """Objects a detector is less sure of are not drawn."""

    def __post_init__(self) -> None:
        InferenceConfig.__post_init__(self)  # not super(): slots make a new class of this one
        if self.overlays < -1:
            raise ValueError(f"overlays={self.overlays} must be -1 (all), 0 (none) or a number")
        for key in ("min_score", "overlay_min_score"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)} must lie in [0, 1]")


@dataclass
class Predictor:
    """A fine-tuned model that makes rows (an `inference_actor.Inference`)."""

    finetuned: Finetuned
    min_score: float = 0.0
    overlay_min_score: float = 0.3
    overlay_rows: Container[int] = ()
    """Rows of the index a picture is drawn of."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    annotations: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """See `prediction_rows.prediction_schema`."""
        return prediction_schema(self.finetuned.config, len(self.finetuned.classes))

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.device = device
        self.finetuned.model.to(device)

    def load(self, sample: Sample) -> NDArray[np.uint8]:
        """(H, W, 3) pixels, rotated as EXIF says.

        Raises:
            BadImageError: the bytes are not an image.
        """
        return np.ascontiguousarray(decode_image(sample.encoded))

    def infer(self, images: list[LoadedImage]) -> list[dict[str, Any]]:
        """A row for each image."""
        predictions = self.finetuned.task.predict(
            self.finetuned.model, [one.image for one in images], self.device
        )
        return [self._row(*pair) for pair in zip(images, predictions, strict=True)]

    def _row(self, loaded: LoadedImage, prediction: dict[str, Any]) -> dict[str, Any]:
        classes, image = self.finetuned.classes, loaded.image
        row = prediction_row(above(prediction, self.min_score), image.shape[:2], classes)
        if loaded.row in self.overlay_rows:
            shown = above(prediction, max(self.min_score, self.overlay_min_score))
            row[PICTURE] = jpeg_bytes(drawn(image, shown, classes))
        return row


def predict(config: PredictConfig, *, with_ray: bool = True) -> Inferred:
    """Predict all images and write the output folder.

    Args:
        config: the job.
        with_ray: False predicts here, without actors.

    Raises:
        ValueError: settings, run, images or output folder that cannot be used; too many bad images.
        FileNotFoundError: run or images do not exist.
        InferenceFailedError: storage or the device failed.
    """
    finetuned = load_finetuned(config.run)
    index = open_images(config)
    predictor = Predictor(
        finetuned,
        config.min_score,
        config.overlay_min_score,
        overlay_rows(index.num_samples, config.overlays),
    )
    facts = {
        "task": finetuned.config.task,
        "classes": list(finetuned.classes),
        "run": str(Path(config.run).absolute()),
    }
    return run_inference(
        config, predictor, index, kind="predictions", facts=facts, with_ray=with_ray
    )


def overlay_rows(num_samples: int, count: int) -> Container[int]:
    """`count` rows evenly spread over the index, the first and the last among them; -1: all."""
    if count == -1 or count >= num_samples:
        return range(num_samples)
    return frozenset(np.linspace(0, num_samples - 1, count).round().astype(int).tolist())
