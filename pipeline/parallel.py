"""Data parallelism: what wraps a model, and what keeps its batch norms together.

Surprising: torch's SyncBatchNorm needs a GPU. On CPUs the batch norms of each worker see their own
micro-batches; their running statistics are averaged over workers at every step, so that all workers
evaluate and save the same model.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pipeline.sharding import is_sharded
from pipeline.train_state import Worker


def parallel(model: nn.Module, worker: Worker, *, static_graph: bool = False) -> nn.Module:
    """The model, wrapped when there are other workers.

    Args:
        model: the student; one that is sharded stays as it is.
        worker: this process.
        static_graph: every step uses the same parameters, and no step accumulates (torch crashes
            where the first backward of a static graph is under no_sync).
    """
    if worker.world_size == 1 or is_sharded(model):
        return model
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
    )


def no_sync_unless(is_last: bool, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Gradients are reduced at the last micro-batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def with_shared_batch_norms(model: nn.Module, worker: Worker) -> nn.Module:
    """The model with batch norms over all workers' micro-batches, where torch has them (CUDA).

    Parameters stay the same objects.
    """
    if worker.world_size == 1 or worker.device.type != "cuda":
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


@torch.no_grad()
def average_batch_norms(model: nn.Module, worker: Worker) -> None:
    """Replace the running statistics of every worker by their mean. All workers must call it."""
    if worker.world_size == 1:
        return
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= worker.world_size
    parts = flat.split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))
