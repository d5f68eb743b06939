"""Runs of one machine that take turns: while one goes on, all processes of the others are frozen.

Whole runs one after the other differ by 5 % when nothing differs but the minute in which they ran.
Here each goes on for a few seconds at a time, and neighbours in time are compared. Frozen means
SIGSTOP for the whole tree, data plane and Ray's own processes included, so that nobody works ahead.
Linux only: processes are found by a mark in their environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

_MARK = "ITPN_BENCHMARK_TURNS"
_START_TIMEOUT_S = 180.0
_END_TIMEOUT_S = 60.0
_SETTLE_S = 1.0
"""What a run gets, after it was frozen, before its turn counts."""


class Turn(NamedTuple):
    """What a run did in its turn."""

    steps: int
    seconds: float


class FrozenRun:
    """A training run that stands still but for its turns.

    Args:
        kind: its name.
        command: starts it; it goes on until it is told to stop.
        env: its environment.
        records: the metrics.jsonl it writes; lines with `step` and `time`.
    """

    def __init__(self, kind: str, command: list[str], env: dict[str, str], records: Path) -> None:
        self.kind = kind
        self.records = records
        self._mark = f"{_MARK}={os.getpid()}-{kind}"
        name, value = self._mark.split("=")
        self._log = records.parents[1] / f"{kind}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=env | {name: value}, stdout=log, stderr=log, start_new_session=True
            )

    def warm_up(self, seconds: float) -> None:
        """Wait for the first records and some seconds more, then freeze."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while len(self._read()) < 2:
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"'{self.kind}' logged nothing in {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.2)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)

    def take_turn(self, seconds: float) -> Turn:
        """Go on for some seconds; steps and time between the first and the last record of them."""
        self._signal(signal.SIGCONT)
        time.sleep(_SETTLE_S)
        started = time.time()
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        self._check()
        seen = [record for record in self._read() if record["time"] >= started]
        if len(seen) < 2:
            raise RuntimeError(f"'{self.kind}' logged {len(seen)} records in a turn; 2 are needed")
        first, last = seen[0], seen[-1]
        return Turn(last["step"] - first["step"], last["time"] - first["time"])

    def end(self) -> None:
        """Stop it as Ctrl-C would, and kill what is left."""
        self._signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        while self.processes():
            self._signal(signal.SIGKILL)
            self._process.poll()
            time.sleep(0.05)

    def processes(self) -> set[int]:
        """Ids of all that belong to the run."""
        mark, found = self._mark.encode(), set()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
        return found

    def _read(self) -> list[dict[str, Any]]:
        """Its whole records."""
        if not self.records.exists():
            return []
        lines = self.records.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _check(self) -> None:
        if self._process.poll() is not None:
            tail = self._log.read_text()[-2000:]
            raise RuntimeError(f"'{self.kind}' ended with {self._process.returncode}:\n{tail}")

    def _signal(self, number: int) -> None:
        """To all its processes; again until no new one turns up."""
        done: set[int] = set()
        while new := self.processes() - done:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            done |= new
