"""Steps whose loss or gradient is not finite: skipped, counted, and at last left as a dump.

One such step may be a single odd batch, so it is skipped: weights, optimiser and teacher stay as
they are. More than `optim.max_skipped_steps` in a row mean that the weights themselves are at
fault; the run stops with a dump that `jobs/replay.py` looks into. Surprising: all workers must see
the same verdict, hence one tiny reduction a step, or they would part ways at the first skip.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.sharding import gathered
from pipeline.train_state import TrainState, Worker, gather_from_workers


class NonFiniteLossError(ArithmeticError):
    """Too many steps in a row were not finite; the model is as it was before the first of them."""


class NonFiniteGuard:
    """Judges every step of one worker, and remembers what the bad ones in a row were fed.

    Args:
        worker: this process.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._inputs: list[dict[str, Any]] = []  # of the step being computed
        self._streak: list[dict[str, Any]] = []

    def add_batch(self, batch: dict[str, Any]) -> None:
        """Note the samples of a micro-batch of the running step."""
        self._inputs.append(batch)

    def admits(self, state: TrainState, losses: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step may update the weights; counts it as skipped in `state` if not.

        Args:
            state: of the run, before the update.
            losses: of this worker's share, the total first.
            grad_norm: of the reduced gradients.
        """
        is_finite = torch.isfinite(grad_norm) & torch.isfinite(losses).all()
        if self._worker.world_size > 1:
            flag = is_finite.int()
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            is_finite = flag.bool()
        inputs, self._inputs = self._inputs, []
        if bool(is_finite):
            state.skipped_in_a_row = 0
            self._streak.clear()
            return True
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        self._streak.append(
            {
                "step": state.step,
                "rank": self._worker.rank,
                "losses": losses.tolist(),
                "grad_norm": float(grad_norm),
                "micro_batches": [
                    {key: batch[key].tolist() for key in ("position", "row") if key in batch}
                    for batch in inputs
                ],
            }
        )
        return False

    def dump(self, state: TrainState) -> dict[str, Any]:
        """Training state before the first step of the streak, and what each worker fed to them.

        All workers must call it. Only tensors and plain data.
        """
        steps = [step for part in gather_from_workers(self._streak, self._worker) for step in part]
        first = min(step["step"] for step in steps)
        whole = gathered(state.state_dict())
        return {**whole, "step": first, "skipped_in_a_row": 0, "streak": steps}


def non_finite_message(
    state: TrainState, losses: Tensor, grad_norm: Tensor, latest: dict[str, float]
) -> str:
    """What happened, the rule, the way out."""
    last = latest.get("train/loss", float("nan"))
    return (
        f"step {state.step + 1}: loss {float(losses[0]):.6g} with gradient norm "
        f"{float(grad_norm):.6g} is not finite, the {state.skipped_in_a_row}. such step in a row; "
        f"stopped before an update (last logged loss {last:.6g}). The newest checkpoint is intact; "
        "lower optim.lr or set optim.clip_grad_norm, and resume with --run.allow-config-change"
    )
