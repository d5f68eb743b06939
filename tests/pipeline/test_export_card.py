"""The model card: its code runs, its figures are those of the run, it keeps secrets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.export import ExportConfig, export
from pipeline.exports.model_card import public_recipe
from tests.conftest import REPO_ROOT
from tests.pipeline.inference_runs import finetuned_run, pretrained_run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_blocks(folder: Path, blocks: list[str]) -> None:
    """Each in a namespace of its own, all in one process that stands in the folder."""
    script = "import sys, json\nfor block in json.loads(sys.argv[1]): exec(block, {})"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(blocks)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_code_of_the_cards_runs_as_it_stands(tmp_path: Path):
    finetuned_run(tmp_path / "classify", "classify")
    to = tmp_path / "all"
    export(ExportConfig(run=str(tmp_path / "classify"), to=str(to), format="all"))
    blocks = code_blocks((to / "README.md").read_text())
    assert len(blocks) == 5
    shape = "\nassert logits.shape == (4, 3), logits.shape"
    assert sum("logits =" in block for block in blocks) == 2
    run_blocks(to, [b + shape if "logits =" in b else b for b in blocks])


@pytest.mark.slow
def test_the_code_that_loads_weights_knows_every_kind_of_model(tmp_path: Path):
    pretrained_run(tmp_path / "pretrain")
    finetuned_run(tmp_path / "segment", "segment")
    finetuned_run(tmp_path / "detect", "detect")
    blocks = []
    for run in ("pretrain", "segment", "detect"):
        to = tmp_path / f"{run}-out"
        export(ExportConfig(run=str(tmp_path / run), to=str(to)))
        (block,) = code_blocks((to / "README.md").read_text())
        blocks.append(f"import os\nos.chdir({str(to)!r})\n{block}")
    run_blocks(tmp_path, blocks)


def test_the_card_says_what_the_run_says_and_no_more(tmp_path: Path):
    run, _ = pretrained_run(tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    values["tracking"]["uri"] = "https://user:secret@mlflow"
    (run / "config.json").write_text(json.dumps(values))
    metrics = {"val/loss_mim": 0.123456, "train/loss": 7.0}
    (run / "summary.json").write_text(json.dumps({"metrics": metrics}))
    (run / "environment.json").write_text(json.dumps({"git_commit": "abc123"}))
    to = tmp_path / "out"
    export(ExportConfig(run=str(run), to=str(to), licence="CC BY 4.0"))
    card = (to / "README.md").read_text()
    assert "| `val/loss_mim` | 0.123456 |" in card and "train/loss" not in card
    assert "| Licence of the weights | CC BY 4.0 |" in card and "`abc123`" in card
    assert "mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]" in card
    assert "secret" not in card and "storage_path" not in card
    recipe = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert recipe == public_recipe(values) and recipe["optim"] == values["optim"]


def test_a_checkpoint_has_the_recipe_of_its_run_and_not_its_last_figures(tmp_path: Path):
    run, _ = pretrained_run(tmp_path / "run")
    checkpoint = run / "checkpoints/step-1"
    checkpoint.mkdir(parents=True)
    (run / "encoder.safetensors").rename(checkpoint / "encoder.safetensors")
    (run / "summary.json").write_text(json.dumps({"metrics": {"val/loss_mim": 1.0}}))
    (run / "environment.json").write_text(json.dumps({"git_commit": "abc123"}))
    export(ExportConfig(run=str(checkpoint), to=str(tmp_path / "out")))
    card = (tmp_path / "out/README.md").read_text()
    assert "No figures are known for these weights" in card
    assert "`abc123`" in card and '"mask_ratio"' in card and "not stated" in card


def test_the_card_of_a_bare_file_says_that_nothing_is_known(tmp_path: Path):
    run, _ = pretrained_run(tmp_path / "run")
    (run / "config.json").unlink()
    file = run / "encoder.safetensors"
    export(ExportConfig(run=str(file), to=str(tmp_path / "out"), model_name="itpn_debug"))
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("# encoder.safetensors")
    assert "The data are not known" in card and "Not known: there was no `config.json`" in card
