"""What a sweep is told besides the run it varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from pipeline.config import require_choice, require_not_negative, require_positive
from pipeline.sweeps.stopping import SchedulerName
from pipeline.sweeps.trials import SearcherName


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Trials, and when to give one up."""

    num_trials: int = 20
    """Trials; of a grid, at most this many."""
    searcher: SearcherName = "random"
    """Where values come from: draws, every combination, or Optuna's TPE."""
    scheduler: SchedulerName = "asha"
    """Who gives up hopeless trials: ASHA (successive halving), the median rule, nobody; or pbt,
    population-based training, where the worst go on from copies of the best."""
    sweep_seed: int = 0
    """Of the values; the runs keep run.seed, unless that is varied."""
    grace: float = 1 / 9
    """Share of its steps before which no trial is given up; it is evaluated at least so often. Of a
    population: the share after which the worst are replaced, again and again."""
    reduction_factor: float = 3.0
    """ASHA goes on with the best 1 in this many at each rung."""
    max_concurrent_trials: int = 0
    """Trials at a time; 0: as many as the cluster has room for."""
    retry_failed: bool = False
    """Of a sweep that is run again: give trials that failed another try."""
    register: bool = True
    """Put the best model into MLflow's registry, under the sweep's name."""

    def __post_init__(self) -> None:
        require_positive("num_trials", self.num_trials)
        require_choice("searcher", self.searcher, get_args(SearcherName))
        require_choice("scheduler", self.scheduler, get_args(SchedulerName))
        for key in ("sweep_seed", "max_concurrent_trials"):
            require_not_negative(key, getattr(self, key))
        if not 0 < self.grace < 1:
            raise ValueError(f"grace={self.grace} must lie in (0, 1), a share of a trial's steps")
        if self.reduction_factor <= 1:
            raise ValueError(f"reduction_factor={self.reduction_factor} must be > 1; use 3")
