"""Preparations that end before their time, and what the same command makes of them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.prepare import job as driver
from pipeline.prepare import shard_writer
from pipeline.prepare.job import PreparationFailedError, prepare
from pipeline.prepare.settings import PrepareConfig
from tests.pipeline.preparing import contents, no_ray, read_rows
from tests.pipeline.samples import write_images

pytestmark = pytest.mark.usefixtures(no_ray.__name__)
NAMES = [f"{folder}/{i:02d}.png" for folder in ("a", "b", "c") for i in range(16)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_images(tmp_path / "source", NAMES)
    return tmp_path / "source"


def config_of(source: Path, **settings: Any) -> PrepareConfig:
    values = {"out": str(source.parent / "out"), "shard_mb": 0.04} | settings
    return PrepareConfig(source=str(source), **values)


def fail_after(monkeypatch: pytest.MonkeyPatch, num_shards: int) -> None:
    """Make the disk full once some shards are written."""
    write, calls = storage.write_atomically, Counter[str]()

    def limited(filesystem: Any, path: str, content: Any) -> None:
        if "/shard-" in path:
            calls["shards"] += 1
            if calls["shards"] > num_shards:
                raise OSError(28, f"No space left on device: '{path}'")
        write(filesystem, path, content)

    monkeypatch.setattr(storage, "write_atomically", limited)


def test_a_full_disk_is_reported_and_the_rest_is_written_by_the_same_command(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = config_of(source, out=str(source.parent / "undisturbed"))
    prepare(undisturbed)
    config = config_of(source)
    with monkeypatch.context() as patch:
        fail_after(patch, 2)
        with pytest.raises(PreparationFailedError, match="No space left"):
            prepare(config)
    assert not list(Path(config.out).glob("*/_manifest.json"))
    assert len(list(Path(config.out).glob("train/*.parquet"))) == 2
    with pytest.raises(ValueError, match=r"(?s)begun with other settings.*short_side: 0 -> 16"):
        prepare(config_of(source, short_side=16))
    written = Counter[int]()
    write = driver.write_planned_shard
    monkeypatch.setattr(
        driver,
        "write_planned_shard",
        lambda out, number: (written.update([number]), write(out, number))[1],
    )
    prepare(config)
    assert min(written) == 2 and max(written.values()) == 1  # the first two were kept
    assert contents(Path(config.out)) == contents(Path(undisturbed.out))


def test_files_that_appear_after_a_kill_do_not_mix_two_plans(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(source)
    with monkeypatch.context() as patch:
        fail_after(patch, 2)
        with pytest.raises(PreparationFailedError):
            prepare(config)
    write_images(source, [*NAMES, "a/late.png"])
    prepare(config)
    assert sorted(row["name"] for row in read_rows(Path(config.out) / "train")) == NAMES


def test_a_shard_that_was_cut_off_is_written_again(source: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(source)
    with monkeypatch.context() as patch:
        fail_after(patch, 2)
        with pytest.raises(PreparationFailedError):
            prepare(config)
    shard = sorted(Path(config.out).glob("train/*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    (shard.parent / "shard-00007.parquet.part").write_bytes(b"of a task that was killed")
    prepare(config)
    assert len(read_rows(Path(config.out) / "train")) == 48
    assert not list(shard.parent.glob("*.part"))


def test_notes_without_a_plan_are_not_believed(source: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(source)
    with monkeypatch.context() as patch:
        fail_after(patch, 2)
        with pytest.raises(PreparationFailedError):
            prepare(config)
    (Path(config.out) / "_preparing/plan.json").unlink()
    for shard in Path(config.out).glob("train/*"):
        shard.unlink()
    note = Path(config.out) / "_preparing/finished/000000.json"
    note.write_text(note.read_text().replace('"bad": []', '"bad": [], "shard": null'))
    prepare(config)
    assert len(read_rows(Path(config.out) / "train")) == 48


def test_a_half_written_set_is_not_taken_for_a_data_set(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(source)
    fail_after(monkeypatch, 2)
    with pytest.raises(PreparationFailedError):
        prepare(config)
    shutil.rmtree(Path(config.out) / "_preparing")
    with pytest.raises(ValueError, match="no manifest"):
        prepare(config)


def test_a_kill_between_the_manifests_of_two_splits_is_mended(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(source, val_fraction=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(driver.PlanFolder, "remove", lambda folder: 1 / 0)
        patch.setattr(driver, "make_plan", _plan_without_removing(driver.make_plan))
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    (Path(config.out) / "val/_manifest.json").unlink()
    assert not prepare(config).was_finished
    assert (
        len(read_rows(Path(config.out) / "val")) + len(read_rows(Path(config.out) / "train")) == 48
    )
    assert not (Path(config.out) / "_preparing").exists()


def _plan_without_removing(make_plan: Any) -> Any:
    def make(config: PrepareConfig, folder: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver.PlanFolder, "remove", lambda folder: None)
            return make_plan(config, folder)

    return make


def test_a_task_that_is_run_twice_writes_the_same(source: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(source)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_finish", lambda folder, plan, done: {})
        prepare(config)
    before = contents(Path(config.out))
    shard_writer.write_planned_shard(config.out, 1)
    assert contents(Path(config.out)) == before
