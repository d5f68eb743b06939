"""Preparing data in tests without Ray, and looking at what was written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.prepare import job as driver
from pipeline.prepare.plan_folder import FinishedShard
from pipeline.prepare.settings import PrepareConfig
from pipeline.shards import Manifest
from tests.pipeline.samples import encode, noise_image


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tasks of a preparation one by one in this process."""

    def run_tasks(config: PrepareConfig, out: str, todo: list[int]) -> Any:
        for number in todo:
            row = driver._write_shard_task({"number": number}, out=out)
            if row["error"]:
                raise driver.PreparationFailedError(row["error"])
            yield FinishedShard.from_json(row["finished"])

    monkeypatch.setattr(driver, "_run_tasks", run_tasks)
    monkeypatch.setattr(driver, "joined_cluster", lambda _: contextlib.nullcontext())


def prepare_rows(source: Path | str, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Prepare a source; rows of the first split in the order written."""
    config = PrepareConfig(source=str(source), out=str(out), **settings)
    driver.prepare(config)
    return read_rows(out / config.split_name)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a finished split."""
    rows: list[dict[str, Any]] = []
    for shard in read_manifest(folder).shards:
        rows += pq.read_table(folder / shard.file).to_pylist()
    return rows


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a finished split."""
    from pyarrow import fs

    manifest = Manifest.read(fs.LocalFileSystem(), str(folder))
    assert manifest is not None, f"{folder} is unfinished"
    return manifest


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def image_bytes(seed: int, size: tuple[int, int] = (40, 32), image_format: str = "PNG") -> bytes:
    """An encoded noise image."""
    return encode(noise_image(seed, size), image_format)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Write a tar file with these members."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
