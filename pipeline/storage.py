"""Files wherever they lie: local paths and the file systems pyarrow opens by URI (s3, gs, abfs).

The surprising rule: only *absence* is a property of a file (not found, no permission). Any other
error may be the network's, so it is retried with growing pauses and then raised. What is written
across a network is first made whole on the local disk, because a stream that is left half-way
publishes what it has got.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from pipeline.object_store import check_uri, open_s3, refusal

logger = logging.getLogger(__name__)
T = TypeVar("T")

ABSENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What a retry cannot mend: the file is not there, or not for us."""
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_CHUNK_BYTES = 64 * 2**20  # in memory at a time, as copies pyarrow makes of parts under way
_WRITE_CHECK_FILE = "_write_check"


class StorageUnavailableError(OSError):
    """Storage failed again and again; says nothing about what is in the file."""


class StorageRefusedError(StorageUnavailableError):
    """An object store knows no such bucket, or lets nobody with these credentials in.

    No property of a file: credentials that expire must not make good images bad.
    """


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """File system and path inside it of a local path or a URI such as `s3://bucket/folder`.

    Raises:
        ValueError: a URI pyarrow has no file system for, or one with credentials in it.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    if path.startswith("s3://"):
        return open_s3(path)
    check_uri(path)
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


def info_of(filesystem: fs.FileSystem, path: str) -> fs.FileInfo:
    """Kind and size of what is at a path, also of nothing; raises as `with_retries` does."""
    return with_retries(lambda: filesystem.get_file_info(path), path)


def list_files(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    """Files below a folder (or the file itself), sorted by path; empty when nothing is there."""
    info = info_of(filesystem, path)
    if info.type == fs.FileType.File:
        return [info]
    found = list_folder(filesystem, path, recursive=True)
    return sorted((f for f in found if f.type == fs.FileType.File), key=lambda f: str(f.path))


def list_folder(
    filesystem: fs.FileSystem, path: str, *, recursive: bool = False
) -> list[fs.FileInfo]:
    """What is in a folder; empty when it is not there."""
    selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
    return list(with_retries(lambda: filesystem.get_file_info(selector), path))


def read_bytes(filesystem: fs.FileSystem, path: str) -> bytes:
    """Content of a file; see `with_retries` for what is raised."""

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read())

    return with_retries(read, path)


def download(filesystem: fs.FileSystem, path: str, local: Path) -> None:
    """Copy a file to the local disk, a piece at a time; a piece that fails is read again."""
    with open_retrying(filesystem, path) as source, local.open("wb") as target:
        while piece := source.read(_CHUNK_BYTES):
            target.write(piece)


def delete_file(filesystem: fs.FileSystem, path: str) -> None:
    """Delete a file; one that is not there is fine: an answer may have got lost."""

    def delete() -> None:
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_file(path)

    _delete(filesystem, path, delete)


def delete_folder(filesystem: fs.FileSystem, path: str) -> None:
    """Delete a folder with all that is in it; one that is not there is fine."""

    def delete() -> None:
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_dir(path)

    _delete(filesystem, path, delete)


def _delete(filesystem: fs.FileSystem, path: str, delete: Callable[[], None]) -> None:
    if is_local(filesystem):
        delete()  # a disk does not mend itself
    else:
        with_retries(delete, path, doing="deleting")


def write_bytes(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file so that it is either whole or absent; makes its folder."""
    write_atomically(filesystem, path, lambda file: file.write(content))


def write_atomically(
    filesystem: fs.FileSystem, path: str, write: Callable[[pa.NativeFile], object]
) -> None:
    """Call `write`, once, with a file that takes the name `path` only when it is complete.

    Raises:
        StorageUnavailableError: across a network, every try failed.
        OSError: the local disk.
    """
    if is_local(filesystem):
        _write_local(filesystem, path, write)
        return
    with tempfile.TemporaryDirectory(prefix="itpn-upload-") as folder:
        whole = Path(folder) / "whole"
        with pa.OSFile(str(whole), mode="w") as file:
            write(file)
        upload(filesystem, path, whole)


def upload(filesystem: fs.FileSystem, path: str, local: Path) -> None:
    """Copy a local file to a path across a network: whole, or not at all.

    Raises:
        StorageUnavailableError: every try failed.
    """

    # pyarrow's streams cannot be taken back: closed or collected after an exception in Python, they
    # publish what they have got. Ctrl-C reaches the main thread only, so another one writes.
    def attempt() -> None:
        _upload_once(filesystem, path, local)

    with ThreadPoolExecutor(1, "upload") as writer:
        writer.submit(with_retries, attempt, path, doing="writing").result()


def _upload_once(filesystem: fs.FileSystem, path: str, local: Path) -> None:
    if not isinstance(filesystem, fs.S3FileSystem):  # which needs no folders, but would mark them
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    try:
        with local.open("rb") as source, filesystem.open_output_stream(path) as file:
            while piece := source.read(_CHUNK_BYTES):
                file.write(piece)
                file.flush()
    except FileNotFoundError as error:
        # Not the file: S3's answer when the upload was completed and its first answer got lost.
        raise OSError(f"the upload is not known any more: {error}") from error
    found, num_bytes = filesystem.get_file_info(path).size, local.stat().st_size
    if found != num_bytes:
        raise OSError(f"{path} has {found} bytes after {num_bytes} were written")


def _write_local(
    filesystem: fs.FileSystem, path: str, write: Callable[[pa.NativeFile], object]
) -> None:
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
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


def check_writable(uri: str, setting: str) -> None:
    """Write a small file into a folder across a network, and delete it; does nothing locally.

    Args:
        uri: the folder.
        setting: what named it, for the message.

    Raises:
        ValueError: it cannot be written, and why.
    """
    filesystem, root = resolve(uri)
    if is_local(filesystem):
        return
    path = f"{root}/{_WRITE_CHECK_FILE}"
    try:
        write_bytes(filesystem, path, b"")
        with contextlib.suppress(StorageRefusedError):  # then old checkpoints stay, with a warning
            delete_file(filesystem, path)
    except OSError as error:
        raise ValueError(f"{setting}='{uri}' cannot be written: {error}") from error


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


def with_retries(attempt: Callable[[], T], what: str, *, doing: str = "reading") -> T:
    """The result of `attempt`, tried again after each of RETRY_PAUSES_S.

    Args:
        attempt: what to do; doing it twice must be as good as once.
        what: file or folder, for messages.
        doing: the verb, for messages.

    Raises:
        FileNotFoundError, PermissionError: at once.
        StorageRefusedError: at once; no such bucket, or no right to it.
        StorageUnavailableError: every try failed.
    """
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            return attempt()
        except (StorageUnavailableError, *ABSENT_ERRORS):
            raise
        except OSError as error:
            if way_out := refusal(error):  # Arrow reports these as plain OSErrors
                raise StorageRefusedError(f"{doing} {what} failed: {error}; {way_out}") from error
            if pause_s is None:
                raise StorageUnavailableError(
                    f"{doing} {what} failed {len(RETRY_PAUSES_S) + 1} times, last: {error}"
                ) from error
            logger.warning("%s %s failed (%s); trying again in %g s", doing, what, error, pause_s)
            time.sleep(pause_s)
    raise AssertionError("unreachable")
