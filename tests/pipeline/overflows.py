"""Data that really overflow float32: black images train, a bright one does not.

Pixels are divided by a deviation of 3e-20. Black ones are 0 whatever they are divided by; white
ones become 3e19, whose square, the loss, is more than float32 holds (3.4e38). The held-out image is
noise of the levels 0 and 1, which stays below that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.checkpoint import Checkpointer
from pipeline.config_values import apply_overrides
from pipeline.data import Batch
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import debug
from pipeline.run_folder import RunFolder
from tests.pipeline.samples import encode, write_files

NUM_SAMPLES, BATCH = 24, 8


def write_images(folder: Path, bright: tuple[int, ...]) -> None:
    """24 black images, but those of the given numbers white; a faint one in `held-out` beside."""
    write_files(folder, {f"{i:02d}.png": _image(i in bright) for i in range(NUM_SAMPLES)})
    faint = np.random.default_rng(0).integers(0, 2, (40, 40, 3), dtype=np.uint8)
    write_files(folder.parent / "held-out", {"faint.png": encode(Image.fromarray(faint))})


def _image(is_bright: bool) -> bytes:
    return encode(Image.new("RGB", (40, 40), "white" if is_bright else "black"))


def overflowing_config(folder: Path, **overrides: Any) -> PretrainConfig:
    """Three steps an epoch of such a folder; what is not set here is the debug recipe's."""
    settings = {
        "run.storage_path": str(folder.parent / "runs"),
        "run.checkpoint_every_steps": 1,
        "run.keep_checkpoints": 100,
        "data.path": str(folder),
        "data.val_path": str(folder.parent / "held-out"),
        "data.image_size": 32,
        "data.mean": (0.0, 0.0, 0.0),
        "data.std": (3e-20, 3e-20, 3e-20),
        "data.global_batch_size": BATCH,
        "data.num_eval_crops": 2,
        "optim.num_steps": 6,
    }
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return apply_overrides(debug(), settings | dotted)


def paint_white(batch: Batch) -> Batch:
    """The batch with its last image white."""
    images = batch["image"].copy()
    images[-1] = 255
    return batch | {"image": images}


def write_dump(config: PretrainConfig, dump: dict[str, Any]) -> Path:
    """Lay a dump out as a training worker does: RUN/config.json and RUN/nonfinite/step_XXXXXXXX."""
    folder = RunFolder(config)
    folder.open()
    writer = Checkpointer(folder.non_finite_dumps, keep=1, facts={})
    writer.save(dump["step"], dump, {})
    writer.wait()
    return writer.fetch(dump["step"])
