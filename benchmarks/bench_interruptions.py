"""How often is a training thread interrupted, at the niceness Ray gives it and without?

    python benchmarks/bench_interruptions.py

Linux, as root; two CPU cores, five minutes. Two runs of the recipe `demo` take turns, on
photographs through Ray Data and on synthetic images (`frozen_turns.py`). In every other turn the
training process has the niceness that Ray starts it with, in the others that of Ray's services.
From the kernel's own account of the training thread: the share of a turn in which it ran, in which
it was ready and waited for a CPU, and how often a second it was put off one.

The last line is JSON: {kind: {"niceness 15" | "niceness 0": {ran, waited, interruptions_per_s}}}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_pretrain import ROOT, pretrain_command
from frozen_turns import FrozenRun

KINDS = ("real", "synthetic")
NICENESS = (15, 0)


class Account(NamedTuple):
    """What the kernel says of a thread, since it began."""

    ran_s: float
    waited_s: float
    interruptions: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each run and niceness")
    parser.add_argument("--turn-seconds", type=float, default=6.0)
    parser.add_argument("--warmup-seconds", type=float, default=15.0)
    args = parser.parse_args()
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, niceness - 1)
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    except PermissionError:
        parser.error("niceness may not be lowered here; root with CAP_SYS_NICE may")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder))))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of all turns."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    runs: list[FrozenRun] = []
    turns: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    try:
        for kind in KINDS:
            records = folder / kind / "demo" / "metrics.jsonl"
            command = pretrain_command(kind, str(folder / kind))
            runs.append(FrozenRun(kind, command, environment, records))
            runs[-1].warm_up(args.warmup_seconds)
        for _ in range(args.rounds):
            for run in runs:
                for niceness in NICENESS:
                    shares = take_turn(run, niceness, args.turn_seconds)
                    turns.setdefault((run.kind, niceness), []).append(shares)
    finally:
        for run in runs:
            run.end()
    result: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in KINDS}
    names = ("ran", "waited", "interruptions_per_s")
    for (kind, niceness), rows in turns.items():
        middle = [round(statistics.median(column), 4) for column in zip(*rows, strict=True)]
        result[kind][f"niceness {niceness}"] = dict(zip(names, middle, strict=True))
        spread = [f"{min(column):.4f} to {max(column):.4f}" for column in zip(*rows, strict=True)]
        print(f"{kind}, niceness {niceness}: {dict(zip(names, spread, strict=True))}", flush=True)
    return result


def take_turn(run: FrozenRun, niceness: int, seconds: float) -> tuple[float, ...]:
    """The training thread's shares of a turn, and its interruptions a second."""
    process = training_process(run)
    threads = list((process / "task").iterdir())
    for thread in threads:
        os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
    busiest = max(threads, key=lambda thread: account(thread).ran_s)
    before, started = account(busiest), time.monotonic()
    run.take_turn(seconds)
    after, took = account(busiest), time.monotonic() - started
    return tuple((b - a) / took for a, b in zip(before, after, strict=True))


def training_process(run: FrozenRun) -> Path:
    """Its folder in /proc."""
    folders = [Path(f"/proc/{pid}") for pid in run.processes()]
    return next(f for f in folders if b"RayTrainWorker" in (f / "cmdline").read_bytes())


def account(thread: Path) -> Account:
    """Of a folder in /proc."""
    ran_ns, waited_ns, _ = map(int, (thread / "schedstat").read_text().split())
    lines = (thread / "status").read_text().splitlines()
    interruptions = next(line for line in lines if line.startswith("nonvoluntary_ctxt_switches"))
    return Account(ran_ns / 1e9, waited_ns / 1e9, int(interruptions.split()[1]))


if __name__ == "__main__":
    main()
