"""A model folder of MLflow: uint8 images in, answers out, as the registry of sweeps has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.exports.exportable import Exportable, ExportFailedError
from pipeline.exports.graphs import TOLERANCE, without_traces
from pipeline.served_model import ServedModel, quiet_mlflow, serving_arguments

MLFLOW_FOLDER = "mlflow"
_NUM_CHECKED = 3


def write_mlflow(exportable: Exportable, folder: Path) -> str:
    """Write a model that `mlflow.pyfunc.load_model` and `mlflow.pytorch.load_model` load.

    Returns:
        What the check found, for people.

    Raises:
        ExportFailedError: what was written answers other than the model.
    """
    import mlflow

    side = exportable.image_size
    served = ServedModel(exportable.model, mean=exportable.mean, std=exportable.std).eval()
    arguments = serving_arguments(served, image_size=side, classes=exportable.classes)
    with quiet_mlflow():
        mlflow.pytorch.save_model(served, folder, **arguments)
        for file in folder.rglob("*.pt2"):
            torch.export.save(without_traces(torch.export.load(file)), file)
        model = mlflow.pyfunc.load_model(str(folder))
    shape = (_NUM_CHECKED, side, side, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        expected = served(torch.from_numpy(images)).numpy().astype(np.float64)
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(model.predict(images) - expected).max()) / scale
    if not difference <= TOLERANCE:
        raise ExportFailedError(
            f"the MLflow model differs from the model by {difference:.2g} of its largest answer, "
            f"more than {TOLERANCE}; use another form with this version of MLflow"
        )
    return f"within {difference:.1e} of the model at a batch of {_NUM_CHECKED}, {side}x{side}"
