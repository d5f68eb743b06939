"""What the tests of tracking share: a server that is not there, and looking into one that is."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient


@pytest.fixture
def dead_uri() -> Iterator[str]:
    """A port that nobody listens on, and nobody else can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def write_metrics(tmp_path: Path, steps: range, keys: tuple[str, ...] = ("train/loss",)) -> None:
    lines = [{"step": s, "time": 1.5 + s, **{key: 0.5 * s for key in keys}} for s in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))


def steps_of(uri: str, run_id: str, key: str = "train/loss") -> list[int]:
    return [m.step for m in MlflowClient(uri).get_metric_history(run_id, key)]
