"""What happens between two steps of either loop: log, evaluate, draw, save, stop.

Surprising: every worker goes through all of it, because some of it is a reduction over workers that
each of them must join; only worker 0 calls outwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint import Checkpointer
from pipeline.config import TrainingConfig
from pipeline.metrics import Meter, peak_memory_gib
from pipeline.quarantine import BadSample, check_bad_fraction
from pipeline.sharding import Whole, gathered_on_rank_zero, is_sharded
from pipeline.train_state import TrainState, Worker, max_over_workers, share_quarantine


@dataclass(frozen=True)
class Hooks:
    """What a loop calls outwards. Called on every worker unless said otherwise."""

    on_start: Callable[[int], None] = lambda step: None
    """Once, with the step the run starts at."""
    on_step: Callable[[int], None] = lambda step: None
    """After every step and all that is due after it."""
    on_metrics: Callable[[int, dict[str, float]], bool] = lambda step, metrics: False
    """At log steps, worker 0 only; returns True to ask for a clean stop."""
    wants_checkpoint: Callable[[int], bool] = lambda step: False
    """At log steps; returns True to ask for a checkpoint now."""
    on_quarantine: Callable[[list[BadSample]], None] = lambda samples: None
    """When there are new bad samples, with all of them; worker 0 only."""
    on_picture: Callable[[int, str, bytes], None] = lambda step, kind, png: None
    """At picture steps, with the kind of the picture (a folder name), worker 0 only."""
    on_checkpoint: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    """After a checkpoint was handed to the checkpointer, with the latest metrics."""
    on_non_finite: Callable[[dict[str, Any]], None] = lambda dump: None
    """Before NonFiniteLossError, worker 0 only, with a state that replays the steps."""


class Step(NamedTuple):
    """What a loop tells of a step it has done."""

    losses: Tensor
    """(L,) this worker's share, in the order of `loss_names`; bad samples count as 0."""
    num_bad: int
    """Bad samples of this worker."""
    grad_norm: Tensor
    schedules: dict[str, float]
    is_skipped: bool
    """It was not finite and did not update the weights."""


@dataclass
class BetweenSteps:
    """Keeps a run's records; one object a run of the loop.

    Attributes:
        evaluate: metrics of a state, over all workers; all of them call it.
        draw: pictures of a state by kind; worker 0 calls it.
        export: the tensors of `Checkpointer.save` besides the state.
        whole: what `evaluate` and `draw` get of a state; all workers call it.
    """

    config: TrainingConfig
    num_samples: int
    loss_names: Sequence[str]
    checkpointer: Checkpointer
    worker: Worker
    hooks: Hooks
    evaluate: Callable[[TrainState], dict[str, float]]
    draw: Callable[[TrainState], dict[str, bytes]]
    export: Callable[[TrainState], dict[str, Tensor]]
    whole: Whole = lambda state: state

    def __post_init__(self) -> None:
        self.meter = Meter(self.config.data.global_batch_size)
        self.new_bad: list[BadSample] = []
        """Bad samples of this worker that the others do not know of yet."""
        self.latest: dict[str, float] = {}
        """The newest value of every metric."""

    def is_at_pause(self, state: TrainState) -> bool:
        """Whether the run is to leave where it is, short of its end."""
        is_short = state.step < self.config.num_steps(self.num_samples)
        return is_short and 0 < self.config.run.pause_at_step <= state.step

    def after(self, state: TrainState, step: Step) -> bool:
        """Do what is due after a step; whether the run is to stop. All workers must call it.

        Raises:
            TooManyBadSamplesError: at a log step.
        """
        run, hooks, is_rank_zero = self.config.run, self.hooks, self.worker.is_rank_zero
        self.meter.step_done()
        is_final = state.step == self.config.num_steps(self.num_samples)
        is_pausing = self.is_at_pause(state)
        is_ending = is_final or is_pausing
        is_logging = is_ending or step.is_skipped or state.step % run.log_every_steps == 0
        is_evaluating = is_ending or state.step % run.evaluate_every_steps == 0
        is_saving = is_ending or state.step % run.checkpoint_every_steps == 0
        is_stopping = False
        # Whenever a record may end the run, or a checkpoint is due.
        if is_logging or is_evaluating or is_saving:
            if share_quarantine(state, self.new_bad, self.worker) and is_rank_zero:
                hooks.on_quarantine(list(state.quarantine.values()))
            self.new_bad = []
        record = self._record(state, step) if is_logging else {}
        # Compiling for the few forwards of an evaluation would take longer than they do.
        with self.meter.paused(), torch.compiler.set_stance("force_eager"):
            if is_evaluating:
                record |= self.evaluate(self.whole(state))
            if record:
                self.latest |= record
                wants_stop = is_rank_zero and hooks.on_metrics(state.step, record)
                wants_save = hooks.wants_checkpoint(state.step)
                wish = max_over_workers(2 * wants_stop + wants_save, self.worker)
                is_stopping = wish >= 2 and not is_final
                is_saving |= wish > 0
                check_bad_fraction(
                    state.quarantine.values(),
                    self.num_samples,
                    self.config.data.max_bad_fraction,
                    "data.max_bad_fraction",
                )
            if is_final or state.step % run.picture_every_steps == 0:
                self._draw(state)
            if is_saving:
                self._save(state)
            hooks.on_step(state.step)
        return is_stopping or is_pausing

    def _record(self, state: TrainState, step: Step) -> dict[str, float]:
        batch = self.config.data.global_batch_size
        record = loss_metrics(step.losses, self.loss_names, step.num_bad, batch)
        record |= {"train/grad_norm": float(step.grad_norm), **step.schedules}
        record = {key: value for key, value in record.items() if math.isfinite(value)}
        record["train/skipped_steps"] = float(state.skipped_steps)
        record["train/epoch"] = state.step * batch / self.num_samples
        record["data/bad_samples"] = float(len(state.quarantine))
        return record | self.meter.metrics() | peak_memory_gib(self.worker.device)

    def _draw(self, state: TrainState) -> None:
        whole = self.whole(state)
        if self.worker.is_rank_zero:
            for kind, png in self.draw(whole).items():
                self.hooks.on_picture(state.step, kind, png)

    def _save(self, state: TrainState) -> None:
        if self.worker.is_rank_zero or is_sharded(state.model):
            parts = state.state_dict(), self.export(state)
            values, weights = gathered_on_rank_zero(parts)
        if self.worker.is_rank_zero:
            samples_seen = state.step * self.config.data.global_batch_size
            cursor = {"samples_seen": samples_seen, "epoch": samples_seen // self.num_samples}
            self.checkpointer.save(state.step, values | cursor, weights)
        self.hooks.on_checkpoint(state.step, self.latest)

    def summary(self, state: TrainState, *, is_stopped: bool) -> dict[str, Any]:
        """What a loop returns, once the last checkpoint is written or has failed."""
        self.checkpointer.wait()
        if not self.latest:  # killed after the last checkpoint: nothing left to train
            self.latest |= self.evaluate(self.whole(state))
        return {
            "steps": state.step,
            "is_stopped": is_stopped,
            "bad_samples": sorted(state.quarantine),
            "skipped_steps": state.skipped_steps,
            **self.meter.totals(),
            "metrics": self.latest,
        }


def loss_metrics(
    losses: Tensor, names: Sequence[str], num_bad: int, global_batch_size: int
) -> dict[str, float]:
    """train/* of a step: means over the good samples of all workers. All must call it.

    Args:
        losses: (L,) of this worker, where bad samples count as 0.
        names: of the first losses; further ones are left out.
        num_bad: bad samples of this worker.
        global_batch_size: samples of the step.
    """
    sums = torch.cat([losses, losses.new_tensor([num_bad])])
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums[:-1] /= dist.get_world_size()
    *means, bad = sums.tolist()
    scale = global_batch_size / max(1, global_batch_size - bad)
    return {f"train/{name}": mean * scale for name, mean in zip(names, means, strict=False)}
