"""The command line of a sweep: a task, a recipe, what is varied, and settings of the sweep and of
the run it varies."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import tyro

from pipeline.cli import get_recipe, parse_recipe_command
from pipeline.finetune_config import FinetuneConfig, Task
from pipeline.finetune_recipes import FINETUNE_RECIPES
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.space import Axis, parse_space
from pipeline.sweeps.space_recipes import get_space

_SPACE, _HELP = "--space", ("-h", "--help")


@dataclass(frozen=True)
class SweepCommand:
    """A parsed command line."""

    base: FinetuneConfig
    """The run that is varied."""
    recipe: FinetuneConfig
    """The same without the overrides of the command line."""
    sweep: SweepConfig
    axes: tuple[Axis, ...]
    single: str
    """How one run of the recipe is started."""


def parse_sweep_command(argv: Sequence[str], usage: str) -> SweepCommand:
    """Parse `TASK RECIPE --space.KEY TEXT ... [--SWEEP-SETTING VALUE] [--section.field VALUE]`.

    Prints help or an error and exits (status 2 for a wrong command line), as tyro does.

    Args:
        argv: without the program.
        usage: printed where task or recipe are missing.

    Raises:
        ValueError: a space that cannot be read.
    """
    tasks = get_args(Task)
    if len(argv) < 2 or argv[0] not in tasks or argv[1].startswith("-"):
        is_help = any(word in _HELP for word in argv)
        print(usage, file=sys.stdout if is_help else sys.stderr)
        raise SystemExit(0 if is_help else 2)
    task, recipe_name = argv[0], argv[1]
    texts, rest = take_space(argv[2:])
    prog = f"python -m jobs.sweep {task} {recipe_name}"
    single = f"python -m jobs.finetune {task} {shlex.quote(recipe_name)}"
    sweep, rest = tyro.cli(
        SweepConfig,
        args=rest,
        prog=prog,
        return_unknown_args=True,
        description=f"{usage}\n\nAll settings of the runs: {single} --help",
    )
    recipes = FINETUNE_RECIPES[task]  # type: ignore[index]
    base = parse_recipe_command(
        recipes,
        [recipe_name, *rest],
        prog=f"python -m jobs.sweep {task}",
        description="Vary a fine-tuning run.",
    )
    return SweepCommand(base, get_recipe(recipes, recipe_name), sweep, parse_space(texts), single)


def take_space(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """--space NAME and --space.KEY TEXT (or =TEXT) out of the arguments: {key: text}, and the rest.

    Raises:
        ValueError: no such space, a key without its text, or twice.
    """
    named: dict[str, str] = {}
    own: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, text = argument.partition("=")
        if name != _SPACE and not name.startswith(f"{_SPACE}."):
            rest.append(argument)
            continue
        text = text if equals else next(waiting, "")
        if not text or text.startswith("--"):
            raise ValueError(f"{name} needs a value, such as loguniform:1e-5:1e-2")
        key = name.removeprefix(f"{_SPACE}.").replace("-", "_")
        key = "init.path" if key == "init" else key
        if name == _SPACE:
            named |= get_space(text)
        elif key in own:
            raise ValueError(f"{name} is given twice")
        else:
            own[key] = text
    return named | own, rest
