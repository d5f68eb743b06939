"""The logbook: when a run gives up, what faults cost, and that a full disk costs lines only."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.logbook import (
    Event,
    Logbook,
    fault_metrics,
    give_up_message,
    restarts_without_progress,
)
from tests.conftest import REPO_ROOT
from tests.pipeline.storage_faults import fill_disk, small_disk


def events(story: str) -> list[Event]:
    """Events of a story in short: words, `start2` for a start with two workers."""
    told: list[Event] = []
    for time, word in enumerate(story.split()):
        kind = word.rstrip("0123456789")
        event: Event = {"event": kind, "time": float(time)}
        if kind in ("start", "submit"):
            event["num_workers"] = int(word.removeprefix(kind) or 1)
        if kind == "crash":
            event |= {"rank": 1, "error": f"OSError: at {time}"}
        told.append(event)
    return told


@pytest.mark.parametrize(
    ("story", "restarts"),
    [
        ("", 0),
        ("submit start2", 0),
        ("submit start2 resume crash start2", 1),
        ("submit start2 crash start2 crash start2 start2", 3),
        # a checkpoint is progress; one that failed is not
        ("submit start2 crash start2 checkpoint crash start2", 1),
        ("submit start2 crash start2 checkpoint", 0),
        ("submit start2 crash start2 checkpoint_failed crash start2", 2),
        # a node was taken away, which excuses one restart
        ("submit start2 preemption start2", 0),
        ("submit start2 preemption start2 crash start2", 1),
        ("submit start2 crash start2 preemption start2", 1),
        ("submit start2 preemption preemption start2 start2", 1),
        # the cluster shrank, or grew
        ("submit start2 start1", 0),
        ("submit start2 crash start1 start2", 0),
        ("submit start2 start1 crash start1 crash start1", 2),
        ("submit start2 preemption start1 start1", 1),
        # submitted again: the user has had a look
        ("submit start2 crash start2 crash start2 end submit start2", 0),
        ("submit start2 crash start2 submit start2 crash start2", 1),
        ("submit start2 preemption submit start2 start2", 1),
        ("start2 crash start2", 1),  # the submission itself was lost
    ],
)
def test_restarts_without_progress_as_counted_by_hand(story: str, restarts: int) -> None:
    assert restarts_without_progress(events(story)) == restarts


def test_a_run_gives_up_at_one_restart_more_than_allowed_and_names_the_last_crash() -> None:
    story = events("submit start2 crash start2 crash start2")
    assert give_up_message(story, 2) is None
    assert give_up_message(story, 1) == (
        "2 restarts in a row reached no new checkpoint, run.max_failures=1 allows no more; "
        "last: worker 1: OSError: at 4"
    )
    assert give_up_message(events("submit start2"), 0) is None
    assert give_up_message(events("submit start2 start2"), 0) is not None


@pytest.mark.parametrize(
    "story",
    [
        "submit start2 crash start2 end submit start2 start2",  # the crash was before
        "submit start2 crash start2 start2",  # the crash was of the start before
        "submit start2 start2",
    ],
)
def test_a_worker_that_vanished_is_not_blamed_on_an_older_crash(story: str) -> None:
    message = give_up_message(events(story), 0)
    assert message is not None
    assert message.endswith("last: a worker process vanished (killed, or out of memory)")


def test_giving_up_needs_no_submission_in_the_logbook() -> None:
    message = give_up_message(events("start2 crash start2"), 0)
    assert message is not None and "OSError: at 1" in message


def test_many_preempted_or_resized_starts_never_end_a_run() -> None:
    preempted = "submit start2 " + "preemption start2 " * 500
    resized = "submit start2 " + "start1 start2 " * 500
    assert give_up_message(events(preempted), 0) is None
    assert give_up_message(events(resized), 0) is None


def test_fault_metrics_add_up_over_all_submissions() -> None:
    story = [
        {"event": "submit", "time": 100.0},
        {"event": "start", "time": 101.0, "num_workers": 2},
        {"event": "resume", "time": 102.0, "step": 0, "lost_steps": 0},
        {"event": "checkpoint", "time": 110.0, "step": 5},
        {"event": "crash", "time": 120.0, "rank": 0, "error": "OSError"},
        {"event": "start", "time": 121.0, "num_workers": 2},
        {"event": "resume", "time": 122.0, "step": 5, "lost_steps": 3},
        {"event": "checkpoint_failed", "time": 130.0, "step": 10, "error": "full"},
        {"event": "preemption", "time": 140.0, "step": 12},  # and the driver dies: no `end`
        {"event": "submit", "time": 1000.0},
        {"event": "start", "time": 1001.0, "num_workers": 1},
        {"event": "resume", "time": 1002.0, "step": 5, "lost_steps": 7},
        {"event": "end", "time": 1010.0, "status": "FINISHED"},
    ]
    assert fault_metrics(story) == {
        "fault/restarts": 2.0,
        "fault/lost_steps": 10.0,
        "fault/failed_checkpoints": 1.0,
        "fault/wall_s": 50.0,
    }
    assert set(fault_metrics([]).values()) == {0.0}
    assert fault_metrics(story[:3])["fault/restarts"] == 0


# ---- the file ----


def test_events_come_back_in_order_with_their_facts_and_time(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path / "events.jsonl")
    assert logbook.read() == []
    logbook.write("submit", num_workers=(1, 2))
    logbook.write("crash", rank=1, error='KeyError: {"event": "a}"}\nsecond line')
    submit, crash = logbook.read()
    assert submit["event"] == "submit" and submit["num_workers"] == [1, 2]
    assert crash["error"] == 'KeyError: {"event": "a}"}\nsecond line'
    assert 0 <= crash["time"] - submit["time"] < 10
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def test_a_line_cut_anywhere_costs_itself_and_never_its_neighbours(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path / "events.jsonl")
    for kind, facts in (("submit", {}), ("crash", {"error": "{'a': {}}", "at": {"b": {}}})):
        logbook.write(kind, **facts)  # type: ignore[arg-type]
    whole = logbook.path.read_text()
    first, second = whole.splitlines(keepends=True)
    for length in range(1, len(second)):
        logbook.path.write_text(first + second[:length])
        logbook.write("start", num_workers=2)  # what comes once there is room again
        kinds = [event["event"] for event in logbook.read()]
        is_whole = length == len(second) - 1  # all but the line's end
        assert kinds == ["submit", *(["crash"] if is_whole else []), "start"], second[:length]


def test_lines_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path / "events.jsonl")
    logbook.write("submit")
    with logbook.path.open("ab") as file:
        file.write(b"\0\0\0\0\n{}\n[1]\n\n\xff\xfe}\n")
    logbook.write("end", status="FAILED")
    assert [event["event"] for event in logbook.read()] == ["submit", "end"]


def test_a_full_disk_costs_the_line_and_a_warning_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        logbook = Logbook(disk / "events.jsonl")
        logbook.write("submit")
        filler = fill_disk(disk, 0)
        with caplog.at_level(logging.WARNING):
            for step in range(200):  # the file's last page has room for some
                logbook.write("checkpoint_failed", step=step, error="No space left on device")
        assert "No space left on device; the event is lost: " in caplog.text
        kept = logbook.read()
        assert kept[0]["event"] == "submit" and len(kept) < 100
        filler.unlink()
        logbook.write("end", status="FINISHED")
        assert logbook.read() == [*kept, logbook.read()[-1]]
        assert logbook.read()[-1]["status"] == "FINISHED"


@pytest.mark.parametrize("obstacle", ["missing folder", "a folder in its place"])
def test_a_file_that_cannot_be_written_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, obstacle: str
) -> None:
    path = tmp_path / "run" / "events.jsonl"
    if obstacle == "a folder in its place":
        path.mkdir(parents=True)
    Logbook(path).write("submit")
    assert "the event is lost: {'event': 'submit'" in caplog.text


WRITER = """
import sys; from pathlib import Path; from pipeline.logbook import Logbook
for turn in range(100):
    Logbook(Path(sys.argv[1])).write("crash", rank=int(sys.argv[2]), error="e" * 500, turn=turn)
"""


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(rank)], cwd=REPO_ROOT)
        for rank in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    told: dict[int, list[Any]] = {rank: [] for rank in range(3)}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        told[event["rank"]].append(event["turn"])
    assert told == {rank: list(range(100)) for rank in range(3)}
