"""The trials of a sweep and the record of them, `trials.jsonl`, which a repeated sweep reads first.

Surprising: Ray Tune's own way to resume unpickles what it finds in a folder. Here a sweep that is
run again is given the same trials, in the same order, and those that are over tell again what they
had logged; only Optuna's later suggestions depend on anything but the seed and the number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.sweeps.space import Axis, grid_trials, random_trial

SearcherName = Literal["random", "grid", "optuna"]
Outcome = Literal["finished", "stopped early", "failed", "unfinished"]
TRIALS_FILE = "trials.jsonl"


class Ending(NamedTuple):
    """Why a trial is over."""

    outcome: Outcome
    reason: str
    """Of a failure."""


class Copy(NamedTuple):
    """A trial of a population that goes on from another one."""

    generation: int
    """That begins with it."""
    number: int
    donor: int
    """Trial whose checkpoint it takes."""
    overrides: dict[str, Any]
    """Its settings from then on."""


UNFINISHED = Ending("unfinished", "")


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has been suggested."""

    number: int
    overrides: dict[str, Any]
    """Dotted keys of the config -> values."""

    @property
    def name(self) -> str:
        """Folder of its run in the sweep's."""
        return f"trial_{self.number:04d}"


class TrialBook:
    """The record of a sweep: which trials there are and how they ended. One process writes it.

    Args:
        folder: the sweep's; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TRIALS_FILE
        self.trials: list[TrialRecord] = []
        self.endings: dict[int, Ending] = {}
        self.copies: list[Copy] = []
        self.generation = 0
        """Of a population: copies of all earlier ones are done."""
        for line in self._whole_lines():
            values = json.loads(line)
            if "donor" in values:
                self._note_copy(Copy(**values))
            elif "overrides" in values:
                self.trials.append(TrialRecord(values["number"], values["overrides"]))
            elif "outcome" in values:
                ending = Ending(values["outcome"], values["reason"])
                self.endings[values["number"]] = ending
            else:
                self.generation = values["generation"]

    def add(self, trial: TrialRecord) -> None:
        """Record a trial before it begins."""
        self._append({"number": trial.number, "overrides": trial.overrides})
        self.trials.append(trial)

    def end(self, number: int, outcome: Outcome, reason: str = "") -> None:
        """Record that a trial is over."""
        self._append({"number": number, "outcome": outcome, "reason": reason})
        self.endings[number] = Ending(outcome, reason)

    def copy(self, copy: Copy) -> None:
        """Record that a trial of a population is to go on from another one."""
        self._append(copy._asdict())
        self._note_copy(copy)

    def begin_generation(self, generation: int) -> None:
        """Record that all copies that a generation starts from are done."""
        self._append({"generation": generation})
        self.generation = generation

    def _note_copy(self, copy: Copy) -> None:
        self.copies.append(copy)
        self.trials[copy.number] = TrialRecord(copy.number, copy.overrides)

    def _append(self, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def _whole_lines(self) -> list[str]:
        """Lines of the file; half a line, left by a kill, is cut off first."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole.encode()))
        return whole.splitlines()


class Generator:
    """Overrides of the next trial, by number.

    Args:
        axes: what is varied.
        num_trials: trials wanted; a grid has as many as it has, at most this many are taken.
        seed: of random and Optuna's draws.
    """

    def __init__(self, axes: tuple[Axis, ...], *, num_trials: int, seed: int) -> None:
        self.axes = axes
        self.num_trials = num_trials
        self.seed = seed

    def suggest(self, number: int) -> dict[str, Any]:
        """Overrides of trial `number`; asked for in order."""
        return random_trial(self.axes, self.seed, number)

    def replay(self, trial: TrialRecord) -> None:
        """Take note of a trial suggested by an earlier start of the sweep."""

    def tell(self, number: int, outcome: Outcome, share: float, value: float | None) -> None:
        """How a trial ended: the share of its steps it did, and its metric there."""


class GridGenerator(Generator):
    """Every combination of the axes' values."""

    def __init__(self, axes: tuple[Axis, ...], *, num_trials: int, seed: int) -> None:
        self.trials = grid_trials(axes)
        num_trials = min(num_trials, len(self.trials)) if num_trials else len(self.trials)
        super().__init__(axes, num_trials=num_trials, seed=seed)

    def suggest(self, number: int) -> dict[str, Any]:
        """See `Generator.suggest`."""
        return self.trials[number]


class OptunaGenerator(Generator):
    """Optuna's tree-structured Parzen estimator, asked and told in process."""

    def __init__(self, axes: tuple[Axis, ...], *, num_trials: int, seed: int) -> None:
        import optuna

        super().__init__(axes, num_trials=num_trials, seed=seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(
                seed=seed, multivariate=True, warn_independent_sampling=False
            ),
        )
        self.asked: dict[int, Any] = {}

    def suggest(self, number: int) -> dict[str, Any]:
        """See `Generator.suggest`."""
        trial = self.asked[number] = self.study.ask()
        return {axis.key: _suggested(trial, axis) for axis in self.axes}

    def replay(self, trial: TrialRecord) -> None:
        """See `Generator.replay`."""
        by_index = {
            axis.key: index_of(axis, trial.overrides[axis.key])
            if axis.values
            else trial.overrides[axis.key]
            for axis in self.axes
        }
        self.study.enqueue_trial(by_index)
        again = self.suggest(trial.number)
        assert again == trial.overrides, f"Optuna was given {trial.overrides} and says {again}"

    def tell(self, number: int, outcome: Outcome, share: float, value: float | None) -> None:
        """See `Generator.tell`; a trial given up counts by the value it had."""
        from optuna.trial import TrialState

        trial = self.asked.pop(number)
        if outcome == "finished" and value is not None:
            self.study.tell(trial, value)
        elif outcome == "stopped early" and value is not None:
            trial.report(value, round(share * 1000))
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, state=TrialState.FAIL)


def _suggested(trial: Any, axis: Axis) -> Any:
    """Of a choice Optuna draws the index: it only knows plain values."""
    if axis.values:
        return axis.values[trial.suggest_categorical(axis.key, list(range(len(axis.values))))]
    if axis.kind == "int":
        return trial.suggest_int(axis.key, int(axis.low), int(axis.high))
    return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.kind == "loguniform")


def index_of(axis: Axis, value: Any) -> int:
    """Place of a value among those of its axis."""
    found = [i for i, known in enumerate(axis.values) if json.dumps(known) == json.dumps(value)]
    assert found, f"{axis.key}={value!r} is not among {axis.values}"
    return found[0]


GENERATORS: dict[SearcherName, Callable[..., Generator]] = {
    "random": Generator,
    "grid": GridGenerator,
    "optuna": OptunaGenerator,
}
