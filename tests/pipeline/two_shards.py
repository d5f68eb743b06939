"""What each of two processes runs that train together, sharded and not."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from pipeline.train_state import Worker
from tests.pipeline.loop import LocalRun


def train_together(rank: int, init_file: str, out: str, config: PretrainConfig) -> None:
    """Runs `ddp`, `full`, `resumed` (sharded, stopped in between) and `taken_over` (from DDP).

    `handed_over` is left after 3 sharded steps, for one process to go on with.
    """
    torch.set_num_threads(1)  # as `one_thread` does, for equal bits
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=2
    )
    full = apply_overrides(config, {"scaling.sharding": "full"})
    runs = [
        ("ddp", config, -1),
        ("full", full, -1),
        ("resumed", full, 3),
        ("resumed", full, -1),
        ("handed_over", full, 3),
        ("taken_over", config, 3),
        ("taken_over", full, -1),
    ]
    try:
        for name, settings, stop_at in runs:
            run = LocalRun(settings, Path(out) / name, worker=Worker(rank, 2), stop_at=stop_at)
            run()
            torch.save([run.history(), run.pictures, run.started_at], f"{out}/{name}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
