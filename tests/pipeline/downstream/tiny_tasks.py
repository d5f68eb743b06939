"""Tiny tasks, and micro-batches of a few drawn samples for them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from timm.layers import DropPath
from torch import nn

from pipeline.config import RunConfig
from pipeline.config_values import apply_overrides
from pipeline.data import Batch
from pipeline.downstream.samples import Arrays, pack
from pipeline.downstream.task import DownstreamTask
from pipeline.downstream.tasks import create_task
from pipeline.finetune_config import (
    CONFIG_CLASSES,
    DetectorConfig,
    FinetuneConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    LabelledDataConfig,
    SegmenterConfig,
    Task,
)

CPU = torch.device("cpu")
SIDE = 64
CLASSES = ("red", "green", "blue")
COLOURS = np.array([(230, 20, 20), (20, 230, 20), (20, 20, 230)], np.uint8)
GREY = 128
BAD = '["x.jpg", 0, "BadImageError", "broken"]'


def config(name: Task, overrides: dict[str, Any] | None = None) -> FinetuneConfig:
    """The debug model on images of 64 pixels, with narrow heads and nothing random."""
    sections: dict[Task, dict[str, Any]] = {
        "classify": {},
        "detect": {
            "detector": DetectorConfig(
                min_sizes=(SIDE,),
                eval_min_size=SIDE,
                max_size=128,
                head_dim=16,
                fc_dim=32,
                samples_per_image=32,
            )
        },
        "segment": {
            "segmenter": SegmenterConfig(
                channels=16, eval_short_side=SIDE, window=0, photometric=False
            )
        },
    }
    built = CONFIG_CLASSES[name](
        run=RunConfig(name="tiny"),
        data=LabelledDataConfig(path="train", val_path="val", image_size=SIDE, global_batch_size=4),
        model=FinetuneModelConfig(name="itpn_debug", drop_path_rate=0.0),
        optim=FinetuneOptimConfig(num_steps=1),
        **sections[name],
    )
    return apply_overrides(built, overrides or {})


def task(name: Task, overrides: dict[str, Any] | None = None) -> DownstreamTask:
    """The task of `config` with three classes."""
    return create_task(config(name, overrides), CLASSES)


def built(task: DownstreamTask, seed: int = 0) -> nn.Module:
    """The task's model, always with the same weights, all of them off their initial zeros."""
    torch.manual_seed(seed)
    model = task.build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def batch(samples: list[Arrays], bad: tuple[int, ...] = ()) -> Batch:
    """A micro-batch as the data plane yields it; `bad` are the places of bad samples."""
    packed = np.empty(len(samples), dtype=object)
    packed[:] = [pack(sample) for sample in samples]
    texts = [BAD if place in bad else "" for place in range(len(samples))]
    numbers = np.arange(len(samples))
    return {"position": numbers, "row": 10 + numbers, "packed": packed, "bad": np.array(texts)}


def samples(name: Task, count: int = 4) -> list[Arrays]:
    """Grey images, each with a coloured rectangle of another place and class."""
    return [sample(name, *rectangle(i)) for i in range(count)]


def rectangle(number: int) -> tuple[int, tuple[int, int, int, int]]:
    """Class and box (x0, y0, x1, y1) of a drawing."""
    x0, y0 = (4 + 7 * number) % 24, (2 + 11 * number) % 20
    return number % len(COLOURS), (x0, y0, x0 + 26 + 3 * (number % 4), y0 + 34 - 2 * (number % 3))


def drawing(
    label: int,
    box: tuple[int, int, int, int],
    size: tuple[int, int] = (SIDE, SIDE),
    ground: int | NDArray[np.uint8] = GREY,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Image (H, W, 3) of a coloured rectangle on a ground, a little noisy, and its mask (H, W)."""
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    noise = np.random.default_rng(label).integers(-8, 9, (*size, 3))
    image = np.where(mask[..., None], COLOURS[label], ground) + noise
    return image.clip(0, 255).astype(np.uint8), mask


def sample(
    name: Task,
    label: int,
    box: tuple[int, int, int, int],
    size: tuple[int, int] = (SIDE, SIDE),
) -> Arrays:
    """A sample of the task, with what training and evaluation need.

    In segmentation the ground has the next class and its colour: classes as frequent as each other
    are learnt in few steps.
    """
    if name == "segment":
        other = (label + 1) % len(COLOURS)
        image, mask = drawing(label, box, size, COLOURS[other])
        return {"image": image, "target": np.where(mask, label, other).astype(np.uint8)}
    image, mask = drawing(label, box, size)
    if name == "classify":
        return {"image": image, "label": np.array(label, np.int64)}
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return {
        "image": image,
        "boxes": np.array([box], np.float32),
        "labels": np.array([label + 1], np.int64),
        "is_crowd": np.array([False]),
        "mask_bytes": np.frombuffer(runs, np.uint8),
        "mask_lengths": np.array([len(runs)], np.int64),
    }


def without_objects(size: tuple[int, int] = (SIDE, SIDE)) -> Arrays:
    """A grey image of detection."""
    return {
        "image": np.full((*size, 3), GREY, np.uint8),
        "boxes": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int64),
        "is_crowd": np.zeros(0, bool),
        "mask_bytes": np.zeros(0, np.uint8),
        "mask_lengths": np.zeros(0, np.int64),
    }


def drop_path_rate(model: nn.Module) -> float:
    """Stochastic depth of the last block."""
    return max(m.drop_prob or 0.0 for m in model.modules() if isinstance(m, DropPath))


def seed_all(seed: int) -> None:
    """The generators the loop seeds for every micro-batch."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the gradients by name; every parameter must have one."""
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        found[name] = p.grad.clone()
    return found


def gradients_of(
    task: DownstreamTask, given: Batch, seed: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of a fresh model for a micro-batch, and the gradients of the first."""
    model = built(task).train()
    seed_all(seed)
    losses = task.losses(model, given, CPU)
    losses[0].backward()
    return losses.detach(), gradients(model)


def overfit(
    task: DownstreamTask, given: Batch, *, num_steps: int, lr: float
) -> tuple[nn.Module, dict[str, float]]:
    """Train on one micro-batch; the model in eval mode, and its scores on the same samples."""
    torch.manual_seed(0)
    model = task.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(num_steps):
        seed_all(step)
        losses = task.losses(model, given, CPU)
        optimizer.zero_grad()
        losses[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    scores = task.new_scores()
    task.score(model.eval(), given, CPU, scores)
    return model, scores.result()
