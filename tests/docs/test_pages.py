"""Tables of the documentation that repeat what the code says: complete, and true."""

from __future__ import annotations

import re

from models.itpn import create_itpn
from pipeline.config import TrainingConfig
from pipeline.finetune_recipes import FINETUNE_RECIPES
from pipeline.recipes import PRETRAIN_RECIPES
from pipeline.sweeps.space_recipes import SPACES
from tests.conftest import REPO_ROOT

DOCS = REPO_ROOT / "docs"


def rows(page: str) -> list[list[str]]:
    """Cells of all rows of all tables of a page, without back-quotes."""
    lines = re.findall(r"^\| (.*) \|$", (DOCS / page).read_text(), re.M)
    return [[cell.strip().replace("`", "") for cell in line.split(" | ")] for line in lines]


def facts(config: TrainingConfig) -> list[str]:
    """Model, input, length and batch as the table of recipes gives them."""
    optim = config.optim
    length = f"{optim.num_steps} steps" if optim.num_steps else f"{optim.num_epochs:g} epochs"
    model = config.model_name or "that of --init"
    return [model, f"{config.data.image_size} px", length, str(config.data.global_batch_size)]


def test_every_recipe_of_pre_training_is_described_as_it_is() -> None:
    table = {row[0]: row[1:5] for row in rows("recipes.md") if row[0] in PRETRAIN_RECIPES}
    assert table == {name: facts(make()) for name, make in PRETRAIN_RECIPES.items()}


def test_every_recipe_of_fine_tuning_is_described_as_it_is() -> None:
    table = {(row[0], row[1]): row[2:6] for row in rows("recipes.md") if row[0] in FINETUNE_RECIPES}
    recipes = {(t, n): make() for t, group in FINETUNE_RECIPES.items() for n, make in group.items()}
    assert table == {key: facts(config) for key, config in recipes.items()}


def test_every_space_is_described_as_it_is() -> None:
    table = {row[0]: row[1].split(", ") for row in rows("recipes.md") if row[0] in SPACES}
    assert table == {name: list(axes) for name, axes in SPACES.items()}


def documented() -> set[str]:
    """Metrics of docs/mlflow.md."""
    cells = [row[0] for row in rows("mlflow.md")]
    return {name for cell in cells for name in cell.split(", ") if "/" in name}


def test_every_metric_in_the_code_is_documented() -> None:
    """Those written out in it; the ones put together there are met by the runs below."""
    literal = re.compile(r'"((?:train|val|optim|perf|memory|checkpoint|fault|scaling)/[a-z0-9_]+)"')
    sources = [path.read_text() for path in (REPO_ROOT / "pipeline").rglob("*.py")]
    named = {name for source in sources for name in literal.findall(source)}
    assert len(named) > 25
    assert not named - documented()


def test_every_documented_metric_is_in_the_code() -> None:
    """By its whole name, or by the parts it is put together of."""
    source = "\n".join(path.read_text() for path in (REPO_ROOT / "pipeline").rglob("*.py"))
    source += "\n".join(path.read_text() for path in (REPO_ROOT / "models").rglob("*.py"))
    # loss_box_reg and its like are torchvision's names of its own losses.
    torchvision = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    torchvision |= {"loss_mask"}
    for name in documented():
        word = re.sub(r"^(loss_|baseline_|val_)", "", name.split("/")[1])
        word = re.sub(r"_loss_over_baseline$|\d+$|^box_|^mask_", "", word)
        word = re.sub(r"ap\d*(_\w+)?$", "ap", word)
        assert name.split("/")[1] in torchvision or word in source, name


def test_models_named_in_the_recipes_page_exist() -> None:
    names = set(re.findall(r"itpn_\w+_patch16_224", (DOCS / "recipes.md").read_text()))
    for name in names:
        if "large" not in name:  # a second of allocation says nothing new
            create_itpn(name)
