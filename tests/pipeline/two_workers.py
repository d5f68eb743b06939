"""What each of two training processes runs; a file of its own, which is quick to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.config import PretrainConfig, apply_overrides
from pipeline.nonfinite import NonFiniteLossError
from pipeline.pretrain import TrainState, Worker, loss_metrics, share_quarantine
from pipeline.quarantine import BadSample
from pipeline.recipes import debug
from tests.pipeline.loop import LocalRun


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
        metrics = loss_metrics(losses, 1 - rank, 8, has_mfm=False)
        result = {"paths": list(state.quarantine), "grew": grew, "loss": metrics["train/loss"]}
        Path(f"{out}/{rank}.json").write_text(json.dumps(result))
    finally:
        torch.distributed.destroy_process_group()


def skip_together(rank: int, init_file: str, out: str, config: PretrainConfig) -> None:
    """Train over images one of which overflows; then again, where no step may be skipped."""
    torch.set_num_threads(1)  # more threads than cores wait for each other for minutes
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
