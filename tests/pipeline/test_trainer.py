"""How the driver follows a run: news are shown, a wish to stop is passed on once, then it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import trainer
from pipeline.progress import ProgressDisplay


class Board:
    """Stands for the actor; calls return at once."""

    def __init__(self, on_stop: Callable[[], None] = lambda: None) -> None:
        self.num_stops = 0
        self.news: list[tuple[int, dict[str, float]]] = [(10, {"train/loss": 0.5})]
        self.drain = SimpleNamespace(remote=self._drain)
        self.request_stop = SimpleNamespace(remote=self._request_stop)
        self._on_stop = on_stop

    def _drain(self) -> Any:
        news, self.news = self.news, []
        return [], news

    def _request_stop(self) -> None:
        self.num_stops += 1
        self._on_stop()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.ray, "get", lambda value: value)
    monkeypatch.setattr(trainer, "_POLL_S", 0.01)


def follow(board: Board, is_done: threading.Event, stop: threading.Event | None) -> None:
    with ProgressDisplay(20, "scratch") as display:
        trainer._follow(is_done, board, display, stop)


def test_a_run_beside_others_is_told_to_stop_once_and_followed_to_its_end(
    capsys: pytest.CaptureFixture[str],
):
    is_done, stop = threading.Event(), threading.Event()
    # The workers take some polls to save and leave.
    board = Board(on_stop=lambda: threading.Timer(0.1, is_done.set).start())
    stop.set()
    follow(board, is_done, stop)
    assert board.num_stops == 1
    news, stopping = capsys.readouterr().out.splitlines()
    assert news.startswith("scratch  step 10/20  loss 0.5000")
    assert stopping.startswith("scratch  stopping after the next log step")


def test_workers_that_do_not_stop_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer, "_STOP_GRACE_S", 0.1)
    stop, begun = threading.Event(), time.monotonic()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        follow(Board(), threading.Event(), stop)
    assert 0.1 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("stop", [None, threading.Event()], ids=["alone", "beside others"])
def test_an_undisturbed_run_is_followed_to_its_end(stop: threading.Event | None):
    is_done, board = threading.Event(), Board()
    threading.Timer(0.1, is_done.set).start()
    follow(board, is_done, stop)
    assert board.num_stops == 0 and board.news == []
