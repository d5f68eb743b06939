"""The configuration of a run beside the recipe it is nearest to, and the command that gives it.

Surprising: no file names the recipe. It is found as the one with the fewest differences, which is
what a reader wants to know, too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config_values import flatten_config
from pipeline.credentials import without_passwords
from pipeline.finetune_recipes import FINETUNE_RECIPES
from pipeline.html_report.contents import RunContents
from pipeline.recipes import PRETRAIN_RECIPES

_SAY_NOTHING = {"run.name", "run.storage_path", "run.dry_run", "run.allow_config_change"}
_OF_A_SWEEP = {"tracking.parent_run_id", "tracking.varied"}
_MOST_DIFFERENCES = 25  # beyond it no recipe says anything about the run


@dataclass(frozen=True)
class Setting:
    """A setting, its value, and that of the recipe."""

    key: str
    value: str
    recipe_value: str
    is_changed: bool


@dataclass(frozen=True)
class Recipe:
    """The recipe a run is nearest to."""

    name: str
    command: list[str]
    """Words that run the job with this recipe."""
    values: dict[str, Any]
    """Dotted keys -> values."""


def nearest_recipe(run: RunContents) -> Recipe | None:
    """The recipe with the fewest different settings; None where none is near."""
    flat = flat_settings(run)
    recipes: Mapping[str, Callable[[], Any]]
    if run.kind == "unknown":
        return None
    if run.kind == "pretrain":
        recipes, words = PRETRAIN_RECIPES, ["python", "-m", "jobs.pretrain"]
    else:
        recipes, words = FINETUNE_RECIPES[run.kind], ["python", "-m", "jobs.finetune", run.kind]
    found = {name: flatten_config(make()) for name, make in recipes.items()}
    distances = {name: len(_differences(flat, values)) for name, values in found.items()}
    best = min(distances, key=lambda name: distances[name])
    if distances[best] > _MOST_DIFFERENCES:
        return None
    return Recipe(best, [*words, best], found[best])


def settings_table(run: RunContents, recipe: Recipe | None) -> list[Setting]:
    """All settings, those that differ from the recipe first."""
    flat = flat_settings(run)
    base = recipe.values if recipe else {}
    changed = set(_differences(flat, base)) if recipe else set()
    rows = [
        Setting(key, show(value), show(base[key]) if key in base else "", key in changed)
        for key, value in flat.items()
    ]
    return sorted(rows, key=lambda row: not row.is_changed)


def start_command(run: RunContents, recipe: Recipe) -> str:
    """The command line that starts, or resumes, the run."""
    flat = flat_settings(run)
    words = list(recipe.command)
    for key in ("run.name", "run.storage_path", *_differences(flat, recipe.values)):
        if key in flat and flat[key] != recipe.values.get(key) and key not in _OF_A_SWEEP:
            words += _flags(key, flat[key])
    return without_passwords(shlex.join(words))


def flat_settings(run: RunContents) -> dict[str, Any]:
    """Dotted keys -> values."""
    return {
        f"{section}.{key}": value
        for section, values in run.config.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def show(value: Any) -> str:
    """A value as config.json has it, without credentials."""
    return without_passwords(value if isinstance(value, str) and value else json.dumps(value))


def _differences(flat: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Keys of settings that both know and that say something, with other values."""
    return [
        key
        for key, value in flat.items()
        if key in base and key not in _SAY_NOTHING | _OF_A_SWEEP and value != base[key]
    ]


def _flags(key: str, value: Any) -> list[str]:
    """A setting as tyro takes it: --data.crop-scale 0.1 0.5, --tracking.no-system-metrics."""
    if key == "init.path":  # the one setting with a name of its own
        return ["--init", str(value)]
    section, name = key.split(".", 1)
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{section}.{'' if value else 'no-'}{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{section}.{name}", *(str(v) for v in values)]
