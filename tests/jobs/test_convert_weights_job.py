"""`python -m jobs.convert_weights` as a user runs it, and what the folder it writes is good for."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.convert_weights import main
from models.itpn import create_itpn
from models.weights import to_official
from pipeline.config import InitConfig
from pipeline.downstream.tasks import create_task
from pipeline.finetuning_run import build_model, resolve_init
from pipeline.init_weights import read_initial_weights
from tests.conftest import REPO_ROOT
from tests.models import tiny
from tests.pipeline.downstream import tiny_tasks


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """An official pre-training checkpoint in miniature, with a wider neck than the code says."""
    encoder = tiny.randomize(create_itpn("itpn_debug", fpn_dim=24))
    state = to_official(encoder)
    path = tmp_path / "official.pth"
    extra = {"mask_token": torch.zeros(1, 1, 32)}
    torch.save({"model": state | extra, "epoch": 400}, path)
    return path, encoder.state_dict()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/convert_weights.py", *map(str, arguments)])
    return main()


def test_command_says_what_is_in_the_file_and_writes_what_init_takes(
    official: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    file, encoder = official
    folder = tmp_path / "converted"
    command = [sys.executable, "-m", "jobs.convert_weights", str(file), "--to", str(folder)]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "official iTPN" in lines["layout"]
    assert "HiViT, 32 channels, blocks 1-1-1, 2 heads, 64 px" in lines["trunk"]
    assert "24 channels, 1 blocks a step" in lines["neck"]
    assert lines["variants"].split()[1] == "itpn_debug"
    assert "decoder.mask_token (1)" in lines["dropped"]

    written = load_file(folder / "encoder.safetensors")
    assert written.keys() == encoder.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in encoder.items())
    weights = read_initial_weights(InitConfig(path=str(folder)))
    assert (weights.model_name, weights.image_size) == ("itpn_debug", 64)
    config = tiny_tasks.config("segment", {"init.path": str(folder), "model.name": ""})
    resolved, weights = resolve_init(config)
    assert (resolved.model.name, resolved.model.fpn_dim) == ("itpn_debug", 24)
    model, _ = build_model(create_task(resolved, tiny_tasks.CLASSES), weights)
    name = "pyramid.split_16to8.reduction.weight"
    assert torch.equal(model.encoder.state_dict()[name], encoder[name])


def test_tables_are_resized_for_another_image_size(
    monkeypatch: pytest.MonkeyPatch, official: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "larger"
    assert run_main(monkeypatch, official[0], "--to", folder, "--image-size", 96) == 0
    assert load_file(folder / "encoder.safetensors")["backbone.pos_embed"].shape == (1, 36, 32)
    assert json.loads((folder / "config.json").read_text())["data"]["image_size"] == 96


def test_a_trunk_alone_stays_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backbone = tiny.randomize(create_itpn("fast_itpn_debug")).backbone
    save_file(to_official(backbone), tmp_path / "fast.safetensors")
    assert run_main(monkeypatch, tmp_path / "fast.safetensors", "--to", tmp_path / "out") == 0
    written = load_file(tmp_path / "out" / "encoder.safetensors")
    assert written.keys() == {f"backbone.{name}" for name in backbone.state_dict()}


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["exists", "renamed", "pickle", "nothing"])
def test_what_cannot_be_converted_is_one_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    official: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    kind: str,
) -> None:
    file, folder = official[0], tmp_path / "out"
    if kind == "exists":
        folder.mkdir()
    elif kind == "renamed":
        state = torch.load(file, weights_only=True)["model"]
        state["blocks.0.mlp.fc9.weight"] = state.pop("blocks.0.mlp.fc1.bias")
        torch.save(state, file)
    elif kind == "pickle":
        with file.open("wb") as stream:
            pickle.dump({"model": Malicious(tmp_path / "owned")}, stream)
    else:
        file = tmp_path / "nowhere.pth"
    assert run_main(monkeypatch, file, "--to", folder) == 1
    message = caplog.records[-1].getMessage()
    expected = {
        "exists": f"--to {folder} exists; name a new folder",
        "renamed": "unexpected key encoder.backbone.blocks.0.mlp.fc9.weight",
        "pickle": "is damaged, or holds more than tensors",
        "nothing": "does not exist",
    }
    assert message.startswith("error: ") and expected[kind] in message
    assert not (tmp_path / "owned").exists()
    assert kind == "exists" or not folder.exists()
