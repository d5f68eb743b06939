"""Loading a fine-tuned model from the folder of its run.

The folder holds config.json, classes.json ({"classes": names, "pretrain_size": pixels or null}) and
model.safetensors, the whole model and, where the run kept a moving average of the weights, that
average. Surprising: nothing else is read, so these three files can be copied anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.checkpoint import MODEL_FILE
from pipeline.config_values import config_from_dict
from pipeline.downstream.task import DownstreamTask
from pipeline.downstream.tasks import create_task
from pipeline.finetune_config import CONFIG_CLASSES, FinetuneConfig, task_of
from pipeline.run_folder import CLASSES_FILE, CONFIG_FILE


class Finetuned(NamedTuple):
    """A model that predicts, and what it was trained as."""

    task: DownstreamTask
    """Its `predict` takes images of any size."""
    model: nn.Module
    """In eval mode, on the CPU."""
    config: FinetuneConfig
    classes: tuple[str, ...]
    """Names, by label."""


def load_finetuned(run: str | Path) -> Finetuned:
    """Load the model of a finished fine-tuning run.

    Args:
        run: local folder of the run.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a run of pre-training, one that is not finished, or files of different runs,
            such as other classes than the head was trained on. Says what to do.
    """
    folder = Path(run)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"no run at {folder}: it holds no {CONFIG_FILE}; give the folder of a fine-tuning run, "
            "<run.storage_path>/<run.name>"
        )
    values = json.loads((folder / CONFIG_FILE).read_text())
    task_name = task_of(values)
    if task_name is None:
        raise ValueError(
            f"{folder} is a run of pre-training, which knows no classes; fine-tune it first "
            f"(--init {folder}) and give the folder of that run"
        )
    for name in (CLASSES_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}: the run is not finished; give its command once more to "
                "go on from its newest checkpoint"
            )
    labels = json.loads((folder / CLASSES_FILE).read_text())
    config: FinetuneConfig = config_from_dict(CONFIG_CLASSES[task_name], values)
    task = create_task(config, labels["classes"], pretrain_size=labels["pretrain_size"])
    model = task.build()
    _load(model, folder, len(task.classes))
    return Finetuned(task, model.eval(), config, task.classes)


def _load(model: nn.Module, folder: Path, num_classes: int) -> None:
    """Load all weights; every one must be there and fit."""
    path = folder / MODEL_FILE
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it again, or train again from a checkpoint"
        ) from error
    problems = misfits(state, model.state_dict())
    if problems:
        shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
        raise ValueError(
            f"{path} does not fit {CONFIG_FILE} and the {num_classes} classes of {CLASSES_FILE}; "
            f"keep the three files of one run together:\n  {shown}"
        )
    model.load_state_dict(state)


def misfits(state: dict[str, Tensor], target: dict[str, Any]) -> list[str]:
    """What keeps a state dict from filling another: shapes, unexpected keys, missing keys."""
    common = [key for key in target if key in state]
    shapes = [(key, tuple(state[key].shape), tuple(target[key].shape)) for key in common]
    return [
        *(
            f"{key}: shape {given} does not fit {wanted}"
            for key, given, wanted in shapes
            if given != wanted
        ),
        *(f"unexpected key {key}" for key in state if key not in target),
        *(f"missing key {key}" for key in target if key not in state),
    ]
