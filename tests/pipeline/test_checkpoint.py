"""Checkpoints: written whole, pruned, checked before they are taken, free of code."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.itpn import create_itpn
from models.weights import load_weights
from pipeline.checkpoint import (
    ENCODER_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    Checkpointer,
    _snapshot,
    load_state,
)
from tests.pipeline.samples import debug_networks
from tests.pipeline.test_pretrain import assert_same_state


def make_checkpointer(tmp_path: Path, keep: int = 2) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints", keep=keep, facts={"model": "itpn_debug"})


def save(checkpointer: Checkpointer, step: int) -> Path:
    state = {"step": step, "weights": torch.full((1000,), float(step))}
    return save_now(checkpointer, step, state, {"weight": torch.full((1000,), float(step))})


def save_now(checkpointer: Checkpointer, step: int, state: Any, encoder: Any) -> Path:
    checkpointer.save(step, state, encoder)
    checkpointer.wait()
    (saved,) = checkpointer.finished()
    assert saved.error is None and saved.step == step and saved.num_bytes > 0
    return checkpointer.fetch(step)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(checkpointer: Checkpointer) -> list[str]:
    return sorted(path.name for path in Path(checkpointer.location).iterdir())


def test_state_survives_the_trip_through_a_checkpoint(tmp_path: Path) -> None:
    model, teacher = debug_networks()
    assert teacher is not None
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "teacher": teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "bad_rows": [1, 5],
        "torch_rng": torch.get_rng_state(),
    }
    checkpointer = make_checkpointer(tmp_path)
    save_now(checkpointer, 7, state, model.encoder.state_dict())
    newest = checkpointer.latest()
    assert newest == tmp_path / "checkpoints" / "step_00000007"
    torch.testing.assert_close(load_state(newest), state, rtol=0, atol=0)


def test_encoder_file_loads_into_an_itpn_and_carries_the_facts(tmp_path: Path) -> None:
    model, _ = debug_networks()
    folder = save_now(make_checkpointer(tmp_path), 12, {}, model.encoder.state_dict())
    encoder = create_itpn("itpn_debug")
    report = load_weights(encoder, folder / ENCODER_FILE)
    assert len(report.matched) == len(encoder.state_dict())
    assert not (report.new or report.dropped or report.resized)
    for key, tensor in model.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], tensor), key
    with safe_open(folder / ENCODER_FILE, "pt") as file:
        assert file.metadata() == {"model": "itpn_debug", "step": "12"}
    assert json.loads((folder / MANIFEST_FILE).read_text())["facts"]["model"] == "itpn_debug"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path, keep=2)
    for step in (5, 20, 100, 1000):
        save(checkpointer, step)
    assert names(checkpointer) == ["step_00000100", "step_00001000"]


def test_multiples_of_keep_every_steps_outlive_the_newest(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2, keep_every_steps=10, facts={})
    for step in (5, 10, 15, 20, 25, 27, 29):
        save(checkpointer, step)
    assert names(checkpointer) == [f"step_{s:08d}" for s in (10, 20, 27, 29)]
    save(checkpointer, 12)  # the run fell back to 10: 20 is of a future it did not take
    assert names(checkpointer) == ["step_00000010", "step_00000012"]


def test_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path)
    truncate(save(checkpointer, 5) / STATE_FILE)
    save(checkpointer, 5)
    assert checkpointer.latest() == Path(checkpointer.location) / "step_00000005"


@pytest.mark.parametrize("file_name", [STATE_FILE, ENCODER_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove])
def test_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, file_name: str
) -> None:
    checkpointer = make_checkpointer(tmp_path)
    older, newer = save(checkpointer, 1), save(checkpointer, 2)
    damage(newer / file_name)
    with caplog.at_level(logging.WARNING):
        assert checkpointer.latest() == older
    assert f"checkpoint {newer} is passed over: " in caplog.text
    assert load_state(older)["step"] == 1


def test_whoever_owns_the_checkpoints_is_told_of_a_damaged_one(tmp_path: Path) -> None:
    """A worker's log reaches nobody: it passes the words on to the driver's terminal."""
    said: list[str] = []
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2, facts={}, warn=said.append)
    truncate(save(checkpointer, 1) / STATE_FILE)
    assert checkpointer.latest() is None
    assert len(said) == 1 and "step_00000001 is passed over: state.pt has" in said[0]


def test_warning_about_changed_content_does_not_call_equal_sizes_different(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = make_checkpointer(tmp_path)
    flip_a_bit(save(checkpointer, 1) / STATE_FILE)
    assert checkpointer.latest() is None
    assert not re.search(r"has (\d+) bytes, not the \1 written", caplog.text), caplog.text


def test_saving_after_falling_back_keeps_the_checkpoint_just_written(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path, keep=1)
    damaged = save(checkpointer, 30)
    truncate(damaged / STATE_FILE)
    written = save(checkpointer, 20)  # the run went on from an older one, and is not at 30 yet
    assert checkpointer.latest() == written


def test_half_written_checkpoint_is_never_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = make_checkpointer(tmp_path)
    older = save(checkpointer, 1)

    def killed(*_: Any) -> None:
        raise SystemExit  # passes every handler, as a kill would

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("pipeline.checkpoint.os.replace", killed)
        save(checkpointer, 2)
    again = make_checkpointer(tmp_path)
    assert names(again) == [".partial_00000002", "step_00000001"]
    assert again.latest() == older
    save(again, 2)  # the same step again, over the remains
    assert names(again) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("is_folder_there", [False, True])
def test_no_checkpoint_is_none(tmp_path: Path, is_folder_there: bool) -> None:
    checkpointer = make_checkpointer(tmp_path)
    if is_folder_there:
        Path(checkpointer.location).mkdir()
    assert checkpointer.latest() is None


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_code_in_a_state_file_is_refused_although_the_manifest_vouches_for_it(
    tmp_path: Path,
) -> None:
    checkpointer, trace = make_checkpointer(tmp_path), tmp_path / "trace"
    folder = save(checkpointer, 1)
    torch.save({"step": Malicious(str(trace))}, folder / STATE_FILE)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    content = (folder / STATE_FILE).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][STATE_FILE] = {"bytes": len(content), "sha256": digest}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert checkpointer.latest() == folder
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_state(folder)
    assert not trace.exists()


# ---- beside training ----


def test_what_training_changes_after_save_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    train_once(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    expected = copy.deepcopy(state)
    checkpointer, gate = make_checkpointer(tmp_path), threading.Event()
    checkpointer._writer.submit(gate.wait)  # as if the disk were slow
    checkpointer.save(1, state, model.state_dict())
    assert not Path(checkpointer.location).exists() and checkpointer.finished() == []
    train_once(model, optimizer)
    assert not torch.equal(model.weight, expected["model"]["weight"])
    gate.set()
    checkpointer.wait()
    newest = checkpointer.latest()
    assert newest is not None
    assert_same_state(load_state(newest), {**expected, "model": dict(expected["model"])})
    encoder = load_file(newest / ENCODER_FILE)
    assert_same_state(encoder, {key: expected["model"][key] for key in encoder})


def train_once(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()


def test_save_waits_for_the_one_before_and_counts_the_wait_as_a_stall(tmp_path: Path) -> None:
    checkpointer, gate = make_checkpointer(tmp_path), threading.Event()
    checkpointer._writer.submit(gate.wait)
    checkpointer.save(1, {"step": 1}, {})
    threading.Timer(0.2, gate.set).start()
    checkpointer.save(2, {"step": 2}, {})
    checkpointer.wait()
    first, second = checkpointer.finished()
    assert (first.step, first.error, second.step, second.error) == (1, None, 2, None)
    assert first.stall_s < 0.1 < second.stall_s
    assert names(checkpointer) == ["step_00000001", "step_00000002"]


def test_a_tensor_of_state_and_encoder_is_copied_once_and_others_keep_apart() -> None:
    weight = torch.nn.Parameter(torch.rand(4, 6))
    state = {
        "model": {"weight": weight, "row": weight[0], "turned": weight.T, "equal": weight + 0},
        "empty": [torch.empty(0), torch.empty(0, 3)],
        "group": {"betas": (0.9, 0.95), "params": [0, 1]},
    }
    copies: dict[Any, torch.Tensor] = {}
    snapshot = _snapshot(state, copies)
    encoder = _snapshot({"weight": state["model"]["weight"]}, copies)
    model = snapshot["model"]
    assert encoder["weight"] is model["weight"]
    pointers = {tensor.data_ptr() for tensor in (weight, *model.values())}
    assert len(pointers) == 5, "a view or an equal tensor is none of the same"
    for key, tensor in state["model"].items():
        assert torch.equal(model[key], tensor) and model[key].is_contiguous(), key
    assert [tuple(tensor.shape) for tensor in snapshot["empty"]] == [(0,), (0, 3)]
    assert snapshot["group"] == state["group"]


def test_betas_and_other_tuples_load_as_tuples_without_unpickling_code(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], betas=(0.8, 0.9))
    folder = save_now(make_checkpointer(tmp_path), 1, {"optimizer": optimizer.state_dict()}, {})
    loaded = load_state(folder)["optimizer"]
    assert loaded["param_groups"][0]["betas"] == (0.8, 0.9)
    assert isinstance(loaded["param_groups"][0]["betas"], tuple)
    torch.optim.AdamW([parameter]).load_state_dict(loaded)
