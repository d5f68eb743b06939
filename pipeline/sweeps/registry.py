"""The best model of a sweep in MLflow's registry, as a graph that takes images.

What it takes and answers is in `pipeline/served_model.py`. Surprising: asked again, for a sweep
that was finished before, it registers nothing twice; a detector it does not register at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.downstream.finetuned import Finetuned, load_finetuned
from pipeline.served_model import ServedModel, quiet_mlflow, serving_arguments
from pipeline.tracking import URI_VARIABLE

_TRIAL_TAG = "trial_run_id"


def register_best(
    uri: str, *, run_id: str, name: str, folder: Path, trial_run_id: str
) -> str | None:
    """Log the model of a finished fine-tuning run and register it; once, however often it is asked.

    Args:
        uri: MLflow tracking URI; the registry is there, unless MLFLOW_REGISTRY_URI says else.
        run_id: MLflow run that gets the model: the sweep's.
        name: of the registered model.
        folder: of the fine-tuning run.
        trial_run_id: its MLflow run, kept as a tag of the version.

    Returns:
        URI of the registered version; None for a detector, which cannot be exported.
    """
    finetuned = load_finetuned(folder)
    if finetuned.config.task == "detect":
        return None
    import mlflow

    with _tracked_at(uri):
        client = mlflow.MlflowClient()
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(_TRIAL_TAG) == trial_run_id and version.run_id == run_id:
                return f"models:/{name}/{version.version}"
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            logged = _log(finetuned, name)
        version = logged.registered_model_version
        client.set_model_version_tag(name, version, _TRIAL_TAG, trial_run_id)
        client.set_model_version_tag(name, version, "classes", ", ".join(finetuned.classes))
    return f"models:/{name}/{version}"


def _log(finetuned: Finetuned, name: str) -> Any:
    import mlflow

    data = finetuned.config.data
    served = ServedModel(finetuned.model, mean=data.mean, std=data.std).eval()
    return mlflow.pytorch.log_model(
        served,
        name="model",
        registered_model_name=name,
        **serving_arguments(served, image_size=data.image_size, classes=finetuned.classes),
    )


@contextlib.contextmanager
def _tracked_at(uri: str) -> Iterator[None]:
    """MLflow's global URI, for as long as it takes; the registry follows it."""
    import mlflow

    before, variable = mlflow.get_tracking_uri(), os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        with quiet_mlflow():
            yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:  # setting it has set the variable, which runs look at
            os.environ.pop(URI_VARIABLE, None)
