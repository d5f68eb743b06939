"""The configuration in the HTML report: the recipe is found, its command gives the same run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import parse_recipe_command
from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.finetune_recipes import FINETUNE_RECIPES
from pipeline.html_report.contents import read_contents
from pipeline.html_report.next_steps import next_steps
from pipeline.html_report.settings import nearest_recipe, settings_table, start_command
from pipeline.recipes import PRETRAIN_RECIPES
from tests.pipeline.reported_runs import write_json

RECIPES: list[tuple[str, str, Any]] = [
    *(("pretrain", name, make) for name, make in PRETRAIN_RECIPES.items()),
    *((task, name, make) for task, some in FINETUNE_RECIPES.items() for name, make in some.items()),
]
IDS = [f"{kind}-{name}" for kind, name, _ in RECIPES]
CHANGES = {
    "run.name": "it's mine",
    "run.storage_path": "/shared/runs",
    "data.path": "/my images",
    "data.mean": (0.5, 0.25, 0.5),
    "optim.num_steps": 7,
    "optim.num_epochs": None,
    "optim.lr": 1.5e-05,
    "tracking.system_metrics": False,
    "scaling.num_workers": (1, 2),
    "init.path": "runs/other",
}


@pytest.mark.parametrize(("kind", "name", "make"), RECIPES, ids=IDS)
def test_a_recipe_is_recognised_and_its_command_gives_the_same_configuration(
    kind: str, name: str, make: Any, tmp_path: Path
) -> None:
    config = apply_overrides(make(), CHANGES)
    write_json(tmp_path / "config.json", config_to_dict(config))
    run = read_contents(tmp_path)
    recipe = nearest_recipe(run)
    assert recipe is not None and recipe.name == name and run.kind == kind
    words = shlex.split(start_command(run, recipe))
    task = [] if kind == "pretrain" else [kind]
    job = "jobs.pretrain" if kind == "pretrain" else "jobs.finetune"
    assert words[: 3 + len(task)] == ["python", "-m", job, *task]
    recipes: Any = PRETRAIN_RECIPES if kind == "pretrain" else FINETUNE_RECIPES[kind]  # type: ignore[index]
    parsed = parse_recipe_command(recipes, words[3 + len(task) :], prog="p", description="d")
    assert config_to_dict(parsed) == config_to_dict(config)


def test_settings_that_differ_come_first(tmp_path: Path) -> None:
    config = apply_overrides(PRETRAIN_RECIPES["demo"](), {"optim.lr": 1e-3, "run.name": "mine"})
    write_json(tmp_path / "config.json", config_to_dict(config))
    run = read_contents(tmp_path)
    table = settings_table(run, nearest_recipe(run))
    assert [row.is_changed for row in table].count(True) == 1, "a name is no difference"
    first = table[0]
    assert (first.key, first.value, first.recipe_value) == ("optim.lr", "0.001", "0.0005")
    assert len(table) == sum(len(section) for section in config_to_dict(config).values())


def test_settings_of_another_version_are_shown_and_compared_with_nothing(tmp_path: Path) -> None:
    values = config_to_dict(PRETRAIN_RECIPES["demo"]())
    del values["optim"]["clip_grad_norm"]
    values["optim"]["momentum"] = 0.9
    write_json(tmp_path / "config.json", values)
    run = read_contents(tmp_path)
    table = {row.key: row for row in settings_table(run, nearest_recipe(run))}
    assert "optim.clip_grad_norm" not in table and not table["optim.momentum"].is_changed


def test_a_configuration_like_no_recipe_is_compared_with_none(tmp_path: Path) -> None:
    values = config_to_dict(PRETRAIN_RECIPES["demo"]())
    odd = {s: dict.fromkeys(section, "?") for s, section in values.items()}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    assert nearest_recipe(read_contents(tmp_path)) is None


def test_commands_fit_how_the_run_ended(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", config_to_dict(PRETRAIN_RECIPES["demo"]()))
    write_json(tmp_path / "state.json", {"status": "KILLED"})
    run = read_contents(tmp_path)
    assert next_steps(run, nearest_recipe(run))[0].command == "python -m jobs.pretrain demo"
    write_json(tmp_path / "state.json", {"status": "FINISHED"})
    run = read_contents(tmp_path)
    commands = [step.command for step in next_steps(run, nearest_recipe(run))]
    assert not [c for c in commands if "jobs.pretrain" in c]
    modules = [command.split()[2] for command in commands]
    assert modules == ["jobs.finetune", "jobs.embed", "jobs.export", "mlflow", "jobs.report"]
