"""The folder of a run: which runs may go on in it, and what it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config_values import apply_overrides, config_from_dict
from pipeline.pretrain_config import PretrainConfig
from pipeline.run_folder import RunFolder


def reopen(config: PretrainConfig, **overrides: Any) -> RunFolder:
    """Folder of the same run with overrides written as optim__lr for optim.lr."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return RunFolder(apply_overrides(config, dotted))


@pytest.fixture
def started(debug_config: PretrainConfig) -> RunFolder:
    """A run that was started and is not finished."""
    folder = RunFolder(debug_config)
    folder.check()
    folder.open()
    return folder


def test_unfinished_run_with_the_same_config_may_go_on(started: RunFolder) -> None:
    reopen(started.config).check()


def test_finished_run_is_refused_with_the_ways_out(started: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(b"weights")
    started.finish({"steps": 20}, tmp_path)
    assert (started.path / "encoder.safetensors").read_bytes() == b"weights"
    assert json.loads(started.summary_file.read_text()) == {"steps": 20}
    for overrides in ({}, {"run__allow_config_change": True}):
        with pytest.raises(ValueError, match=r"run\.name='debug' is finished") as error:
            reopen(started.config, **overrides).check()
        for way_out in ("--run.name", "delete that folder", "remove its summary.json"):
            assert way_out in str(error.value)


def test_run_without_an_encoder_to_publish_is_not_marked_as_finished(
    started: RunFolder, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("encoder.safetensors")):
        started.finish({"steps": 20}, tmp_path)
    reopen(started.config).check()


def test_changed_config_is_refused_with_a_readable_difference(started: RunFolder) -> None:
    changed = reopen(started.config, optim__lr=1e-3, data__crop_scale=[0.5, 1.0])
    message = (
        f"run.name='debug' was started with another configuration ({started.path}):\n"
        "  data.crop_scale: [0.2, 1.0] -> [0.5, 1.0]\n"
        "  optim.lr: 0.002 -> 0.001\n"
        "pick another --run.name, resume with --run.allow-config-change, or delete that folder"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        changed.check()


def test_a_run_that_began_before_there_was_a_setting_goes_on_with_its_default(
    started: RunFolder,
) -> None:
    path = started.path / "config.json"
    values = json.loads(path.read_text())
    del values["data"]["flip_prob"], values["optim"]["clip_grad_norm"]
    path.write_text(json.dumps(values))
    reopen(started.config).check()
    with pytest.raises(ValueError, match=r"data\.flip_prob: 0\.5 -> 0\.1"):
        reopen(started.config, data__flip_prob=0.1).check()


def test_changed_config_passes_when_allowed(started: RunFolder) -> None:
    changed = reopen(started.config, optim__lr=1e-3, run__allow_config_change=True)
    changed.check()
    changed.open()
    reopen(started.config, optim__lr=1e-3).check()  # the folder now holds the new one


def test_moved_storage_and_dry_run_are_no_change(started: RunFolder, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    started.storage_path.rename(moved)
    folder = reopen(started.config, run__storage_path=str(moved), run__dry_run=True)
    assert (folder.path / "config.json").exists()
    folder.check()


def test_folder_holds_the_config_as_the_run_can_read_it_back(started: RunFolder) -> None:
    stored = json.loads((started.path / "config.json").read_text())
    assert config_from_dict(PretrainConfig, stored) == started.config


def test_state_outlives_the_object_and_adds_up(started: RunFolder) -> None:
    assert started.state == {}
    started.update_state(mlflow_run_id="abc", status="RUNNING")
    RunFolder(started.config).update_state(status="KILLED")
    assert RunFolder(started.config).state == {"mlflow_run_id": "abc", "status": "KILLED"}


def test_relative_storage_path_becomes_absolute(
    debug_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = reopen(debug_config, run__storage_path="here")
    assert folder.path == tmp_path / "here" / "debug"


def test_checkpoints_lie_in_the_run_or_under_the_path_given(debug_config: PretrainConfig) -> None:
    folder = RunFolder(debug_config)
    assert folder.checkpoints == str(folder.path / "checkpoints")
    for path in ("/mnt/checkpoints", "/mnt/checkpoints/"):
        elsewhere = reopen(debug_config, run__checkpoint_path=path)
        assert elsewhere.checkpoints == "/mnt/checkpoints/debug"
        elsewhere.check()
    assert reopen(debug_config, run__checkpoint_path="s3://b").checkpoints == "s3://b/debug"


def test_checkpoint_path_that_nothing_can_open_is_refused_before_the_run_starts(
    debug_config: PretrainConfig,
) -> None:
    folder = reopen(debug_config, run__checkpoint_path="tape://drive")
    with pytest.raises(ValueError, match="'tape://drive/debug' is no location pyarrow can open"):
        folder.check()
    assert not folder.path.exists()
