"""The command line of a sweep."""

from __future__ import annotations

import pytest

from pipeline.sweeps.command import parse_sweep_command, take_space
from pipeline.sweeps.space_recipes import SPACES

WORDS = ["--init", "scratch", "--data.path", "a", "--data.val-path", "b", "--run.name", "lr"]


def test_settings_of_the_sweep_and_of_the_runs_stand_in_any_order():
    argv = ["classify", "small-classify", "--num-trials", "8", *WORDS, "--scheduler", "median"]
    argv += ["--space.optim.lr=loguniform:1e-4:1e-2", "--space.init", "choice:scratch,runs/demo"]
    command = parse_sweep_command(argv, "usage")
    assert command.base.data.path == "a" and command.base.run.name == "lr"
    assert (command.sweep.num_trials, command.sweep.scheduler) == (8, "median")
    assert [axis.key for axis in command.axes] == ["optim.lr", "init.path"]
    assert command.axes[1].values == ("scratch", "runs/demo")
    assert command.recipe.run.name == "small-classify"
    assert command.single == "python -m jobs.finetune classify small-classify"


def test_a_named_space_may_be_added_to_and_overruled():
    texts, rest = take_space(
        ["--space", "lr-decay", "--space.optim.lr", "uniform:1:2", "--space.run.seed=grid:0,1", "x"]
    )
    assert rest == ["x"]
    assert texts == SPACES["lr-decay"] | {"optim.lr": "uniform:1:2", "run.seed": "grid:0,1"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--space.optim.lr"], "--space.optim.lr needs a value"),
        (["--space.optim.lr", "--space.run.seed", "grid:0,1"], "--space.optim.lr needs a value"),
        (["--space.optim.lr=grid:1,2", "--space.optim.lr", "grid:1,3"], "given twice"),
        (["--space.optim.layer-decay", "grid:1", "--space.optim.layer_decay=grid:0.5"], "twice"),
        (["--space", "lr-decoy"], "did you mean 'lr-decay'"),
    ],
)
def test_a_space_that_cannot_be_read_is_refused(argv: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        take_space(argv)


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["classify"], 2, "the usage"),
        (["paint", "small-classify"], 2, "the usage"),
        (["--help"], 0, "the usage"),
        (["classify", "small-classfy", *WORDS], 2, "did you mean 'small-classify'"),
        (["classify", "small-classify", *WORDS, "--optim.lrr", "1"], 2, "optim.lrr"),
        (["classify", "small-classify", "--num-trials", "many"], 2, "many"),
        (["classify", "small-classify", "--help"], 0, "--num-trials"),
    ],
)
def test_a_wrong_command_line_ends_with_help(
    argv: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        parse_sweep_command(argv, "the usage")
    assert caught.value.code == status
    output = capsys.readouterr()
    assert said in (output.out if status == 0 else output.err)
