"""Who copies whom in a population, and that a kill at any moment changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoint import Checkpointer, load_state
from pipeline.config_values import apply_overrides
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.plan import SweepPlan
from pipeline.sweeps.population import PopulationState, check_population, decide, perturbed
from pipeline.sweeps.space import parse_axis, parse_space
from tests.pipeline.sweeps.test_tuner import METRIC, base

SPACE = {"optim.lr": "loguniform:1e-5:1e-2", "optim.layer_decay": "choice:0.65,0.8,0.95"}
AXES = parse_space(SPACE)


class KilledError(Exception):
    """The driver is no more."""


def plan(folder: Path, count: int = 5, **changes: Any) -> SweepPlan:
    sweep = SweepConfig(num_trials=count, scheduler="pbt", grace=1 / 3)
    made = SweepPlan(apply_overrides(base(folder), changes), sweep, AXES, METRIC)
    made.folder.mkdir(exist_ok=True)
    return made


def train(made: SweepPlan, state: PopulationState, kill_after: int = 10**6) -> int:
    """Pretend to train until the end, or until so many segments are done; how many were.

    A checkpoint holds every setting that its weights were trained with.
    """
    done = 0
    while (trial := state.next_trial()) is not None:
        if done == kill_after:
            raise KilledError
        config = state.config_of(trial)
        folder = made.folder / trial.name
        folder.mkdir(exist_ok=True)
        checkpointer = Checkpointer(folder / "checkpoints", keep=2, facts={})
        newest = checkpointer.latest()
        before = load_state(newest) if newest else {"step": 0, "history": []}
        step = config.run.pause_at_step or 90
        assert before["step"] < step
        history = [*before["history"], [trial.number, config.optim.lr, config.optim.layer_decay]]
        value = sum(-abs(np.log10(lr) + 3) for _, lr, _ in history)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, METRIC: float(value)}) + "\n")
        checkpointer.save(step, {"step": step, "history": history}, {"w": torch.zeros(1)})
        checkpointer.wait()
        if step == 90:
            (folder / "summary.json").write_text("{}")
        state.report(trial.number, step, float(value))
        state.leave(trial.number, "")
        done += 1
    assert not state.is_waiting
    return done


def histories(made: SweepPlan) -> list[Any]:
    """How the weights of every trial came about."""
    found = []
    for number in range(made.sweep.num_trials):
        newest = Checkpointer(
            made.folder / f"trial_{number:04d}" / "checkpoints", keep=2, facts={}
        ).latest()
        assert newest is not None
        found.append(load_state(newest)["history"])
    return found


def test_the_worst_go_on_from_the_best_with_other_settings(tmp_path: Path):
    made = plan(tmp_path)
    state = PopulationState(made)
    assert state.pauses == [30, 60, 90]
    assert train(made, state) == 15
    assert len(state.book.copies) == 2
    for copy in state.book.copies:
        assert copy.number != copy.donor
    last = state.book.copies[-1]
    assert last.generation == 2
    *before, now = histories(made)[last.number]
    assert before == histories(made)[last.donor][:-1]
    assert now == [last.number, last.overrides["optim.lr"], last.overrides["optim.layer_decay"]]
    assert {e.outcome for e in state.book.endings.values()} == {"finished"}


def test_a_kill_at_any_moment_ends_with_the_same_weights_and_settings(tmp_path: Path):
    made = plan(tmp_path)
    calm = PopulationState(made)
    train(made, calm)
    for kill_after in range(15):
        folder = tmp_path / str(kill_after)
        folder.mkdir()
        stormy = plan(folder)
        with pytest.raises(KilledError):
            train(stormy, PopulationState(stormy), kill_after)
        again = PopulationState(plan(folder))
        assert train(stormy, again) == 15 - kill_after
        assert again.book.trials == calm.book.trials
        assert histories(stormy) == histories(made)


@pytest.mark.parametrize("survives", range(5))
def test_a_kill_between_two_generations_is_made_good(tmp_path: Path, survives: int):
    """Two copies: four actions and the note that all is done; the kill comes before one of them."""
    made = plan(tmp_path, count=8)
    calm = PopulationState(made)
    train(made, calm)
    (tmp_path / "stormy").mkdir()
    stormy = plan(tmp_path / "stormy", count=8)
    state = PopulationState(stormy)
    actions: list[str] = []

    def dies(name: str, real: Any) -> Any:
        def action(*args: Any) -> None:
            if len(actions) == survives:
                raise KilledError
            actions.append(name)
            real(*args)

        return action

    for owner, name in (
        (state.book, "copy"),
        (state, "_copy_checkpoint"),
        (state.book, "begin_generation"),
    ):
        setattr(owner, name, dies(name, getattr(owner, name)))
    with pytest.raises(KilledError):
        train(stormy, state)
    again = PopulationState(plan(tmp_path / "stormy", count=8))
    train(stormy, again)
    assert again.book.copies == calm.book.copies
    assert again.book.trials == calm.book.trials
    assert histories(stormy) == histories(made)


def test_a_generation_waits_for_its_last_trial(tmp_path: Path):
    state = PopulationState(plan(tmp_path, count=2))
    assert [state.next_trial() is not None for _ in range(3)] == [True, True, False]
    assert state.is_waiting


def test_a_trial_that_fails_is_neither_copied_nor_waited_for(tmp_path: Path):
    made = plan(tmp_path, count=4)
    state = PopulationState(made)
    first = state.next_trial()
    assert first is not None
    state.leave(first.number, "loss is nan")
    train(made, state)
    assert first.number not in {n for c in state.book.copies for n in (c.number, c.donor)}
    outcomes = Counter(ending.outcome for ending in state.book.endings.values())
    assert outcomes == {"failed": 1, "finished": 3}


def test_a_quarter_copies_a_quarter_and_never_an_equal():
    settings = [{"optim.lr": 1e-3, "optim.layer_decay": 0.8}] * 8
    values = {number: float(number) for number in range(8)}
    copies = decide(values, settings, AXES, seed=0, generation=1)
    assert [copy.number for copy in copies] == [1, 0]
    assert {copy.donor for copy in copies} <= {6, 7}
    assert copies == decide(values, settings, AXES, seed=0, generation=1)
    assert copies != decide(values, settings, AXES, seed=1, generation=1)
    assert decide(dict.fromkeys(range(8), 1.0), settings, AXES, seed=0, generation=1) == []
    assert decide({3: 1.0}, settings, AXES, seed=0, generation=1) == []


def test_settings_move_a_step_or_are_drawn_again():
    generator = np.random.default_rng(0)
    lr, decay, depth = AXES[0], AXES[1], parse_axis("augment.x", "int:1:50")
    near = Counter(round(perturbed(lr, 1e-3, generator) / 1e-3, 6) for _ in range(1000))
    assert 320 < near[0.8] < 430 and 320 < near[1.2] < 430
    assert all(1e-5 <= perturbed(lr, 1.1e-5, generator) <= 1e-2 for _ in range(100))
    assert {perturbed(decay, 0.65, generator) for _ in range(100)} == {0.65, 0.8, 0.95}
    assert all(type(perturbed(depth, 10, generator)) is int for _ in range(100))


@pytest.mark.parametrize(
    ("space", "changes", "said"),
    [
        ({"run.seed": "grid:0,1"}, {}, "a run cannot change it on its way"),
        ({"optim.num_steps": "int:5:9"}, {}, "a run cannot change it on its way"),
        (SPACE, {"run.checkpoint_path": "s3://bucket/x"}, "between the folders of its trials"),
    ],
)
def test_what_a_population_cannot_do_is_refused(
    tmp_path: Path, space: dict[str, str], changes: dict[str, Any], said: str
):
    made = plan(tmp_path, **changes)
    made.axes = parse_space(space)
    with pytest.raises(ValueError, match=said):
        check_population(made)
    with pytest.raises(ValueError, match="at least 2"):
        check_population(plan(tmp_path, count=1))
