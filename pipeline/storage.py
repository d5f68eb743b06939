"""Files wherever they lie: local paths and the file systems pyarrow opens by URI (s3, gs, abfs).

The surprising rule: only *absence* is a property of a file (not found, no permission). Any other
error while reading may be the network's, so it is retried with growing pauses and then raised.
"""

from __future__ import annotations

import logging
import time
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
    temporary = f"{path}.part" if is_local(filesystem) else path
    with filesystem.open_output_stream(temporary) as file:
        write(file)
    if temporary != path:
        filesystem.move(temporary, path)


def with_retries(read: Callable[[], T], what: str) -> T:
    """The result of `read`, tried again after each of RETRY_PAUSES_S.

    Raises:
        FileNotFoundError, PermissionError: at once.
        OSError: the last one, when every try failed.
    """
    for pause_s in RETRY_PAUSES_S:
        try:
            return read()
        except ABSENT_ERRORS:
            raise
        except OSError as error:
            _raise_if_forbidden(error, what)
            logger.warning("reading %s failed (%s); trying again in %g s", what, error, pause_s)
            time.sleep(pause_s)
    return read()


def _raise_if_forbidden(error: OSError, what: str) -> None:
    """Arrow reports S3's 403 as a plain OSError."""
    if "ACCESS_DENIED" in str(error):
        raise PermissionError(f"{what}: {error}") from error
