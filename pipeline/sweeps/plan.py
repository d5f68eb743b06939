"""What a sweep is: the run it varies, its axes, its folder; and the run of each trial."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.finetune_config import FinetuneConfig
from pipeline.finetuning_run import open_data
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.space import Axis
from pipeline.sweeps.trials import TrialRecord


@dataclass
class SweepPlan:
    """A sweep before it runs; the same command makes the same plan.

    Attributes:
        base: the run that is varied; run.name is the sweep's, paths are absolute.
        sweep: how many trials, who gives them up.
        axes: what is varied.
        metric: the task's main one; more is better.
        parent_run_id: MLflow run the trials are shown under.
    """

    base: FinetuneConfig
    sweep: SweepConfig
    axes: tuple[Axis, ...]
    metric: str
    parent_run_id: str = ""
    _num_samples: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        return Path(self.base.run.storage_path) / self.base.run.name

    def as_asked(self) -> dict[str, Any]:
        """Plain data that is the same for the same command."""
        return {
            "task": self.base.task,
            "config": config_to_dict(self.base),
            "sweep": config_to_dict(self.sweep),
            "space": {axis.key: config_to_dict(axis) for axis in self.axes},
        }

    def config_of(self, trial: TrialRecord) -> FinetuneConfig:
        """The run of a trial: in a folder in the sweep's, evaluated where it is judged.

        Raises:
            ValueError: the values of the trial do not go together.
        """
        config = apply_overrides(
            self.base,
            {
                **trial.overrides,
                "run.storage_path": str(self.folder),
                "run.name": trial.name,
                "tracking.parent_run_id": self.parent_run_id,
                "tracking.varied": tuple(trial.overrides),
            },
        )
        interval = self.interval(self.num_steps(config))
        every = min(config.run.evaluate_every_steps, interval)
        return apply_overrides(config, {"run.evaluate_every_steps": every})

    def interval(self, num_steps: int) -> int:
        """Steps between verdicts on a trial of so many steps."""
        return math.ceil(num_steps * self.sweep.grace)

    def num_steps(self, config: FinetuneConfig) -> int:
        """Steps of a trial's run."""
        if config.optim.num_steps is not None:
            return config.optim.num_steps
        path = config.data.path
        if path not in self._num_samples:
            self._num_samples[path] = open_data(config)[0].num_samples
        return config.num_steps(config.num_used(self._num_samples[path]))
