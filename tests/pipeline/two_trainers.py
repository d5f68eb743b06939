"""What each of two processes runs that train together, and skip steps together."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.config_values import apply_overrides
from pipeline.nonfinite import NonFiniteLossError
from pipeline.pretrain_config import PretrainConfig
from pipeline.train_state import TrainState, Worker
from tests.pipeline.loop import LocalRun


def skip_together(rank: int, init_file: str, out: str, config: PretrainConfig) -> None:
    """Train over images one of which overflows; then again, where no step may be skipped."""
    torch.set_num_threads(1)  # as `one_thread` does, for equal bits
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=2
    )
    states: list[TrainState] = []
    build = TrainState.build

    def remember(*args: Any) -> TrainState:
        states.append(build(*args))
        return states[-1]

    try:
        with mock.patch.object(TrainState, "build", remember):
            run = LocalRun(config, Path(out) / "pair", worker=Worker(rank, 2))
            summary = run()
        strict = apply_overrides(config, {"optim.max_skipped_steps": 0})
        failed = LocalRun(strict, Path(out) / "strict", worker=Worker(rank, 2))
        error = ""
        try:
            failed()
        except NonFiniteLossError as caught:
            error = str(caught)
        result = {
            "state": states[0].state_dict(),
            "skipped_steps": summary["skipped_steps"],
            "rows": run.rows,
            "error": error,
            "dump": failed.dump,
        }
        torch.save(result, f"{out}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
