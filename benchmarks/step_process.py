"""Processes that make a step when they are told to, so that several can take turns.

Surprising: what a benchmark compares may be a property of a whole process, such as how it deals
with freed memory, or may change it for what comes later, such as the peak of its memory.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch


class Taken(NamedTuple):
    """What one step took."""

    seconds: float
    page_faults: float
    """Pages that the process had to ask for."""
    peak_mb: float
    """Largest memory of the process so far; on CUDA: of its tensors."""


class StepProcess:
    """A process that runs `serve_steps`; a context manager that ends it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def take_turn(self) -> Taken:
        """Have it make its steps."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended instead of making a step")
        return Taken(*json.loads(line))


def serve_steps(steps: Callable[[], float], is_cuda: bool) -> None:
    """Answer each line of standard input.

    Args:
        steps: makes some steps and returns the seconds of one.
        is_cuda: they run there; the memory between two turns is then left to others.
    """
    for _ in sys.stdin:
        faults = _page_faults()
        seconds = steps()
        taken = Taken(seconds, _page_faults() - faults, _peak_mb(is_cuda))
        if is_cuda:
            torch.cuda.empty_cache()
        print(json.dumps(taken), flush=True)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _peak_mb(is_cuda: bool) -> float:
    if is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its maximum begins with that of the process that started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "Linux tells"
    return int(found[1]) / 2**10
