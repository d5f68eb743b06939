"""What each of two processes runs whose models have batch norms of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.parallel import average_batch_norms, no_sync_unless, parallel
from pipeline.train_state import Worker


def model_with_batch_norms(number: float) -> nn.Module:
    """Batch norms of several kinds and sizes whose statistics are all different."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Sequential(nn.BatchNorm2d(2), nn.SyncBatchNorm(2)),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.InstanceNorm1d(2, track_running_stats=True),
    )
    for place, buffer in enumerate(model.buffers()):
        ramp = torch.arange(buffer.numel()).view(buffer.shape)
        buffer.copy_(100 * place + 10 * number + ramp)
    return model


def average_together(rank: int, meeting: str, out: str) -> None:
    """Average the batch norms of two models; leave the state of this one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        worker = Worker(rank, 2)
        model = model_with_batch_norms(rank)
        average_batch_norms(model, worker)
        average_batch_norms(nn.Linear(2, 2), worker)  # none at all
        found = {"state": model.state_dict(), "gradients": _gradients(worker)}
        torch.save(found, f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _gradients(worker: Worker) -> dict[str, Any]:
    """Of a layer after the first and after the last of two micro-batches, and what wrapped it."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    wrapped = parallel(layer, worker)
    seen: list[Tensor] = []
    for micro in (0, 1):
        with no_sync_unless(micro == 1, wrapped):
            wrapped(torch.tensor([[1.0 + worker.rank + 10 * micro]])).sum().backward()
        assert layer.weight.grad is not None
        seen.append(layer.weight.grad.clone())
    return {"seen": seen, "is_wrapped": isinstance(wrapped, DistributedDataParallel)}
