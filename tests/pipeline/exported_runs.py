"""Weights of one variant of each family to export, and what their exports must say, spelt out."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.itpn import ITPN, create_itpn
from models.variants import VARIANTS, ITPNVariant
from tests.models.tiny import randomize

CLIP_DEBUG = ITPNVariant(
    embed_dim=32,
    depths=(1, 1, 1),
    num_heads=2,
    fpn_dim=16,
    fpn_depth=1,
    img_size=64,
    init_values=0.1,
    rel_pos_bias=True,
)
FAMILIES = {"itpn_debug": "pixel", "clip_debug": "clip", "fast_itpn_debug": "fast"}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def know_clip_debug() -> None:
    """Make a tiny model with layer scale and relative position bias known by name."""
    VARIANTS.setdefault("clip_debug", CLIP_DEBUG)


def weights_file(name: str, folder: Path) -> tuple[Path, ITPN]:
    """A file of random weights, and their encoder."""
    torch.manual_seed(0)
    encoder = randomize(create_itpn(name)).eval()
    path = folder / f"{name}.safetensors"
    save_file(encoder.state_dict(), path)
    return path, encoder


@torch.no_grad()
def pyramid_maps(encoder: ITPN, images: Tensor) -> list[Tensor]:
    """Levels of images in [0, 1] at strides 4, 8, 16, laid out cell by cell."""
    features = encoder((images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)).pyramid
    B, _, H, W = images.shape
    maps = []
    for stride in (4, 8, 16):
        cells, dim = 16 // stride, features[stride].shape[-1]
        found = torch.zeros(B, dim, H // stride, W // stride)
        for token in range(H // 16 * (W // 16)):
            row, column = divmod(token, W // 16)
            for y in range(cells):
                for x in range(cells):
                    values = features[stride][:, token, y, x]
                    found[:, :, row * cells + y, column * cells + x] = values
        maps.append(found)
    return maps


def random_images(batch: int, height: int = 64, width: int = 64) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(height + width)
    return torch.rand(batch, 3, height, width, generator=generator)
