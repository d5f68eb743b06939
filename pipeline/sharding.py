"""Sharded training (torch's FSDP2): every worker holds a share of weights, gradients and optimiser.

A run is sharded after it was restored, from whole tensors, and what leaves it is whole again: a
checkpoint tells neither how many workers wrote it nor that they were sharded, and evaluation and
pictures work on a whole copy, because workers take different numbers of batches there.

Surprising: shares are gathered for the forward of every block, by all workers together. Whoever
calls a sharded module on one worker alone waits for ever.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.itpn import REPEATED
from pipeline.train_state import TrainState

Whole = Callable[[TrainState], TrainState]
"""Gives a state whose model and moving average are whole; all workers must call it."""


def shard(state: TrainState) -> Whole:
    """Split model, moving average and optimiser in place; every worker has them whole and equal.

    All workers must call it. A frozen teacher stays whole.

    Returns:
        What makes a whole copy, without optimiser, of the state at any later time.
    """
    makers = {"model": _maker(state.model)}
    if state.average is not None:
        makers["teacher"] = _maker(state.average)
        _shard_module(state.average)
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    _shard_module(state.model)
    state.optimizer = _sharded(state.optimizer, names, dict(state.model.named_parameters()))

    def whole(now: TrainState) -> TrainState:
        copies: dict[str, Any] = {key: maker(getattr(now, key)) for key, maker in makers.items()}
        return dataclasses.replace(now, **copies)

    return whole


def is_sharded(model: nn.Module) -> bool:
    """Whether this is a model that `shard` has split."""
    return isinstance(model, FSDPModule)


def gathered(tree: Any) -> Any:
    """Nested dicts, lists and tuples with every split tensor whole; all workers must call it."""
    return _mapped(tree, lambda tensor: tensor.full_tensor())


def gathered_on_rank_zero(tree: Any) -> Any:
    """The same, whole on the CPU of worker 0 alone and one tensor after the other: a whole
    optimiser need not fit anywhere else. All workers must call it."""

    def fetch(tensor: DTensor) -> Tensor | None:
        full = tensor.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None

    return _mapped(tree, fetch)


def _mapped(tree: Any, function: Callable[[DTensor], Any]) -> Any:
    if isinstance(tree, DTensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, function) for value in tree)
    return tree


def _shard_module(root: nn.Module) -> None:
    for module in [m for m in root.modules() if isinstance(m, REPEATED)]:
        fully_shard(module, reshard_after_forward=True)
    # By default the rest stays whole after a forward, and the moving average could not be taken.
    fully_shard(root, reshard_after_forward=True)


def _maker(module: nn.Module) -> Callable[[nn.Module], nn.Module]:
    """What makes whole copies of a module later, which must not be split yet."""
    skeleton = copy.deepcopy(module).to("meta")

    def whole(split: nn.Module) -> nn.Module:
        made = copy.deepcopy(skeleton)
        made.load_state_dict(gathered(dict(split.state_dict())), assign=True)
        assert not any(t.is_meta for t in (*made.parameters(), *made.buffers())), (
            "a tensor of the model is in no state dict"
        )
        return made.train(split.training)

    return whole


def _sharded(
    optimizer: torch.optim.Optimizer, names: dict[int, str], parameters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimiser over split parameters, with what it remembers of them split alike."""
    groups = [
        {**group, "params": [parameters[names[id(p)]] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    split: Any = type(optimizer)(groups)  # type: ignore[call-arg] # lr and all else is in the groups
    for old, values in optimizer.state.items():
        new = parameters[names[id(old)]]
        split.state[new] = {
            key: _like(value, new) if value.shape == new.shape else value
            for key, value in values.items()
        }
    return split


def _like(tensor: Tensor, parameter: Any) -> Tensor:
    """A tensor that all workers hold, split as a parameter is."""
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
