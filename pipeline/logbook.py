"""The logbook of a run: what happened to it, one line an event, over all its restarts.

`events.jsonl` in the run's folder tells who started when with how many workers, from which step,
what crashed, which checkpoints were written or not. Surprising: it also decides when a crashing run
gives up. Ray Train's own limit counts every worker ever lost, which ends a long run on a busy
cluster; here only restarts in a row count that reach no new checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

EventKind = Literal[
    "submit",  # the driver starts, or starts again
    "start",  # worker 0 enters the loop: num_workers
    "resume",  # the loop begins at a step: step, lost_steps
    "checkpoint",  # one is whole on disk: step, save_s, bytes
    "checkpoint_failed",  # one is not: step, error
    "preemption",  # a node is about to go: step
    "crash",  # a worker's own exception: rank, error
    "end",  # the driver ends: status; error, where it failed
]
Event = dict[str, Any]
_EVENT_START = re.compile(r'(?=\{"event": ")')  # inside a string JSON would escape the quotes


class Logbook:
    """Appends to and reads `events.jsonl`. Writing never raises: a full disk costs the line only.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: EventKind, **facts: Any) -> None:
        """Append an event; several processes may do so."""
        event = {"event": kind, "time": round(time.time(), 3), **facts}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            logger.warning("%s: %s; the event is lost: %s", self.path, error, event)

    def read(self) -> list[Event]:
        """All events; one cut by a full disk is left out, the next one on its line is not."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(errors="replace").splitlines()
        return [event for line in lines for event in _events_in(line)]


def _events_in(line: str) -> Iterator[Event]:
    for part in _EVENT_START.split(line):
        with contextlib.suppress(ValueError):
            if isinstance(event := json.loads(part), dict) and "event" in event:
                yield event


def restarts_without_progress(events: list[Event]) -> int:
    """Restarts in a row, since the run was last submitted, that reached no new checkpoint.

    Not counted: a restart announced as a preemption, and one with another number of workers (the
    cluster shrank or grew).
    """
    restarts, started_with, is_excused = 0, None, False
    for event in events:
        match event["event"]:
            case "submit":
                restarts, started_with, is_excused = 0, None, False
            case "checkpoint":
                restarts = 0
            case "preemption":
                is_excused = True
            case "start":
                is_same_group = started_with == event["num_workers"]
                restarts += is_same_group and not is_excused
                started_with, is_excused = event["num_workers"], False
    return restarts


def give_up_message(events: list[Event], max_failures: int) -> str | None:
    """Why the run must not be restarted once more, or None."""
    restarts = restarts_without_progress(events)
    if restarts <= max_failures:
        return None
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    # Of the attempt that just failed alone: an older crash may have had another cause.
    crashes = [event for event in events[starts[-2] :] if event["event"] == "crash"]
    last = "a worker process vanished (killed, or out of memory)"
    if crashes:
        last = f"worker {crashes[-1]['rank']}: {crashes[-1]['error']}"
    return (
        f"{restarts} restarts in a row reached no new checkpoint, run.max_failures={max_failures} "
        f"allows no more; last: {last}"
    )


def fault_metrics(events: list[Event]) -> dict[str, float]:
    """fault/*: restarts, lost steps, failed checkpoints, wall-clock of all attempts."""
    kinds = [event["event"] for event in events]
    metrics = {
        "fault/restarts": max(0, kinds.count("start") - 1),
        "fault/lost_steps": sum(event.get("lost_steps", 0) for event in events),
        "fault/failed_checkpoints": kinds.count("checkpoint_failed"),
    }
    metrics["fault/wall_s"] = _wall_s(events)
    return {key: float(value) for key, value in metrics.items()}


def _wall_s(events: list[Event]) -> float:
    """Seconds from every submission to the last sign of life before the next one."""
    total, first, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "submit":
            total += last - first if first is not None else 0.0
            first = event["time"]
        last = event["time"]
    return total + (last - first if first is not None else 0.0)
