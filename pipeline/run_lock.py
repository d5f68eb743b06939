"""One driver a run folder: the second one is told who is there, instead of mixing two runs.

Surprising: the lock is `flock`, not a file that exists, so a driver that is killed, or whose
machine goes away, holds nothing for anybody to clean up. On Linux it works over NFS, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"
_GRACE_S = 10.0  # a killed sweep's trial may need some seconds to go
_POLL_S = 0.25
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def run_lock(folder: Path, *, grace_s: float | None = None) -> Iterator[None]:
    """Hold a folder, made where there is none, for the time of a run.

    Folders that stay empty are removed again. On a file system without locks a warning is all.

    Args:
        folder: the run's.
        grace_s: seconds to wait for another driver, which may be about to end; default 10.

    Raises:
        ValueError: another driver holds it, with its host and process.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _acquire(folder / LOCK_FILE, _GRACE_S if grace_s is None else grace_s)
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(file)
        with contextlib.suppress(OSError):  # what is not empty holds a run
            for path in dict.fromkeys((folder, *made)):
                path.rmdir()


def _acquire(path: Path, grace_s: float) -> int:
    """Descriptor of the lock file, locked."""
    deadline, is_told = time.monotonic() + grace_s, False
    while (file := _try(path)) is None:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"run folder {path.parent} is in use by {_holder(path)}; wait for it, stop it, or "
                "pick another name with --run.name"
            )
        if not is_told:
            logger.info("waiting for %s to leave %s", _holder(path), path.parent)
            is_told = True
        time.sleep(_POLL_S)
    return file


def _try(path: Path) -> int | None:
    """Descriptor of the lock file, or None where another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)  # whoever let go may just have removed it
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            logger.warning("%s: no locks on this file system (%s)", path.parent, error)
            return file
        os.close(file)
        if isinstance(error, BlockingIOError):
            return None
        raise
    if not _is_still(file, path):  # its last holder removed it between our opening and locking it
        os.close(file)
        return None
    os.ftruncate(file, 0)
    os.write(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    return file


def _is_still(file: int, path: Path) -> bool:
    """Whether an open file is the one that has the name now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        facts = json.loads(path.read_text())
        return f"process {facts['pid']} on {facts['host']}"
    return "another process"
