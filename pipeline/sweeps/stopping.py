"""Which trials are hopeless: successive halving and the median rule, in the order of the trials.

Ray Tune's schedulers compare a trial with whatever others have reported by then, so which trials
survive depends on timing. Here trial i is compared with trials 0 to i - 1 alone, and not before
each of them has come as far or is over. So the same trials are given up on any cluster, and after
any kill. While a verdict waits for others the trial goes on; if it comes to its end, it has
finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

SchedulerName = Literal["asha", "median", "pbt", "none"]
History = list[float]
"""Values of a trial at the rungs it has reached, from the first."""
Rule = Callable[[History, Sequence[History]], bool]
"""Whether a trial is hopeless at its last rung, beside others that have reached it."""
_LEAST_OTHERS = 3
_ROUNDING = 1e-9


def halving(reduction_factor: float) -> Rule:
    """Asynchronous successive halving (arXiv 1810.05934): only the best 1 / factor goes on.

    As Ray's AsyncHyperBandScheduler: worse than the (1 - 1 / factor) quantile of the others.
    """

    def is_hopeless(mine: History, others: Sequence[History]) -> bool:
        if not others:
            return False
        last = [history[-1] for history in others]
        return mine[-1] < float(np.percentile(last, (1 - 1 / reduction_factor) * 100))

    return is_hopeless


def median_rule(mine: History, others: Sequence[History]) -> bool:
    """Google Vizier's rule: the best value so far is below the median of the others' means."""
    if len(others) < _LEAST_OTHERS:
        return False
    return max(mine) < float(np.median([np.mean(history) for history in others]))


def rungs_of(scheduler: SchedulerName, grace: float, reduction_factor: float) -> tuple[float, ...]:
    """Shares of a trial's steps at which it is judged: grace, then times the factor (halving) or
    every multiple (median), below 1."""
    if scheduler in ("none", "pbt"):
        return ()
    if scheduler == "asha":
        count = math.ceil(math.log(1 / grace) / math.log(reduction_factor) - _ROUNDING)
        return tuple(grace * reduction_factor**k for k in range(count))
    return tuple(grace * k for k in range(1, math.ceil(1 / grace - _ROUNDING)))


class OrderedStopping:
    """Judges trials by what they report.

    Args:
        rungs: shares of a trial's steps, rising.
        rule: says who is hopeless at a rung.
    """

    def __init__(self, rungs: Sequence[float], rule: Rule) -> None:
        self.rungs = tuple(rungs)
        self.rule = rule
        self._histories: dict[int, History] = {}
        self._over: set[int] = set()
        self._verdicts: dict[tuple[int, int], bool] = {}

    def report(self, number: int, share: float, value: float) -> None:
        """Note an evaluation of a trial; the first one at or after a rung counts there.

        Args:
            number: the trial.
            share: of its steps that it has done.
            value: more is better.
        """
        history = self._histories.setdefault(number, [])
        while len(history) < len(self.rungs) and share >= self.rungs[len(history)] - _ROUNDING:
            history.append(value)

    def end(self, number: int) -> None:
        """Note that a trial is over, however: nobody waits for it any more."""
        self._over.add(number)

    def is_hopeless(self, number: int) -> bool:
        """Whether the trial is to be given up; False as long as that is not known."""
        reached = len(self._histories.get(number, ()))
        return any(self._verdict(number, rung) for rung in range(reached))

    def _verdict(self, number: int, rung: int) -> bool | None:
        """Of a trial at a rung; None while it, or one it is compared with, is not there."""
        key = (number, rung)
        if key in self._verdicts:
            return self._verdicts[key]
        mine = self._histories.get(number, [])
        if len(mine) <= rung:
            return None
        others = []
        for other in range(number):
            history = self._settled(other, rung)
            if history is None:
                return None
            if history:
                others.append(history)
        self._verdicts[key] = self.rule(mine[: rung + 1], others)
        return self._verdicts[key]

    def _settled(self, number: int, rung: int) -> History | None:
        """What a trial counts for at a rung; empty if it never gets there, None if unknown yet."""
        history = self._histories.get(number, [])
        for earlier in range(min(rung, len(history))):
            verdict = self._verdict(number, earlier)
            if verdict is None:
                return None
            if verdict:
                return []  # whatever it did before it could be stopped
        if len(history) > rung:
            return history[: rung + 1]
        return [] if number in self._over else None


def create_stopping(
    scheduler: SchedulerName, grace: float, reduction_factor: float
) -> OrderedStopping:
    """The stopping that a sweep asks for."""
    rule = median_rule if scheduler == "median" else halving(reduction_factor)
    return OrderedStopping(rungs_of(scheduler, grace, reduction_factor), rule)
