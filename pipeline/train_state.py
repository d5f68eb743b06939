"""What a training worker is and has: its place among the others, and the state a checkpoint holds.

Surprising: the data cursor is the step alone. Which samples, crops and masks a step uses is a
function of (seed, step), so nothing has to be replayed or skipped, and no generator's state kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from models.teacher import EMATeacher
from models.weights import load_weights
from pipeline.checkpoint import Checkpointer, load_state, step_of
from pipeline.objectives import objective_of
from pipeline.optim import build_optimizer
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_weights import PretrainWeights
from pipeline.quarantine import BadSample
from pipeline.teachers import frozen_teacher


class Worker(NamedTuple):
    """Where this process stands among the training workers."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


@dataclass
class TrainState:
    """Everything a checkpoint must hold to continue as if nothing had happened."""

    model: Any
    """A PretrainingModel, or a downstream model."""
    teacher: Any
    """A `models.teacher.Teacher`: of pre-training that predicts features."""
    optimizer: torch.optim.Optimizer
    ema: Any = None
    """Moving average of the weights (timm's ModelEmaV3) of fine-tuning that asks for one."""
    step: int = 0
    """Steps done, skipped ones among them; also the cursor in the sample stream."""
    skipped_steps: int = 0
    """Steps that did not update the weights, because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """The newest of them, if they were the last steps."""
    quarantine: dict[str, BadSample] = field(default_factory=dict)
    """Bad samples met so far, by where they are."""

    @classmethod
    def build(
        cls,
        config: PretrainConfig,
        device: torch.device,
        weights: PretrainWeights = PretrainWeights(),
    ) -> TrainState:
        """Fresh state; random weights depend on the seed alone.

        Raises:
            ValueError: the initial weights or those of the teacher do not fit.
        """
        teacher: Any = frozen_teacher(config, weights.teacher, device)
        torch.manual_seed(config.run.seed)
        model: Any = objective_of(config).build(teacher).to(device)
        if weights.init.state is not None:
            load_weights(model, weights.init.state)
        if teacher is None and config.has_teacher:
            teacher = EMATeacher(
                model.encoder.backbone, teacher_input=config.objective.teacher_input
            )
        optimizer = build_optimizer(
            model,
            lr=config.lr,
            weight_decay=config.optim.weight_decay,
            betas=config.optim.betas,
        )
        return cls(model, teacher, optimizer)

    @property
    def average(self) -> EMATeacher | None:
        """The teacher that follows the student; None for a frozen one, or without any."""
        return self.teacher if isinstance(self.teacher, EMATeacher) else None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data only."""
        return {
            "model": self.model.state_dict(),
            "teacher": self.average.state_dict() if self.average else {},
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "quarantine": [list(sample) for sample in self.quarantine.values()],
            "torch_rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["teacher"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        # The settings of the groups are the config's: a run that goes on with others means them.
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        bad = [BadSample(*values) for values in state["quarantine"]]
        self.quarantine = {sample.path: sample for sample in bad}
        torch.set_rng_state(state["torch_rng"])

    def restore(self, checkpointer: Checkpointer, worker: Worker) -> None:
        """Take over the newest valid checkpoint, if there is one; all workers the same.

        Worker 0 chooses, so that a checkpoint only one of them finds damaged divides nobody.
        """
        newest = checkpointer.latest() if worker.is_rank_zero else None
        step = max_over_workers(step_of(newest) if newest else -1, worker)
        if step >= 0:
            self.load_state_dict(load_state(newest or checkpointer.fetch(step)))


def max_over_workers(value: int, worker: Worker) -> int:
    """The largest of every worker's value, on each of them. All must call it."""
    if worker.world_size == 1:
        return value
    tensor = torch.tensor(value, device=worker.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def share_quarantine(state: TrainState, new: list[BadSample], worker: Worker) -> bool:
    """Add every worker's new bad samples to each worker's quarantine; True when there were any."""
    before = len(state.quarantine)
    for part in gather_from_workers(new, worker):
        state.quarantine |= {sample.path: sample for sample in part}
    return len(state.quarantine) > before


def gather_from_workers(value: Any, worker: Worker) -> list[Any]:
    """Every worker's value, by rank, on each of them. All must call it."""
    if worker.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * worker.world_size
    dist.all_gather_object(gathered, value)
    return gathered
