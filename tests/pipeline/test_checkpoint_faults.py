"""Checkpoints where writing fails: full disks, kills, remote stores; the last good one stays."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs
from safetensors.torch import load_file

from pipeline.checkpoint import (
    ENCODER_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    Checkpointer,
    Saved,
    load_state,
    step_of,
)
from tests.pipeline.storage_faults import fill_disk, install, small_disk
from tests.pipeline.test_checkpoint import flip_a_bit, make_checkpointer, names, save, truncate

# ---- failures while writing ----


@pytest.mark.parametrize("leave_kib", [0, 300, 830], ids=["no room", "half of it", "all but one"])
def test_a_full_disk_costs_one_checkpoint_and_leaves_the_last_good_one(
    tmp_path: Path, leave_kib: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint here takes 800 KiB for the state and 100 for the encoder."""

    def write(step: int) -> Saved:
        state = {"step": step, "weights": torch.full((200 * 1024,), float(step))}
        checkpointer.save(step, state, {"weight": torch.zeros(25 * 1024)})
        checkpointer.wait()
        (saved,) = checkpointer.finished()
        return saved

    with small_disk(tmp_path / "disk", 3000) as disk:
        checkpointer = make_checkpointer(disk)
        assert write(1).error is None
        filler = fill_disk(disk, leave_kib)
        free = shutil.disk_usage(disk).free
        saved = write(2)
        assert saved.error is not None and saved.step == 2
        assert "the checkpoint of step 2 was not written: " in caplog.text
        assert names(checkpointer) == ["step_00000001"]
        assert shutil.disk_usage(disk).free == free
        newest = checkpointer.latest()
        assert newest is not None and load_state(newest)["step"] == 1
        filler.unlink()
        assert write(3).error is None
        newest = checkpointer.latest()
        assert newest is not None and load_state(newest)["step"] == 3


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("\nunlucky\nstack"), OSError(28)])
def test_any_error_of_the_writer_is_told_in_one_line_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    checkpointer = make_checkpointer(tmp_path)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.checkpoint.torch.save", fail)
        checkpointer.save(1, {"step": 1}, {})
        checkpointer.wait()
    (saved,) = checkpointer.finished()
    assert saved.error is not None
    assert saved.error.startswith(type(error).__name__) and "\n" not in saved.error
    assert "unlucky" in saved.error or not isinstance(error, RuntimeError)
    save(checkpointer, 2)
    assert names(checkpointer) == ["step_00000002"]


@pytest.mark.parametrize("end", [SystemExit, OSError], ids=["kill", "error"])
def test_replacing_the_only_checkpoint_never_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    checkpointer = make_checkpointer(tmp_path, keep=1)
    first = save(checkpointer, 5)
    replace, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:  # the old one is out of the way, the new one not yet in its place
            raise end
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.checkpoint.os.replace", interrupted)
        checkpointer.save(5, {"step": 5, "is_new": True}, {})
        with contextlib.suppress(SystemExit):
            checkpointer.wait()
    assert len(calls) >= 2
    again = make_checkpointer(tmp_path, keep=1)
    assert again.latest() == first
    assert "is_new" not in load_state(first)
    save(again, 5)
    assert names(again) == ["step_00000005"]


def test_remains_of_killed_writers_do_not_pile_up(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path)
    for name in (".partial_00000003", ".partial_00000004"):
        (Path(checkpointer.location) / name).mkdir(parents=True)
        (Path(checkpointer.location) / name / STATE_FILE).write_bytes(b"half")
    save(checkpointer, 7)  # checkpoints by the clock come at other steps after a restart
    assert names(checkpointer) == ["step_00000007"]


def test_checkpoint_that_cannot_be_pruned_is_no_failure_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handler = install(monkeypatch)
    checkpointer = make_remote(tmp_path, keep=1)
    save(checkpointer, 1)

    def refuse(path: str) -> None:
        raise PermissionError(f"deleting {path} is not allowed")

    monkeypatch.setattr(handler, "delete_file", refuse)
    save(checkpointer, 2)  # asserts that there is no error
    assert "deleting" in caplog.text
    newest = checkpointer.latest()
    assert newest is not None and load_state(newest)["step"] == 2


# ---- elsewhere ----


def make_remote(tmp_path: Path, keep: int = 2) -> Checkpointer:
    """Checkpoints on a file system that pyarrow does not know to be local (see `install`)."""
    return Checkpointer(f"faulty://{tmp_path}/bucket/run", keep=keep, facts={"model": "m"})


def remote_folder(tmp_path: Path, step: int) -> Path:
    return tmp_path / "bucket" / "run" / f"step_{step:08d}"


def test_remote_checkpoints_round_trip_and_are_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    assert make_remote(tmp_path).latest() is None
    for step in (1, 2, 3):
        save(make_remote(tmp_path), step)
    save(make_remote(tmp_path), 3)
    assert sorted(path.name for path in (tmp_path / "bucket" / "run").iterdir()) == [
        "step_00000002",
        "step_00000003",
    ]
    reader = make_remote(tmp_path)
    newest = reader.latest()
    assert newest is not None and step_of(newest) == 3
    assert tmp_path not in newest.parents, "a local copy"
    assert load_state(newest)["step"] == 3
    assert torch.equal(load_file(newest / ENCODER_FILE)["weight"], torch.full((1000,), 3.0))
    del reader
    gc.collect()
    assert not newest.exists(), "copies live as long as the checkpointer"


def test_remote_checkpoints_live_in_any_fsspec_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem()))
    root = f"bucket{tmp_path}"
    monkeypatch.setattr("pipeline.storage.resolve", lambda path: (filesystem, root))
    for step in (1, 2, 3):
        save(Checkpointer("memory://bucket", keep=2, facts={}), step)
    reader = Checkpointer("memory://bucket", keep=2, facts={})
    newest = reader.latest()
    assert newest is not None and load_state(newest)["step"] == 3
    found = filesystem.get_file_info(fs.FileSelector(root))
    assert sorted(info.base_name for info in found) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("file_name", [STATE_FILE, ENCODER_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove])
def test_damaged_or_half_uploaded_remote_checkpoint_is_passed_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Any,
    file_name: str,
) -> None:
    install(monkeypatch)
    checkpointer = make_remote(tmp_path)
    save(checkpointer, 1)
    save(checkpointer, 2)
    damage(remote_folder(tmp_path, 2) / file_name)
    newest = checkpointer.latest()
    assert newest is not None and step_of(newest) == 1 and load_state(newest)["step"] == 1
    assert f"checkpoint {checkpointer.location}/step_00000002 is passed over: " in caplog.text


def test_upload_cut_off_by_a_full_store_leaves_nothing_and_works_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    with small_disk(tmp_path / "disk", 200) as disk:
        checkpointer = make_remote(disk)
        save(checkpointer, 1)
        filler = fill_disk(disk, 8)  # enough for the state, not for the encoder
        checkpointer.save(2, {"step": 2}, {"weight": torch.zeros(10_000)})
        checkpointer.wait()
        (saved,) = checkpointer.finished()
        assert saved.error is not None and "No space left" in saved.error
        assert not remote_folder(disk, 2).exists()
        newest = checkpointer.latest()
        assert newest is not None and step_of(newest) == 1
        filler.unlink()
        save(checkpointer, 3)
        newest = checkpointer.latest()
        assert newest is not None and step_of(newest) == 3
