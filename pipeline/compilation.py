"""torch.compile for training, block by block.

Blocks and merges are compiled and what calls them is not: blocks of one kind share their code, so
that a start takes half a minute and not one for each depth, gradients still leave a block as soon
as they are there, for data parallelism to reduce, and a sharded model can be compiled, too.

Surprising: modules are changed in place, and copies and state dicts know nothing of it.
"""

from __future__ import annotations

import torch
from torch import nn

from models.itpn import REPEATED

_MOST_SHAPES = 64
"""Versions of a block's code: by width, number of tokens, and with gradients or without."""


def compile_training(*modules: nn.Module | None) -> None:
    """Compile the blocks of models, for batches of one size each; None is passed over.

    Args:
        *modules: such as the student and its moving average.
    """
    torch._dynamo.config.recompile_limit = max(_MOST_SHAPES, torch._dynamo.config.recompile_limit)
    for root in modules:
        for module in root.modules() if root is not None else ():
            if isinstance(module, REPEATED):
                module.compile(dynamic=False)
