"""Throughput, waiting for data, memory: what a log line says about speed."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

_WARMUP_STEPS = 10  # the first steps start workers, fill queues and tune kernels: not throughput


class Meter:
    """Counts steps, seconds and seconds spent waiting for data.

    Time inside `paused()` (evaluation, pictures, checkpoints) counts nowhere.

    Args:
        images_per_step: the global batch.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._steps = 0
        self._mark = _Span(time.perf_counter())
        self._whole = _Span(time.perf_counter())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is waiting for data."""
        start = time.perf_counter()
        yield
        waited = time.perf_counter() - start
        self._mark.wait_s += waited
        self._whole.wait_s += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here does not count."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self._mark.start += paused
        self._whole.start += paused

    def step_done(self) -> None:
        """One optimiser step is complete."""
        self._steps += 1
        self._mark.steps += 1
        self._whole.steps += 1
        if self._steps == _WARMUP_STEPS:
            self._whole = _Span(time.perf_counter())

    def metrics(self) -> dict[str, float]:
        """perf/* since the last call."""
        span, self._mark = self._mark, _Span(time.perf_counter())
        return {f"perf/{key}": value for key, value in span.rates(self.images_per_step).items()}

    def totals(self) -> dict[str, float]:
        """images_per_s and data_wait_frac of the whole run after its first ten steps."""
        rates = self._whole.rates(self.images_per_step)
        return {key: rates[key] for key in ("images_per_s", "data_wait_frac")}


class _Span:
    def __init__(self, start: float) -> None:
        self.start = start
        self.steps = 0
        self.wait_s = 0.0

    def rates(self, images_per_step: int) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_s": self.steps * images_per_step / elapsed,
            "data_wait_frac": min(1.0, self.wait_s / elapsed),
            "step_s": elapsed / max(1, self.steps),
        }


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process: of the device on CUDA, resident otherwise."""
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
