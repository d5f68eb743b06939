"""A fine-tuned model comes back from its folder as it was, or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoint import MODEL_FILE
from pipeline.config_values import config_to_dict
from pipeline.downstream.finetuned import load_finetuned
from pipeline.downstream.task import DownstreamTask
from pipeline.downstream.tasks import create_task
from pipeline.finetune_config import Task
from pipeline.recipes import debug
from pipeline.run_folder import CLASSES_FILE, CONFIG_FILE
from tests.pipeline.downstream import tiny_tasks as tiny
from tests.pipeline.downstream.tiny_tasks import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS: list[Task] = ["classify", "detect", "segment"]


def write_run(
    folder: Path, name: Task, pretrain_size: int | None = None
) -> tuple[DownstreamTask, nn.Module]:
    """The folder of a finished run of a model that never was trained."""
    task = create_task(tiny.config(name), tiny.CLASSES, pretrain_size=pretrain_size)
    model = tiny.built(task)
    task.losses(model.train(), tiny.batch(tiny.samples(name, 2)), CPU)  # moves the batch norms
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_dict(task.config)))
    labels = {"classes": list(task.classes), "pretrain_size": pretrain_size}
    (folder / CLASSES_FILE).write_text(json.dumps(labels))
    save_file(model.state_dict(), folder / MODEL_FILE)
    return task, model.eval()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("pretrain_size", [None, 96])
def test_a_loaded_model_predicts_what_the_saved_one_does(
    tmp_path: Path, name: Task, pretrain_size: int | None
):
    task, model = write_run(tmp_path / "run", name, pretrain_size)
    loaded = load_finetuned(str(tmp_path / "run"))
    assert not loaded.model.training
    assert loaded.config == task.config and loaded.classes == task.classes
    assert loaded.task == task
    images = [tiny.samples(name, 1)[0]["image"], np.full((50, 90, 3), 77, np.uint8)]
    expected = task.predict(model, images, CPU)
    found = loaded.task.predict(loaded.model, images, CPU)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert all(np.size(value) for value in found[0].values())  # objects, too, are found


def test_a_run_of_pretraining_has_to_be_fine_tuned_first(tmp_path: Path):
    config = debug()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config_to_dict(config)))
    with pytest.raises(ValueError, match=f"pre-training.* fine-tune it first .--init {tmp_path}"):
        load_finetuned(tmp_path)


@pytest.mark.parametrize("missing", [CLASSES_FILE, MODEL_FILE])
def test_an_unfinished_run_has_to_be_finished(tmp_path: Path, missing: str):
    write_run(tmp_path, "classify")
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"no {missing}: the run is not finished"):
        load_finetuned(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"no run at {tmp_path / 'typo'}"):
        load_finetuned(tmp_path / "typo")


@pytest.mark.parametrize("name", TASKS)
def test_weights_of_another_number_of_classes_are_refused(tmp_path: Path, name: Task):
    write_run(tmp_path, name)
    labels = {"classes": ["one", "two"], "pretrain_size": None}
    (tmp_path / CLASSES_FILE).write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=r"the 2 classes of classes\.json.*") as caught:
        load_finetuned(tmp_path)
    assert "does not fit" in str(caught.value) and "shape (" in str(caught.value)


def test_every_weight_must_be_there_and_wanted(tmp_path: Path):
    write_run(tmp_path, "classify")
    state = load_file(tmp_path / MODEL_FILE)
    state["head.extra"] = state.pop("head.bias")
    save_file(state, tmp_path / MODEL_FILE)
    with pytest.raises(ValueError, match=r"(?s)unexpected key head\.extra.*missing key head\.bias"):
        load_finetuned(tmp_path)


def test_damaged_weights_are_named(tmp_path: Path):
    write_run(tmp_path, "classify")
    path = tmp_path / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_finetuned(tmp_path)


def test_weights_and_running_statistics_come_back_to_the_bit(tmp_path: Path):
    _, model = write_run(tmp_path, "segment")
    loaded = load_finetuned(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
