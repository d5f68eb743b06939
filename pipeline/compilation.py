"""torch.compile for training: which parts, and why not the whole."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn


def compile_training(model: nn.Module, teacher: Any = None) -> None:
    whole = os.environ.get("WHOLE")
    torch._dynamo.config.recompile_limit = 64
    if whole:
        model.compile(dynamic=False)
        if teacher is not None:
            teacher.backbone.compile(dynamic=False)
        return
    from models.layers import Block, MlpBlock, PatchMerge, PatchSplit

    for root in (model, teacher) if teacher is not None else (model,):
        for module in root.modules():
            if isinstance(module, (Block, MlpBlock, PatchMerge, PatchSplit)):
                module.compile(dynamic=False)
