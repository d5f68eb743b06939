"""A trace of some steps of a run: `--run.profile-steps 10:15`.

Surprising: a profile is taken by worker 0 alone. The others do the same work, and a trace of one
step of a large model already holds tens of megabytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)
_MOST_OPERATORS = 40


class StepProfiler:
    """Profiles a stretch of steps and leaves a trace and a table of operators.

    Steps before and after it cost a comparison. Use as a context manager: what is being profiled
    when the run ends is written, too.

    Args:
        steps: steps to profile; an empty range profiles nothing.
        folder: the traces are written here.
        on_file: called with every file written.
    """

    def __init__(self, steps: range, folder: Path, on_file: Callable[[Path], None]) -> None:
        self._steps = steps
        self._folder = folder
        self._on_file = on_file
        self._profile: profile | None = None
        self._first = self._last = 0

    def after_step(self, step: int) -> None:
        """Begin or end the profile, if one of them is due.

        Args:
            step: steps done; at the start of a run, those it starts with.
        """
        if self._profile is not None:
            self._last = step
            if step >= self._steps[-1]:
                self.close()
        elif step + 1 in self._steps:
            self._begin(step)

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._first, self._last = step + 1, step
        started = profile(activities=activities)
        try:
            started.start()
        except RuntimeError as error:  # counters of a GPU may be somebody else's
            logger.warning("no profile: %s; training goes on", error)
            self._steps = range(0)
        else:
            self._profile = started

    def close(self) -> None:
        """Write what has been profiled, if anything; a failure is a warning."""
        if self._profile is None:
            return
        taken, self._profile = self._profile, None
        try:
            taken.stop()
            if self._last >= self._first:
                self._write(taken)
        except (OSError, RuntimeError) as error:  # a full disk costs a trace, not the run
            logger.warning("the profile was not written: %s; training goes on", error)

    def _write(self, taken: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{self._first}-{self._last}"
        trace, table = self._folder / f"{name}.json.gz", self._folder / f"{name}.txt"
        partial = self._folder / f".{name}.part.json.gz"
        taken.export_chrome_trace(str(partial))
        os.replace(partial, trace)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        averages = taken.key_averages()
        order = f"self_{device}_time_total"
        table.write_text(str(averages.table(sort_by=order, row_limit=_MOST_OPERATORS)))
        for file in (trace, table):
            self._on_file(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
