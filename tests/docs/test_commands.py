"""Every command and every piece of code in README and docs does what it says: it is run here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.itpn import create_itpn
from models.weights import to_official
from pipeline.demo_data import write_demo_photos
from pipeline.demo_labels import prepare_demo_labels
from pipeline.demo_scenes import SceneSettings
from tests.docs.markdown import PAGES, Block, commands_of, read_blocks
from tests.docs.test_pages import documented
from tests.docs.world import World, write_nuclei

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
LANGUAGES = {"bash", "python", "text", "json", "yaml", "promql", "diff"}
"""`text` is what is not run: layouts, output, diagrams."""
FIRST_WORDS = {"python", "make", "ray", "pip", "docker", "kubectl", "sbatch", "mlflow", "curl"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> Iterator[World]:
    """Photographs, labelled sets, official weights; the runs are made by the commands."""
    folder = tmp_path_factory.mktemp("world")
    world = World(folder)
    photos = folder / "data" / "images"
    write_demo_photos(folder / "photos")
    photos.parent.mkdir()
    (folder / "photos" / "train").rename(photos)
    (folder / "data" / "photos").symlink_to(photos)
    first = sorted(photos.glob("*.*"))[0]
    (photos / f"cat{first.suffix}").write_bytes(first.read_bytes())
    write_nuclei(folder / "data" / "nuclei")
    scenes = SceneSettings(num_train=8, num_val=4, one_class=True, digit_size=(32, 64))
    prepare_demo_labels(folder / "runs" / "demo-data", labels_per_class=2, scenes=scenes)
    torch.manual_seed(0)
    official = to_official(create_itpn("itpn_debug"))
    torch.save({"model": official}, folder / "itpn_base_pixel.pth")
    tiny = create_itpn("itpn_tiny_patch16_224")
    save_file(tiny.state_dict(), folder / "encoder.safetensors")
    save_file(timm.create_model("test_vit").state_dict(), folder / "teacher.safetensors")
    yield world


def ids(blocks: list[Block]) -> list[str]:
    return [str(block) for block in blocks]


SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("bash", "python")], ids=str)
def test_it_runs(block: Block, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    if block.language == "python":
        monkeypatch.chdir(world.folder)
        names = {"images": torch.rand(1, 3, 160, 160)}
        exec(compile(world.fill_in(block.text), str(block), "exec"), names)
        return
    commands = commands_of(block)
    assert commands, f"{block}: no command in it"
    for command in commands:
        if not command.is_elsewhere:
            world.run(command.text)


def test_every_metric_these_runs_have_logged_is_documented(world: World) -> None:
    world.run("python -m jobs.pretrain demo")
    logged: set[str] = set()
    for file in (world.folder / "runs").glob("*/metrics.jsonl"):
        logged |= {key for line in file.read_text().splitlines() for key in json.loads(line)}
    assert {"train/loss_mim", "val/mim_loss_over_baseline"} <= logged
    assert not logged - documented() - {"step", "time"}


def test_every_block_says_what_it_is() -> None:
    """So that no command goes by as text."""
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: ```{block.language} is none of {LANGUAGES}"
        if block.language == "text":
            first = (block.text.split() or [""])[0]
            assert first not in FIRST_WORDS, f"{block}: a command in a block of text"


def test_there_are_pages_and_commands_at_all() -> None:
    assert len(SHELL) > 25 and len(PYTHON) > 5


def test_every_target_of_make_that_is_named_exists() -> None:
    makefile = (PAGES[0].parent / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)`", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


def test_a_command_that_fails_is_found(world: World) -> None:
    with pytest.raises(AssertionError, match="runs/nothing"):
        world.run("python -m jobs.embed runs/nothing --images DIR --out features")
    with pytest.raises(AssertionError, match="does not know how to run"):
        world.run("rm -rf runs")


def test_a_setting_that_does_not_exist_is_found(world: World) -> None:
    with pytest.raises(AssertionError):
        world.run("python -m jobs.pretrain debug --optim.learning-rate 1")


def test_marks_are_read_from_comments_and_from_the_line_before() -> None:
    def block(text: str, before: str = "") -> Block:
        return Block(Path("x.md"), 1, "bash", text, before)

    text = "a --x 'b # c' \\\n   --y  # needs a cluster\n# needs a GPU\nd\ne  # 7 minutes\n"
    commands = [(command.text, command.is_elsewhere) for command in commands_of(block(text))]
    assert commands == [("a --x 'b # c' --y", True), ("d", True), ("e", False)]
    (command,) = commands_of(block("a\n", before="This needs a cluster:"))
    assert command.is_elsewhere
