"""A file system whose reads fail when told to, as a network's do, and a disk that fills up."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from pipeline import storage

URI = "faulty://"


class FaultyFileSystem(fs.FSSpecHandler):
    """The local files; each read first calls `fault` with the path, which may raise.

    `pyarrow` knows it for none of its local file systems, so readers treat it as a network.
    """

    def __init__(self, fault: Callable[[str], None]) -> None:
        from fsspec.implementations.local import LocalFileSystem

        super().__init__(LocalFileSystem())
        self.fault = fault
        self.num_reads = 0

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_FaultyFile(self, path), mode="r")


class _FaultyFile(io.RawIOBase):
    def __init__(self, owner: FaultyFileSystem, path: str) -> None:
        self._owner, self._path = owner, path
        self._file = Path(path).open("rb")  # noqa: SIM115 - closed by `close`
        self._is_lost = False

    def read(self, size: int = -1) -> bytes:
        self._owner.num_reads += 1
        if self._is_lost:
            raise OSError(f"connection for {self._path} is lost")
        try:
            self._owner.fault(self._path)
        except BaseException:
            self._is_lost = True  # for good: only a new one can read on
            raise
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class Outage:
    """A fault that lasts for some reads and says which error it is."""

    def __init__(self, num_failures: float, error: Callable[[str], BaseException]) -> None:
        self.num_failures = num_failures
        self.error = error

    def __call__(self, path: str) -> None:
        if self.num_failures > 0:
            self.num_failures -= 1
            raise self.error(path)


def lost_connection(path: str) -> BaseException:
    return OSError(f"connection reset while reading {path}")


def install(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[str], None] = lambda path: None
) -> FaultyFileSystem:
    """Make faulty:///path open local files through `fault`, and retries come without pauses."""
    handler = FaultyFileSystem(fault)
    filesystem = fs.PyFileSystem(handler)
    resolve = storage.resolve

    def resolve_or_fail(path: str) -> tuple[Any, str]:
        if path.startswith(URI):
            return filesystem, path.removeprefix(URI)
        return resolve(path)

    monkeypatch.setattr(storage, "resolve", resolve_or_fail)
    monkeypatch.setattr(storage, "RETRY_PAUSES_S", (0.0,) * len(storage.RETRY_PAUSES_S))
    return handler


@contextlib.contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    """A real file system of a few KiB, mounted at a new folder; skips where mounting is refused."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        pytest.skip("there is no `mount` to make a small disk with")
    if mounted.returncode:
        pytest.skip(f"no small disk, mounting needs root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)


def fill_disk(disk: Path, leave_kib: int) -> Path:
    """A file that takes all but `leave_kib` of what is free on a disk."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leave_kib * 1024))
    return filler
