"""What each of two processes runs that fine-tune together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.finetune import build_state
from pipeline.finetune_config import FinetuneConfig
from pipeline.train_state import TrainState, Worker
from tests.pipeline.finetune_loop import LocalFinetune


def remembering(states: list[TrainState]) -> Callable[..., TrainState]:
    """`build_state` that also appends what it builds."""

    def build(*args: Any) -> TrainState:
        states.append(build_state(*args))
        return states[-1]

    return build


def train_together(rank: int, meeting: str, out: str, config: FinetuneConfig) -> None:
    """Run the loop as one of two workers; leave what it reported."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    try:
        states: list[TrainState] = []
        with mock.patch("pipeline.finetune.build_state", remembering(states)):
            run = LocalFinetune(config, Path(out) / "pair", worker=Worker(rank, 2))
            summary = run()
        result = {
            "records": run.records,
            "metrics": summary["metrics"],
            "model": states[0].model.state_dict(),
        }
        torch.save(result, f"{out}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
