"""Runs that take turns really stand still in between, with all the processes they started."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from frozen_turns import FrozenRun  # noqa: E402

RUN = """
import subprocess, sys
child = "import json, sys, time\\n"
child += "step = 0\\n"
child += "while True:\\n"
child += "    step += 2\\n"
child += "    print(json.dumps({'step': step, 'time': time.time()}), flush=True)\\n"
child += "    time.sleep(0.02)\\n"
# In a session of its own, as Ray starts its processes.
with open(sys.argv[1], "w") as file:
    process = subprocess.Popen([sys.executable, "-c", child], stdout=file, start_new_session=True)
    process.wait()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.fixture
def run(tmp_path: Path):
    records = tmp_path / "kind" / "demo" / "metrics.jsonl"
    records.parent.mkdir(parents=True)
    command = [sys.executable, "-c", RUN, str(records)]
    run = FrozenRun("kind", command, dict(os.environ), records)
    yield run
    run.end()


def test_a_run_goes_on_in_its_turns_only(run: FrozenRun):
    run.warm_up(0.1)
    size = run.records.stat().st_size
    time.sleep(0.5)
    assert run.records.stat().st_size == size, "it is frozen"
    turn = run.take_turn(1.0)
    assert 0.5 < turn.seconds <= 1.1
    assert turn.steps / 2 == pytest.approx(turn.seconds / 0.02, rel=0.4)
    size = run.records.stat().st_size
    time.sleep(0.5)
    assert run.records.stat().st_size == size, "it is frozen again"


def test_its_end_leaves_no_process(run: FrozenRun):
    run.warm_up(0.1)
    assert len(run.processes()) == 2
    run.end()
    assert not run.processes()


def test_one_that_ended_is_told_with_what_it_said(tmp_path: Path):
    records = tmp_path / "kind" / "demo" / "metrics.jsonl"
    command = [sys.executable, "-c", "raise SystemExit('no images here')"]
    with pytest.raises(RuntimeError, match="no images here"):
        FrozenRun("kind", command, dict(os.environ), records).warm_up(0.1)
