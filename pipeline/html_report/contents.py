"""What the report is made of: everything a run folder says about its run, read with patience.

Surprising: nothing here raises for a file that is missing, cut or no JSON. A report is wanted most
of runs that broke, so a file that cannot be read becomes a remark on the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.logbook import Event, Logbook
from pipeline.metrics_file import Record, read_records
from pipeline.quarantine import QUARANTINE_FILE, BadSample, read_quarantine
from pipeline.run_folder import CLASSES_FILE, CONFIG_FILE

Kind = Literal["pretrain", "classify", "detect", "segment", "unknown"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """A run as its folder tells it."""

    path: Path
    """The folder, absolute."""
    config: dict[str, Any] = field(default_factory=dict)
    """Sections of settings, as config.json has them."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Of a finished run."""
    environment: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    """Rows of metrics.jsonl, by step."""
    events: list[Event] = field(default_factory=list)
    quarantine: list[BadSample] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.section("run").get("name") or self.summary.get("run") or self.path.name)

    @property
    def kind(self) -> Kind:
        """What the run trains for."""
        sections: dict[str, Kind] = {
            "objective": "pretrain",
            "detector": "detect",
            "segmenter": "segment",
            "augment": "classify",
        }
        return next((kind for key, kind in sections.items() if key in self.config), "unknown")

    @property
    def status(self) -> str:
        """FINISHED, FAILED, KILLED; RUNNING also for a driver killed without a word."""
        for event in reversed(self.events):
            if event["event"] == "end":
                return str(event.get("status", "unknown"))
            if event["event"] == "submit":
                return "RUNNING"
        return str(self.state.get("status", "FINISHED" if self.summary else "unknown"))

    @property
    def error(self) -> str:
        """Why the run failed; empty if it did not, or nobody could write it down."""
        if self.status != "FAILED":
            return ""
        return next((str(e.get("error", "")) for e in self.events[::-1] if e["event"] == "end"), "")

    @property
    def last_record(self) -> Record:
        """The newest row of metrics.jsonl."""
        return self.records[-1] if self.records else {}

    def section(self, name: str) -> dict[str, Any]:
        """Settings of a section; empty where there is none."""
        values = self.config.get(name)
        return values if isinstance(values, dict) else {}

    def newest(self, key: str) -> float | None:
        """The last value of a metric."""
        values = (record[key] for record in reversed(self.records) if key in record)
        value = next(values, self.summary.get("metrics", {}).get(key))
        return float(value) if isinstance(value, int | float) else None


def read_contents(path: Path) -> RunContents:
    """Read a run folder.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a run in it.
    """
    path = path.absolute()
    names = (CONFIG_FILE, "metrics.jsonl", "events.jsonl", "state.json", "summary.json")
    if not any((path / name).exists() for name in names):
        raise FileNotFoundError(
            f"{path} is no run folder: it has none of {', '.join(names)}; give runs/NAME"
        )
    remarks: list[str] = []

    def patiently(file: str, read: Callable[[], T], fallback: T) -> T:
        try:
            return read()
        except Exception as error:  # whatever a broken file makes a reader raise
            remarks.append(f"{file} could not be read: {type(error).__name__}: {error}")
            return fallback

    def facts(file: str) -> dict[str, Any]:
        return patiently(file, lambda: _read_object(path / file), {})

    classes = facts(CLASSES_FILE).get("classes", [])
    return RunContents(
        path=path,
        config=facts(CONFIG_FILE),
        summary=facts("summary.json"),
        environment={key: str(value) for key, value in facts("environment.json").items()},
        state=facts("state.json"),
        classes=[str(name) for name in classes] if isinstance(classes, list) else [],
        records=patiently("metrics.jsonl", lambda: _read_records(path / "metrics.jsonl"), []),
        events=patiently("events.jsonl", lambda: _read_events(path / "events.jsonl"), []),
        quarantine=patiently(
            QUARANTINE_FILE, lambda: read_quarantine(str(path / QUARANTINE_FILE)), []
        ),
        remarks=remarks,
    )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(errors="replace"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _read_records(path: Path) -> list[Record]:
    rows = [row for row in read_records(path) if isinstance(row, dict) and "step" in row]
    return sorted(rows, key=lambda row: row["step"])


def _read_events(path: Path) -> list[Event]:
    return [event for event in Logbook(path).read() if isinstance(event.get("time"), int | float)]
