"""Population-based training (arXiv 1711.09846): the worst trials go on from copies of the best.

All trials run to the same step, which ends a generation. Then each of the worst quarter takes the
checkpoint of one of the best quarter, and its settings, changed at random. Ray Tune's scheduler
does so whenever a trial happens to come by; here a generation waits for its last trial, and who
copies whom is a function of the metrics, the seed and the generation, so a sweep that was killed
goes on to the same result. Perturbations are Ray's: a factor of 0.8 or 1.2, the next value of a
choice, or one time in four a new draw.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint import problem_of
from pipeline.config_values import apply_overrides
from pipeline.finetune_config import FinetuneConfig
from pipeline.metrics_file import read_records
from pipeline.sweeps.plan import SweepPlan
from pipeline.sweeps.space import Axis
from pipeline.sweeps.state import SweepState
from pipeline.sweeps.trials import Copy, TrialRecord, index_of

logger = logging.getLogger(__name__)
_QUANTILE = 0.25
_RESAMPLED = 0.25
_FACTORS = (0.8, 1.2)
_CHANGEABLE = ("optim.", "augment.", "model.drop_path_rate")
_LENGTHS = ("optim.num_steps", "optim.num_epochs")


def check_population(plan: SweepPlan) -> None:
    """Refuse what a run cannot change on its way.

    Raises:
        ValueError: such an axis, fewer than two trials, or checkpoints that are not local.
    """
    for axis in plan.axes:
        if not axis.key.startswith(_CHANGEABLE) or axis.key in _LENGTHS:
            raise ValueError(
                f"space.{axis.key}: a run cannot change it on its way, as --scheduler pbt does; "
                "vary optim.*, augment.* or model.drop_path_rate, or choose another scheduler"
            )
    if plan.sweep.num_trials < 2:
        raise ValueError(f"num_trials={plan.sweep.num_trials}: a population has at least 2")
    if plan.base.run.checkpoint_path:
        raise ValueError(
            "run.checkpoint_path: a population copies checkpoints between the folders of its "
            "trials; leave it empty"
        )


def decide(
    values: Mapping[int, float],
    overrides: Sequence[dict[str, Any]],
    axes: Sequence[Axis],
    *,
    seed: int,
    generation: int,
) -> list[Copy]:
    """Who goes on from whom.

    Args:
        values: trial -> metric at the end of a generation; those that failed are not among them.
        overrides: settings of every trial.
        axes: what is varied.
        seed: of the sweep.
        generation: the one that begins.
    """
    order = sorted(values, key=lambda number: (-values[number], number))
    count = max(1, int(len(order) * _QUANTILE))
    best, worst = order[:count], order[max(count, len(order) - count) :]
    copies = []
    for number in worst:
        generator = np.random.default_rng([seed, generation, number])
        donor = best[int(generator.integers(len(best)))]
        if values[donor] > values[number]:
            changed = {
                axis.key: perturbed(axis, overrides[donor][axis.key], generator) for axis in axes
            }
            copies.append(Copy(generation, number, donor, changed))
    return copies


def perturbed(axis: Axis, value: Any, generator: np.random.Generator) -> Any:
    """A value near another one on its axis, or one time in four anywhere on it."""
    if generator.random() < _RESAMPLED:
        return axis.at(generator.random())
    is_up = generator.random() < 0.5
    if axis.values:
        place = index_of(axis, value) + (1 if is_up else -1)
        return axis.values[min(max(place, 0), len(axis.values) - 1)]
    changed = min(max(value * _FACTORS[is_up], axis.low), axis.high)
    return round(changed) if axis.kind == "int" else changed


class PopulationState(SweepState):
    """The trials of a population: each comes up once a generation, until the next pause.

    Args:
        plan: the sweep.
    """

    def __init__(self, plan: SweepPlan) -> None:
        super().__init__(plan)
        num_steps = plan.num_steps(plan.base)
        every = plan.interval(num_steps)
        self.pauses = [*range(every, num_steps, every), num_steps]
        """Step that ends each generation."""
        self._running: set[int] = set()
        self._was_up: set[int] = set()
        while len(self.book.trials) < self.generator.num_trials:
            number = len(self.book.trials)
            self.book.add(TrialRecord(number, self.generator.suggest(number)))

    def config_of(self, trial: TrialRecord) -> FinetuneConfig:
        """See `SweepState.config_of`: with a pause, except in the last generation."""
        pause = self.pauses[self.book.generation]
        is_last = pause == self.pauses[-1]
        changes = {"run.pause_at_step": 0 if is_last else pause, "run.allow_config_change": True}
        return apply_overrides(super().config_of(trial), changes)

    def next_trial(self) -> TrialRecord | None:
        """See `SweepState.next_trial`."""
        while True:
            for trial in self.book.trials:
                if not self._is_through(trial.number) and trial.number not in self._was_up:
                    self._running.add(trial.number)
                    self._was_up.add(trial.number)
                    return trial
            self.is_waiting = bool(self._running)
            if self._running or self.book.generation == len(self.pauses) - 1:
                return None
            self._next_generation()

    def leave(self, number: int, error: str) -> None:
        """See `SweepState.leave`."""
        super().leave(number, error)
        self._running.discard(number)

    def _is_through(self, number: int) -> bool:
        """Whether a trial needs no more work in this generation."""
        if number in self.book.endings:
            return True
        pause = self.pauses[self.book.generation]
        is_last = pause == self.pauses[-1]
        return not is_last and self._checkpoint(number, pause) is not None

    def _next_generation(self) -> None:
        step, generation = self.pauses[self.book.generation], self.book.generation + 1
        values = {
            trial.number: value
            for trial in self.book.trials
            if trial.number not in self.book.endings
            and self._checkpoint(trial.number, step) is not None
            and (value := self._value_at(trial.number, step)) is not None
        }
        settings = [trial.overrides for trial in self.book.trials]
        seed = self.plan.sweep.sweep_seed
        # A kill may have come in the middle of this: the same copies again, which does no harm.
        for copy in decide(values, settings, self.plan.axes, seed=seed, generation=generation):
            if copy not in self.book.copies:
                self.book.copy(copy)
            self._copy_checkpoint(copy, step)
            logger.info(
                "%s goes on from trial %d at step %d with %s",
                *(self.book.trials[copy.number].name, copy.donor, step, copy.overrides),
            )
        self.book.begin_generation(generation)
        self._was_up.clear()

    def _copy_checkpoint(self, copy: Copy, step: int) -> None:
        """Let a trial's folder hold the donor's checkpoint and no other."""
        source = self._checkpoint(copy.donor, step)
        assert source is not None, f"trial {copy.donor} has no checkpoint of step {step}"
        target = self.plan.folder / self.book.trials[copy.number].name / "checkpoints"
        partial = target.with_name(".checkpoints.part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial / source.name)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)

    def _checkpoint(self, number: int, step: int) -> Path | None:
        folder = self.plan.folder / self.book.trials[number].name / "checkpoints"
        path = folder / f"step_{step:08d}"
        return path if path.is_dir() and problem_of(path) is None else None

    def _value_at(self, number: int, step: int) -> float | None:
        folder, metric = self.plan.folder / self.book.trials[number].name, self.plan.metric
        found = [
            record[metric]
            for record in read_records(folder / "metrics.jsonl")
            if record["step"] == step and metric in record
        ]
        return found[-1] if found else None


def create_state(plan: SweepPlan) -> SweepState:
    """The state of a sweep, or of a population."""
    return (PopulationState if plan.sweep.scheduler == "pbt" else SweepState)(plan)
