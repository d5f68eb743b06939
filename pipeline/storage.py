"""Files wherever they lie: local paths and the file systems pyarrow opens by URI (s3, gs, abfs).

The surprising rule: only *absence* is a property of a file (not found, no permission). Any other
error while reading may be the network's, so it is retried with growing pauses and then raised.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

logger = logging.getLogger(__name__)
T = TypeVar("T")

ABSENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What a retry cannot mend: the file is not there, or not for us."""
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)


class StorageUnavailableError(OSError):
    """Reading failed again and again; says nothing about what is in the file."""


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """File system and path inside it of a local path or a URI such as `s3://bucket/folder`.

    Raises:
        ValueError: a URI pyarrow has no file system for.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    try:
        filesystem, inner = fs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"'{path}' is no location pyarrow can open ({error}); use a local path, s3://, gs://, "
            "abfs:// or file://"
        ) from error
    return filesystem, inner.rstrip("/")


def is_local(filesystem: fs.FileSystem) -> bool:
    """Whether reads cost no network (as far as anyone can tell from here)."""
    return isinstance(filesystem, fs.LocalFileSystem)


def list_files(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    """Files below a folder (or the file itself), sorted by path; empty when nothing is there."""
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return [info]
    if info.type == fs.FileType.NotFound:
        return []
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    return sorted((f for f in found if f.type == fs.FileType.File), key=lambda f: str(f.path))


def read_bytes(filesystem: fs.FileSystem, path: str) -> bytes:
    """Content of a file; see `with_retries` for what is raised."""

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read())

    return with_retries(read, path)


def write_bytes(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file so that it is either whole or absent; makes its folder."""
    write_atomically(filesystem, path, lambda file: file.write(content))


def write_atomically(
    filesystem: fs.FileSystem, path: str, write: Callable[[pa.NativeFile], object]
) -> None:
    """Call `write` with a file that takes the name `path` only when it is complete.

    Object stores make a file visible at close anyway; local ones get a temporary name first.
    """
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    if not is_local(filesystem):
        with filesystem.open_output_stream(path) as file:
            write(file)
        return
    # A name of its own: a task whose driver was killed may still be writing the same file.
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with filesystem.open_output_stream(temporary) as file:
            write(file)
        filesystem.move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(temporary)
        raise


def open_retrying(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """A seekable file whose every read is tried again as `with_retries` does."""
    return pa.PythonFile(_RetryingFile(filesystem, path), mode="r")


class _RetryingFile(io.RawIOBase):
    """Reads through `with_retries`, so that Parquet's reader sees the content or a clear error."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self._open = lambda: filesystem.open_input_file(path)
        self._path = path
        self._position = 0
        self._file: pa.NativeFile | None = None
        self._size = with_retries(lambda: self._opened().size(), path)

    def _opened(self) -> pa.NativeFile:
        if self._file is None:
            self._file = self._open()
        return self._file

    def _read_at(self, num_bytes: int) -> bytes:
        try:
            content: bytes = self._opened().read_at(num_bytes, self._position)
        except OSError:
            self._file = None  # a connection that failed is not used again
            raise
        return content

    def read(self, size: int = -1) -> bytes:
        wanted = self._size - self._position
        num_bytes = max(0, wanted if size < 0 else min(size, wanted))
        content = with_retries(lambda: self._read_at(num_bytes), self._path) if num_bytes else b""
        self._position += len(content)
        return content

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def with_retries(read: Callable[[], T], what: str) -> T:
    """The result of `read`, tried again after each of RETRY_PAUSES_S.

    Raises:
        FileNotFoundError, PermissionError: at once.
        StorageUnavailableError: every try failed.
    """
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            return read()
        except ABSENT_ERRORS:
            raise
        except OSError as error:
            if "ACCESS_DENIED" in str(error):  # Arrow reports S3's 403 as a plain OSError
                raise PermissionError(f"{what}: {error}") from error
            if pause_s is None:
                raise StorageUnavailableError(
                    f"reading {what} failed {len(RETRY_PAUSES_S) + 1} times, last: {error}"
                ) from error
            logger.warning("reading %s failed (%s); trying again in %g s", what, error, pause_s)
            time.sleep(pause_s)
    raise AssertionError("unreachable")
