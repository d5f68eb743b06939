"""metrics.jsonl: one line of JSON a log step, the record of a run that everything else copies.

Surprising: lines are written at a remembered offset, not appended. Whatever a full disk left of a
line (file systems may report that only at closing) is overwritten by the next try, so that no line
is there twice or half.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
_RETRY_S = 2.0

Record = dict[str, Any]


class MetricsFile:
    """Writes records; those that find no room wait in memory. Only `__init__` raises.

    Args:
        path: the file; its folder exists.
        start_step: records of later steps are dropped, the resumed run writes them again.
        warn: told once when lines cannot be written, and at the end if they never could.
    """

    def __init__(
        self, path: Path, *, start_step: int, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.path = path
        self._warn = warn
        self._unwritten: list[bytes] = []
        self._retry_at = 0.0
        self._is_failing = False
        self.kept, self.last_step = self._truncate_after(start_step)
        """Records of earlier attempts that stay, and the last step there was."""

    def append(self, record: Record) -> None:
        """Write a record, after those that could not be written before."""
        self._unwritten.append(json.dumps(record).encode() + b"\n")
        if time.monotonic() >= self._retry_at:
            self._flush()

    def close(self) -> None:
        """Try a last time to write what is in memory."""
        if self._unwritten:
            self._flush()
        if self._unwritten:
            self._warn(
                f"{self.path}: {len(self._unwritten)} lines found no room until the end and are "
                "lost there; MLflow has them, unless it could not be reached either"
            )

    def _truncate_after(self, step: int) -> tuple[list[Record], int]:
        """Drop records past a step.

        Cutting off the tail is one system call that needs no room: a kill or a full disk in the
        middle of it loses nothing, as it could if the lines that stay were written again.
        """
        self._size = last_step = 0
        if not self.path.exists():
            return [], last_step
        content = self.path.read_bytes()
        kept = []
        for end, record in _parse(content.splitlines(keepends=True)):
            last_step = record["step"]
            if last_step <= step:
                kept.append(record)
                self._size = end
        if self._size < len(content):
            os.truncate(self.path, self._size)
        if self._size and content[self._size - 1 : self._size] != b"\n":
            self._unwritten.append(b"\n")  # a kill took it from the last line
        return kept, last_step

    def _flush(self) -> None:
        content = b"".join(self._unwritten)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            with open(descriptor, "wb", buffering=0) as file:
                # Someone may have cut the file meanwhile; a hole would be no JSON.
                start = min(self._size, os.fstat(descriptor).st_size)
                try:
                    _write_at(descriptor, start, content)
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(start)
                    raise
        except OSError as error:
            self._retry_at = time.monotonic() + _RETRY_S
            if not self._is_failing:
                self._warn(
                    f"{self.path}: {error}; training goes on, its lines wait in memory for room"
                )
            self._is_failing = True
            return
        if self._is_failing:
            logger.info("%s: wrote the %d lines that waited", self.path, len(self._unwritten))
        self._is_failing = False
        self._size = start + len(content)
        self._unwritten.clear()


def read_records(path: Path) -> Iterator[Record]:
    """All whole records of a metrics.jsonl; none when there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from (record for _, record in _parse(file))


def _parse(lines: Iterable[bytes]) -> Iterator[tuple[int, Record]]:
    """Records, each with the offset its line ends at; what is no record is passed over."""
    end = 0
    for line in lines:
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        yield end, record


def _write_at(descriptor: int, offset: int, content: bytes) -> None:
    """Write all of it: a disk that gets full takes a part before it complains."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        offset, rest = offset + written, rest[written:]
