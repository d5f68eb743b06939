"""Progress from the training workers to the driver's terminal, and the wish to stop the other way.

A Ray actor carries both, so it works wherever driver and workers run. The driver draws a bar on a
terminal and plain lines elsewhere.
"""

from __future__ import annotations

import sys
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBoard:
    """Mailbox between worker 0 and the driver; runs as a Ray actor."""

    def __init__(self) -> None:
        self._records: list[tuple[int, dict[str, float]]] = []
        self._remarks: list[str] = []
        self._is_stop_requested = False

    def post(self, step: int, metrics: dict[str, float]) -> bool:
        """Leave a record; returns whether the driver wants the run to stop."""
        self._records.append((step, metrics))
        return self._is_stop_requested

    def say(self, text: str) -> None:
        """Leave a remark for the person at the driver's terminal."""
        self._remarks.append(text)

    def drain(self) -> tuple[list[str], list[tuple[int, dict[str, float]]]]:
        """Take all remarks and records."""
        taken = self._remarks, self._records
        self._remarks, self._records = [], []
        return taken

    def request_stop(self) -> None:
        """Ask the workers to save and leave at their next log step."""
        self._is_stop_requested = True


def create_board() -> Any:
    """Start a ProgressBoard actor beside the driver; it takes no CPU from the run."""
    # On any other node it could be lost with that node, and worker 0 with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote()


class ProgressDisplay:
    """A bar on a terminal, one line per record elsewhere.

    Args:
        num_steps: of the run.
        name: of a run beside others: no bar, and each line begins with it.
    """

    def __init__(self, num_steps: int, name: str | None = None) -> None:
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.num_steps = num_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=name is not None or not self.console.is_terminal,
        )
        self._before = "" if name is None else f"{name}  "
        self._task = self._progress.add_task("starting", total=num_steps)

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Print a record and move the bar."""
        self._progress.update(self._task, completed=step, description="training")
        self._print(format_record(step, self.num_steps, metrics))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._progress.console.print(f"{self._before}{text}", markup=False)


def format_record(step: int, num_steps: int, metrics: dict[str, Any]) -> str:
    """One log line; the fields that the record has, always in the same order."""
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    for label, key, form in (
        ("loss", "train/loss", ".4f"),
        ("mim", "train/loss_mim", ".4f"),
        ("mfm4", "train/loss_mfm4", ".3f"),
        ("mfm8", "train/loss_mfm8", ".3f"),
        ("mfm16", "train/loss_mfm16", ".3f"),
        ("main", "train/loss_main", ".4f"),
        ("auxiliary", "train/loss_auxiliary", ".4f"),
        ("lr", "optim/lr", ".2e"),
        ("grad", "train/grad_norm", ".3f"),
        ("img/s", "perf/images_per_s", ".1f"),
        ("wait", "perf/data_wait_frac", ".0%"),
        ("mem", "memory/peak_gib", ".1fGiB"),
        ("| held-out mim/baseline", "val/mim_loss_over_baseline", ".3f"),
        ("mfm/baseline", "val/mfm_loss_over_baseline", ".3f"),
        ("| held-out main/baseline", "val/main_loss_over_baseline", ".3f"),
        ("auxiliary/baseline", "val/auxiliary_loss_over_baseline", ".3f"),
        ("|feature16|", "val/stage16_abs_mean", ".2f"),
    ):
        if key in metrics:
            suffix = "GiB" if form.endswith("GiB") else ""
            parts.append(f"{label} {metrics[key]:{form.removesuffix('GiB')}}{suffix}")
    if "perf/step_s" in metrics and step < num_steps:
        remaining_s = metrics["perf/step_s"] * (num_steps - step)
        parts.append(f"eta {int(remaining_s // 60)}:{int(remaining_s % 60):02d}")
    return "  ".join(parts)
