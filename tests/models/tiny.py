"""What the model tests share: tiny random models, batches, and checks of initial values."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.hivit import HiViT
from models.pretraining import PretrainingModel, create_pretraining_model

IMG_SIZE = 64
PATCH_SIZE = 16
NUM_PATCHES = (IMG_SIZE // PATCH_SIZE) ** 2
NUM_VISIBLE = 4
STRIDES = (4, 8, 16)

ModelT = TypeVar("ModelT", bound=nn.Module)


def randomize(model: ModelT, seed: int = 0) -> ModelT:
    """Move every parameter off its initial value, so that a term which starts at zero shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def backbone(**kwargs: Any) -> HiViT:
    """HiViT of 16 channels on a 4x4 token grid, one block in stage 1 and two in stages 2 and 3."""
    defaults = {"depths": (1, 2, 2), "num_heads": 2, "img_size": IMG_SIZE}
    return randomize(HiViT(16, **{**defaults, **kwargs}))


def pretraining_model(**kwargs: Any) -> PretrainingModel:
    """The debug variant on a 4x4 token grid."""
    return randomize(create_pretraining_model("itpn_debug", **kwargs))


def images(batch_size: int = 2, height: int = IMG_SIZE, width: int = IMG_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 3, height, width, generator=generator)


def mask(batch_size: int = 2, num_patches: int = NUM_PATCHES) -> Tensor:
    """(B, N) bool, True = masked; a different pattern in every row."""
    noise = torch.rand(batch_size, num_patches, generator=torch.Generator().manual_seed(2))
    return noise.argsort(dim=1) >= NUM_VISIBLE


def pixels_of(patches: Tensor, height: int = IMG_SIZE, width: int = IMG_SIZE) -> Tensor:
    """Boolean patches (B, N) -> their pixels (B, 1, H, W), as a factor or condition on images."""
    grid = patches.reshape(-1, 1, height // PATCH_SIZE, width // PATCH_SIZE)
    return grid.repeat_interleave(PATCH_SIZE, dim=2).repeat_interleave(PATCH_SIZE, dim=3)


def assert_linear_and_norm_init(model: nn.Module) -> None:
    """Linear: std .02 and bias 0; LayerNorm: 1 and 0. For a freshly built model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert_std(module.weight, 0.02, name)
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all()), name
            assert not module.bias.any(), name


def assert_std(values: Tensor, std: float, name: str) -> None:
    """A sample deviation of n normal values is off by about std / sqrt(2n); allow five of those."""
    allowed = 5 * std / (2 * values.numel()) ** 0.5
    found = float(values.detach().std())
    assert abs(found - std) < allowed, f"{name}: standard deviation {found}, not {std}"
