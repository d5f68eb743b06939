"""The optimiser: AdamW with the official two parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups covering every trainable parameter once: undecayed (1-D and biases), decayed.

    As the official pixel pre-training: `pos_embed` and `mask_token` *are* decayed
    (itpn_pixel/main_pretrain.py:178; pinned by
    golden/extras/param_groups_pixel_pretrain_base.json).
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = [p for name, p in trainable if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in trainable if not (p.ndim <= 1 or name.endswith(".bias"))]
    return [
        {"params": undecayed, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over `param_groups`, fused on CUDA."""
    groups = param_groups(model, weight_decay)
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
