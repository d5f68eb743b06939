"""Run folders with tiny models, folders of odd images, and reading what was inferred."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from models.itpn import ITPN, create_itpn
from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.downstream.tasks import create_task
from pipeline.finetune_config import Task
from pipeline.recipes import debug
from tests.pipeline.downstream import tiny_tasks
from tests.pipeline.samples import exif, noise_image

SIZES = [(70, 50), (33, 97), (64, 64), (5, 40), (90, 31), (48, 48), (1, 1)]
"""(width, height) of the images of `image_folder`, before rotation."""


def finetuned_run(folder: Path, name: Task, overrides: dict[str, Any] | None = None) -> Path:
    """A finished run of the debug model with random weights."""
    config = tiny_tasks.config(name, overrides)
    task = create_task(config, tiny_tasks.CLASSES)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    classes = {"classes": list(tiny_tasks.CLASSES), "pretrain_size": None}
    (folder / "classes.json").write_text(json.dumps(classes))
    save_file(tiny_tasks.built(task).state_dict(), folder / "model.safetensors")
    return folder


def pretrained_run(folder: Path) -> tuple[Path, ITPN]:
    """A finished run of pre-training with random weights, and its encoder."""
    config = apply_overrides(debug(), {"data.mean": (0.1, 0.2, 0.3), "data.std": (0.4, 0.5, 0.6)})
    torch.manual_seed(0)
    encoder = create_itpn(config.model.name, img_size=config.data.image_size).eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    return folder, encoder


def image_folder(folder: Path) -> Path:
    """Images of odd sizes, one of them turned by EXIF; a bad one in the middle; a text file."""
    (folder / "sub").mkdir(parents=True)
    for i, size in enumerate(SIZES):
        extra = {"exif": exif(6)} if i == 1 else {}
        name = f"sub/{i}.png" if i > 4 else f"{i}.png"
        noise_image(i, size).resize(size).save(folder / name, **extra)
    (folder / "3_bad.jpg").write_bytes(b"<html>not found</html>")
    (folder / "readme.txt").write_text("no image")
    return folder


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Rows of an output folder, as any reader of Parquet folders gives them."""
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def finished(out: Path) -> dict[str, Any]:
    """What the last file says."""
    facts: dict[str, Any] = json.loads((out / "_finished.json").read_text())
    return facts
