"""What happened to a run, over time: a strip of marks, and the events worth a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.credentials import without_passwords
from pipeline.html_report.axes import Axis, nice_ticks
from pipeline.html_report.number_format import counted, duration, file_size, moment, number
from pipeline.logbook import Event

MAX_MARKS = 400
MAX_ROWS = 60
_TITLE_CHARS = 200
_WIDTH, _LEFT, _RIGHT, _LANE = 700, 142, 20, 30
_LANES = ("attempts", "checkpoints", "faults")
_LANE_OF = {
    **{"submit": 0, "start": 0, "resume": 0, "end": 0, "checkpoint": 1},
    **{"checkpoint_failed": 2, "preemption": 2, "crash": 2},
}
_UNITS = ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days"))


@dataclass(frozen=True)
class Row:
    """An event as a line of the table."""

    after: str
    """Since the run was first submitted."""
    at: str
    title: str
    text: str
    is_fault: bool


def timeline_rows(events: Sequence[Event]) -> tuple[list[Row], int]:
    """All events but checkpoints and starts that went well, and how many are left out.

    The first and the last ones are kept where there are more than `MAX_ROWS`.
    """
    if not events:
        return [], 0
    begin = events[0]["time"]
    told = [e for e in events if e["event"] not in ("checkpoint", "start")]
    left_out = max(0, len(told) - MAX_ROWS)
    if left_out:
        told = [*told[: MAX_ROWS // 2], *told[-(MAX_ROWS - MAX_ROWS // 2) :]]
    return [_row(event, begin) for event in told], left_out


def timeline_svg(events: Sequence[Event]) -> Markup:
    """The strip: one lane for attempts, checkpoints and faults each, over hours or days."""
    if not events:
        return Markup("")
    begin, end = events[0]["time"], max(e["time"] for e in events)
    span = max(end - begin, 1e-3)
    size, unit = max((u for u in _UNITS if span >= 2 * u[0]), default=_UNITS[0])
    x = Axis(0.0, span / size, _LEFT, _WIDTH - _RIGHT)
    bottom = 8 + _LANE * len(_LANES)
    parts = []
    for i, lane in enumerate(_LANES):
        parts.append(
            Markup(
                '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
                '<text class="tick end" x="{3}" y="{4}">{5}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, _lane_px(i), _LEFT - 14, _lane_px(i) + 4, lane)
        )
    for tick in nice_ticks(0.0, span / size, 6):
        parts.append(
            Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(
                x(tick), bottom + 18, number(tick)
            )
        )
    parts.append(
        Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            (_LEFT + _WIDTH - _RIGHT) / 2, bottom + 42, f"{unit} since the run was submitted"
        )
    )
    parts += [_attempt(x, first, last, begin, size) for first, last in attempts(events)]
    parts += [_mark(e, x((e["time"] - begin) / size), begin) for e in _shown(events)]
    return Markup(
        '<svg class="chart timeline" role="img" viewBox="0 0 {} {}" aria-label="{}">{}</svg>'
    ).format(_WIDTH, bottom + 52, describe_events(events), Markup("").join(parts))


def attempts(events: Sequence[Event]) -> list[tuple[float, float]]:
    """First and last sign of life of every submission of the run."""
    spans: list[tuple[float, float]] = []
    for event in events:
        if event["event"] == "submit" or not spans:
            spans.append((event["time"], event["time"]))
        spans[-1] = (spans[-1][0], max(spans[-1][1], event["time"]))
    return spans


def describe_events(events: Sequence[Event]) -> str:
    """How often what happened, in words."""
    kinds = [event["event"] for event in events]
    counts = [
        (len(attempts(events)), "submission"),
        (max(0, kinds.count("start") - 1), "restart"),
        (kinds.count("checkpoint"), "checkpoint"),
        (kinds.count("checkpoint_failed"), "failed checkpoint"),
        (kinds.count("preemption"), "preemption"),
        (kinds.count("crash"), "crash"),
    ]
    shown = [
        counted(n, name)
        for n, name in counts
        if n or name in ("submission", "restart", "checkpoint")
    ]
    return ", ".join(shown)


def resume_steps(events: Sequence[Event]) -> list[float]:
    """Steps at which the run was resumed; its first start is none."""
    steps = [event.get("step") for event in events if event["event"] == "resume"]
    return [float(step) for step in steps[1:] if isinstance(step, int | float)]


def _shown(events: Sequence[Event]) -> list[Event]:
    """All faults; of the rest, where there are very many, only every n-th."""
    calm = [e for e in events if _LANE_OF.get(e["event"], 0) < 2]
    faults = [e for e in events if _LANE_OF.get(e["event"], 0) == 2]
    return [*calm[:: 1 + len(calm) // MAX_MARKS], *faults[:: 1 + len(faults) // MAX_MARKS]]


def _lane_px(lane: int) -> int:
    return 8 + _LANE * lane + _LANE // 2


def _attempt(x: Axis, first: float, last: float, begin: float, size: float) -> Markup:
    left, right = x((first - begin) / size), x((last - begin) / size)
    return Markup(
        '<rect class="attempt" x="{:.1f}" y="{}" width="{:.1f}" height="8" rx="4"/>'
    ).format(left, _lane_px(0) - 4, max(right - left, 4.0))


def _mark(event: Event, place: float, begin: float) -> Markup:
    kind = event["event"]
    lane = _LANE_OF.get(kind, 0)
    row = _row(event, begin)
    title = f"{row.after}: {row.title}{' - ' if row.text else ''}{row.text[:_TITLE_CHARS]}"
    shapes = {
        0: '<circle class="mark" cx="{0:.1f}" cy="{1}" r="5"><title>{2}</title></circle>',
        1: '<circle class="mark good" cx="{0:.1f}" cy="{1}" r="5"><title>{2}</title></circle>',
        2: '<path class="mark fault" transform="translate({0:.1f} {1})" d="M-6 5 L0 -6 L6 5 Z">'
        "<title>{2}</title></path>",
    }
    return Markup(shapes[lane]).format(place, _lane_px(lane), title)


def _row(event: Event, begin: float) -> Row:
    title, text = _tell(event)
    is_fault = _LANE_OF.get(event["event"], 0) == 2 or (
        event["event"] == "end" and event.get("status") == "FAILED"
    )
    after = duration(event["time"] - begin) if event["time"] > begin else "start"
    return Row(after, moment(event["time"]), title, without_passwords(text)[:2000], is_fault)


def _tell(event: Event) -> tuple[str, str]:
    step = f"at step {event['step']}" if "step" in event else ""
    fact: dict[str, Any] = event
    workers = fact.get("num_workers", "?")
    match event["event"]:
        case "submit":
            return "submitted", f"for {_workers(workers)}"
        case "start":
            return "training group started", f"with {_workers(workers)}"
        case "resume":
            if not fact.get("step"):
                return "training began", f"with {_workers(workers)}"
            lost = fact.get("lost_steps", 0)
            again = f"{counted(lost, 'step')} to compute again" if lost else "no step lost"
            return "resumed", f"{step}, {again}"
        case "checkpoint":
            size = fact.get("bytes")
            return "checkpoint", step + (f", {file_size(size)}" if size else "")
        case "checkpoint_failed":
            return "checkpoint failed", f"{step}: {fact.get('error', '')}"
        case "preemption":
            return "node about to go", step
        case "crash":
            return f"worker {fact.get('rank', '?')} crashed", str(fact.get("error", ""))
        case "end":
            status = str(fact.get("status", "")).lower()
            return f"ended: {status}", str(fact.get("error", ""))
        case other:
            return str(other), step


def _workers(count: Any) -> str:
    if isinstance(count, list | tuple):
        return f"{count[0]} to {count[-1]} workers"
    return counted(count, "worker") if isinstance(count, int) else f"{count} workers"
