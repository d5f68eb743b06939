"""What each of two training processes runs; a file of its own, which is quick to import."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.between_steps import loss_metrics
from pipeline.config_values import apply_overrides
from pipeline.quarantine import BadSample
from pipeline.recipes import debug
from pipeline.train_state import TrainState, Worker, share_quarantine


def merge_quarantines(rank: int, init_file: str, out: str) -> None:
    """Share bad samples and losses with the other worker; writes what came of it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=2
    )
    try:
        config = apply_overrides(debug(), {"objective.mfm_weight": 0.0})
        worker = Worker(rank, 2)
        state = TrainState.build(config, torch.device("cpu"))
        own = [BadSample(f"{rank}.png", rank, "E", "m"), BadSample("both.png", 9, "E", "m")]
        grew = [share_quarantine(state, own if turn == 0 else [], worker) for turn in range(2)]
        # Worker 0: losses 3, 1 bad of 4. Worker 1: losses 1, none bad.
        losses = torch.full((5,), 3.0 if rank == 0 else 1.0)
        metrics = loss_metrics(losses, ("loss", "loss_mim"), 1 - rank, 8)
        result = {"paths": list(state.quarantine), "grew": grew, "loss": metrics["train/loss"]}
        Path(f"{out}/{rank}.json").write_text(json.dumps(result))
    finally:
        torch.distributed.destroy_process_group()
