"""The record of a sweep's trials, and where new ones come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.sweeps.space import parse_axis
from pipeline.sweeps.trials import GENERATORS, Ending, TrialBook, TrialRecord

AXES = (
    parse_axis("optim.lr", "loguniform:1e-5:1e-2"),
    parse_axis("optim.layer_decay", "choice:0.55,0.65,0.75"),
)


def test_a_record_survives_and_half_a_line_is_no_trial(tmp_path: Path):
    trials = [TrialRecord(i, {"optim.lr": 1e-3 * i, "data.path": "a ü b"}) for i in range(3)]
    book = TrialBook(tmp_path)
    for trial in trials:
        book.add(trial)
    book.end(1, "failed", "loss is nan")
    assert TrialBook(tmp_path).trials == book.trials == trials
    assert TrialBook(tmp_path).endings == book.endings == {1: Ending("failed", "loss is nan")}
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    again = TrialBook(tmp_path)
    assert again.trials == trials and again.endings == {}
    again.end(1, "failed", "loss is nan")
    assert path.read_bytes() == whole
    assert trials[2].name == "trial_0002"


def test_nothing_recorded_is_no_trials(tmp_path: Path):
    book = TrialBook(tmp_path)
    assert book.trials == [] and book.endings == {}


def suggestions(name: Any, seed: int, count: int = 8) -> list[dict[str, Any]]:
    generator = GENERATORS[name](AXES, num_trials=count, seed=seed)
    found = []
    for number in range(count):
        found.append(generator.suggest(number))
        generator.tell(number, "finished", 1.0, found[-1]["optim.lr"])
    return found


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_the_same_seed_gives_the_same_trials(name: str):
    assert suggestions(name, 0) == suggestions(name, 0) != suggestions(name, 1)


def test_random_trials_do_not_depend_on_how_many_there_are():
    assert suggestions("random", 0, 3) == suggestions("random", 0, 8)[:3]


def test_optuna_goes_on_from_a_record_as_it_would_have(tmp_path: Path):
    axes = (*AXES, parse_axis("data.crop_scale", "choice:[0.1,1.0],[0.7,1.0]"))
    endings = ["finished", "stopped early", "failed", "finished", "finished"]

    def told(generator: Any, number: int) -> None:
        generator.tell(number, endings[number], 0.5, 40.0 + number)

    first = GENERATORS["optuna"](axes, num_trials=9, seed=0)
    book = TrialBook(tmp_path)
    for number in range(5):
        book.add(TrialRecord(number, first.suggest(number)))
        told(first, number)
    again = GENERATORS["optuna"](axes, num_trials=9, seed=0)
    for trial in TrialBook(tmp_path).trials:
        again.replay(trial)
        told(again, trial.number)
    states = [[(t.state, t.params, t.value) for t in g.study.trials] for g in (first, again)]  # type: ignore[attr-defined]
    assert states[0] == states[1]
    assert len(again.suggest(5)) == 3


def test_optuna_finds_the_better_half():
    generator = GENERATORS["optuna"](AXES, num_trials=40, seed=0)
    for number in range(40):
        value = generator.suggest(number)["optim.lr"]
        generator.tell(number, "finished", 1.0, -abs(value - 1e-4))
    late = [abs(t.params["optim.lr"] - 1e-4) for t in generator.study.trials[20:]]  # type: ignore[attr-defined]
    early = [abs(t.params["optim.lr"] - 1e-4) for t in generator.study.trials[:10]]  # type: ignore[attr-defined]
    assert sorted(late)[10] < sorted(early)[5]


def test_a_grid_has_as_many_trials_as_combinations_or_as_were_asked_for():
    axes = (AXES[1], parse_axis("run.seed", "grid:0,1"))
    assert GENERATORS["grid"](axes, num_trials=100, seed=0).num_trials == 6
    few = GENERATORS["grid"](axes, num_trials=4, seed=0)
    assert few.num_trials == 4
    assert few.suggest(3) == {"optim.layer_decay": 0.65, "run.seed": 1}
