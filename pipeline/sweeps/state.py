"""What is known of a sweep's trials, over all its starts: who is next, given up, over.

No Ray here: `tuner.py` asks and tells.
"""

from __future__ import annotations

import contextlib
import logging

from pipeline.finetune_config import FinetuneConfig
from pipeline.metrics_file import read_records
from pipeline.sweeps.plan import SweepPlan
from pipeline.sweeps.stopping import create_stopping
from pipeline.sweeps.trials import GENERATORS, Outcome, TrialBook, TrialRecord

logger = logging.getLogger(__name__)


class SweepState:
    """What is known of a sweep's trials, over all its starts.

    Args:
        plan: the sweep.
    """

    is_waiting = False
    """Whether `next_trial` says None only because a running trial has to come further first."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        sweep = plan.sweep
        self.book = TrialBook(plan.folder)
        self.generator = GENERATORS[sweep.searcher](
            plan.axes, num_trials=sweep.num_trials, seed=sweep.sweep_seed
        )
        self.stopping = create_stopping(sweep.scheduler, sweep.grace, sweep.reduction_factor)
        self.last: dict[int, tuple[float, float]] = {}
        """Trial -> share of its steps and metric of its last evaluation."""
        self._num_steps: dict[int, int] = {}
        for trial in self.book.trials:
            self._recall(trial)
        self.waiting = [t for t in self.book.trials if t.number not in self.book.endings]

    def config_of(self, trial: TrialRecord) -> FinetuneConfig:
        """The run that a trial is given to do.

        Raises:
            ValueError: its values do not go together.
        """
        return self.plan.config_of(trial)

    def next_trial(self) -> TrialRecord | None:
        """A trial that an earlier start has left unfinished, or a new one; None: there are no more.

        Those whose values do not go together, or that are to be given up by what they had
        reported, are over without a start.
        """
        while (trial := self._waiting_or_new()) is not None:
            try:
                self.config_of(trial)
            except ValueError as error:
                self.end(trial.number, "failed", str(error))
                continue
            if not self.stopping.is_hopeless(trial.number):
                return trial
            self.end(trial.number, "stopped early")
        return None

    def _waiting_or_new(self) -> TrialRecord | None:
        if self.waiting:
            return self.waiting.pop(0)
        number = len(self.book.trials)
        if number >= self.generator.num_trials:
            return None
        trial = TrialRecord(number, self.generator.suggest(number))
        self.book.add(trial)
        return trial

    def leave(self, number: int, error: str) -> None:
        """Note that the run of a trial has ended, by itself or because it was told to.

        Args:
            number: the trial.
            error: why it failed; empty if it did not.
        """
        if error:
            self.end(number, "failed", error)
        elif self.is_finished(number):
            self.end(number, "finished")

    def report(self, number: int, step: int, value: float) -> bool:
        """Note an evaluation; whether the trial is hopeless."""
        share = step / self.num_steps(number)
        self.last[number] = share, value
        self.stopping.report(number, share, value)
        return self.stopping.is_hopeless(number)

    def end(self, number: int, outcome: Outcome, reason: str = "") -> None:
        """Note that a trial is over; what was noted first stays."""
        if number in self.book.endings:
            return
        self.book.end(number, outcome, reason)
        self._tell(number)
        name, metric = self.book.trials[number].name, self.plan.metric
        where = ""
        if number in self.last:
            share, value = self.last[number]
            where = f" at {share:.0%}, {metric} {value:.2f}"
        logger.info("%s  %s%s%s", name, outcome, where, f": {reason}" if reason else "")

    def _recall(self, trial: TrialRecord) -> None:
        """Take up a trial of an earlier start."""
        self.generator.replay(trial)
        folder = self.plan.folder / trial.name
        for record in read_records(folder / "metrics.jsonl"):
            if self.plan.metric in record:
                self.report(trial.number, record["step"], record[self.plan.metric])
        ending = self.book.endings.get(trial.number)
        if ending is not None and ending.outcome == "failed" and self.plan.sweep.retry_failed:
            del self.book.endings[trial.number]
        elif ending is None and self.is_finished(trial.number):  # killed before it was recorded
            self.book.end(trial.number, "finished")
        if trial.number in self.book.endings:
            self._tell(trial.number)

    def _tell(self, number: int) -> None:
        share, value = self.last.get(number, (0.0, None))
        self.stopping.end(number)
        self.generator.tell(number, self.book.endings[number].outcome, share, value)

    def num_steps(self, number: int) -> int:
        """Steps of a trial's run; of one that cannot run, those of the run that is varied."""
        if number not in self._num_steps:
            config = self.plan.base
            with contextlib.suppress(ValueError):
                config = self.plan.config_of(self.book.trials[number])
            self._num_steps[number] = self.plan.num_steps(config)
        return self._num_steps[number]

    def is_finished(self, number: int) -> bool:
        """Whether a trial's run has come to its end."""
        return (self.plan.folder / self.book.trials[number].name / "summary.json").exists()
