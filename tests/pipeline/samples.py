"""Images and models the tests of the pipeline make on the spot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.pretraining import PretrainingModel, create_pretraining_model
from models.teacher import EMATeacher
from pipeline.masking import random_mask

IMAGE_SIZE = 64
NUM_PATCHES = 16
NUM_VISIBLE = 4
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def noise_image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Noise, so that no two crops are alike."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """Encoded bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    """Write a noise image under each name; the image depends on the name's place in the list."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed).save(folder / name)


def debug_networks(
    *, norm_pix_loss: bool = False, with_mfm: bool = True
) -> tuple[PretrainingModel, EMATeacher | None]:
    """The debug model and its teacher, in evaluation mode."""
    torch.manual_seed(0)
    weight = 0.3 if with_mfm else 0.0
    model = create_pretraining_model("itpn_debug", norm_pix_loss=norm_pix_loss, mfm_weight=weight)
    teacher = EMATeacher(model.encoder.backbone) if with_mfm else None
    return model.eval(), teacher


def debug_crops(num_images: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 64, 64) in [0, 1] around a common one, and masks (B, 16), True = masked."""
    generator = torch.Generator().manual_seed(1)
    common = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    own = torch.rand(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    masks = [
        random_mask(np.random.default_rng(i), NUM_PATCHES, NUM_VISIBLE) for i in range(num_images)
    ]
    return 0.7 * common + 0.3 * own, torch.from_numpy(np.stack(masks))


def normalized(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the model takes them."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
