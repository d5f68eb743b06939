"""Where the time of a whole pre-training run goes: data, orchestration, start and end.

    python benchmarks/bench_pretrain.py

Two CPU cores, a quarter of an hour. Four runs of the recipe `demo` take turns of a few seconds, and
are frozen in between (`frozen_turns.py`). A training process has one thread, all else the other
core: `real` and `synthetic` by `jobs.pretrain`, `two` on synthetic images in two such processes,
`bare` the loop of `synthetic` in a process without Ray. Ratios are those of neighbouring turns.

Before them, `short` is the demo as it is for 12 steps, three times. Its start: from the command to
the end of the first optimiser step. Its exit: from the end of the last step to the end of the
process, over evaluation, checkpoint, picture, MLflow and the end of Ray; the evaluation, which some
1,000 crops and not the end of the run make long, is also given alone. Checkpoints: how long
training stands still for one, as a share of the steps between two of the demo's.

The last line is JSON, medians: {real_vs_synthetic, ray_vs_bare, two_vs_one, first_step_s, exit_s,
last_evaluation_s, checkpoint_frac, images_per_s}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frozen_turns import FrozenRun, Turn

from pipeline.between_steps import Hooks
from pipeline.checkpoint import Checkpointer
from pipeline.config_values import apply_overrides
from pipeline.data import SyntheticBatches
from pipeline.onednn_products import use_onednn
from pipeline.pretrain import pretrain
from pipeline.process_memory import keep_freed_memory
from pipeline.recipes import demo

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("real", "synthetic", "bare", "two")
ENDLESS = 10**6
"""Steps: the runs that take turns are ended from outside."""
RATIOS = {
    "real_vs_synthetic": ("real", "synthetic"),
    "ray_vs_bare": ("synthetic", "bare"),
    "two_vs_one": ("two", "synthetic"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each run")
    parser.add_argument("--turn-seconds", type=float, default=7.0)
    parser.add_argument("--short-runs", type=int, default=3, help="0 leaves out the seconds")
    parser.add_argument("--warmup-seconds", type=float, default=15.0)
    parser.add_argument("--bare", type=Path, metavar="FILE", help="used by itself")
    args = parser.parse_args()
    if args.bare:
        run_bare(args.bare)
        return
    short = []
    for _ in range(args.short_runs):
        with tempfile.TemporaryDirectory() as folder:
            short.append(run_short(folder))
        print(json.dumps(short[-1]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        turns = take_turns(args, Path(folder))
    print(json.dumps(summary(short, turns)))


def settings(kind: str) -> dict[str, Any]:
    """What differs from the demo."""
    if kind == "short":
        return {"optim.num_steps": 12, "run.log_every_steps": 1}
    changes: dict[str, Any] = {
        "optim.num_steps": ENDLESS,
        "scaling.num_workers": 2 if kind == "two" else 1,
        "scaling.max_batch_size_per_worker": 8 if kind == "two" else 16,
        "data.num_cpus": 1,
        "run.evaluate_every_steps": ENDLESS,
        "run.picture_every_steps": ENDLESS,
        "run.checkpoint_every_steps": ENDLESS,
    }
    return changes | ({} if kind == "real" else {"data.synthetic": True})


def pretrain_command(kind: str, folder: str) -> list[str]:
    """The job as a user starts it."""
    command = [sys.executable, "-m", "jobs.pretrain", "demo", "--run.storage-path", folder]
    for key, value in settings(kind).items():
        flag = key.replace("_", "-")
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return command


def run_short(folder: str) -> dict[str, Any]:
    """Start and end of a run."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    started = time.time()
    command = pretrain_command("short", folder)
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
    ended = time.time()
    records, events = (read_lines(folder, name) for name in ("metrics.jsonl", "events.jsonl"))
    # Known to a step where every step is logged.
    last_step_end = records[-2]["time"] + records[-1]["perf/step_s"]
    stall_s = [event["stall_s"] for event in events if event["event"] == "checkpoint"]
    return {
        "first_step_s": round(records[0]["time"] - started, 2),
        "exit_s": round(ended - last_step_end, 2),
        "last_evaluation_s": round(records[-1]["time"] - last_step_end, 2),
        "checkpoint_stall_s": statistics.median(stall_s),
        "command_s": round(ended - started, 2),
    }


def read_lines(folder: str, name: str) -> list[dict[str, Any]]:
    """A file of JSON lines that the run left."""
    return [json.loads(line) for line in (Path(folder) / "demo" / name).read_text().splitlines()]


def take_turns(args: argparse.Namespace, folder: Path) -> dict[str, list[Turn]]:
    """Start the runs and let each go on for some seconds, again and again."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    runs: list[FrozenRun] = []
    turns: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    try:
        for kind in KINDS:
            records = folder / kind / "demo" / "metrics.jsonl"
            command = pretrain_command(kind, str(folder / kind))
            if kind == "bare":
                command = [sys.executable, __file__, "--bare", str(records)]
            runs.append(FrozenRun(kind, command, environment, records))
            runs[-1].warm_up(args.warmup_seconds)
        for index in range(args.rounds):
            # There and back again: a machine that slows down hits all.
            for run in runs if index % 2 else runs[::-1]:
                turns[run.kind].append(run.take_turn(args.turn_seconds))
            last = {kind: round(images_per_s(rows[-1]), 1) for kind, rows in turns.items()}
            print(f"turn {index + 1} of {args.rounds}, images/s: {last}", flush=True)
    finally:
        for run in runs:
            run.end()
    return turns


def images_per_s(turn: Turn) -> float:
    return turn.steps * demo().data.global_batch_size / turn.seconds


def run_bare(records: Path) -> None:
    """The loop alone, on synthetic images, in the kind of process that Ray Train would make."""
    keep_freed_memory()
    use_onednn()
    records.parent.mkdir(parents=True)
    config = apply_overrides(demo(), settings("bare"))
    synthetic = SyntheticBatches(config)
    with records.open("w") as file, tempfile.TemporaryDirectory() as folder:
        pretrain(
            config,
            num_samples=config.data.global_batch_size,
            batches_from=lambda step: synthetic,
            evaluation_batch=synthetic.batch,
            checkpointer=Checkpointer(folder, keep=1, facts={}),
            hooks=Hooks(on_metrics=recorder(file)),
        )


def recorder(file: Any) -> Callable[[int, dict[str, float]], bool]:
    """Writes what the turns are counted by."""

    def record(step: int, metrics: dict[str, float]) -> bool:
        file.write(json.dumps({"step": step, "time": time.time()}) + "\n")
        file.flush()
        return False

    return record


def summary(short: list[dict[str, Any]], turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians; ratios are those of one round, and printed with their quartiles."""
    rates = {kind: [images_per_s(turn) for turn in rows] for kind, rows in turns.items()}
    result: dict[str, Any] = {}
    for name, (kind, reference) in RATIOS.items():
        ratios = [a / b for a, b in zip(rates[kind], rates[reference], strict=True)]
        result[name] = round(statistics.median(ratios), 3)
        if len(ratios) > 1:
            low, _, high = statistics.quantiles(ratios, n=4)
            print(f"{name}: {result[name]}, half of the rounds from {low:.3f} to {high:.3f}")
    middle = {kind: statistics.median(values) for kind, values in rates.items()}
    if short:
        for key in ("first_step_s", "exit_s", "last_evaluation_s"):
            values = [row[key] for row in short]
            result[key] = statistics.median(values)
            print(f"{key}: {result[key]}, {min(values)} to {max(values)}")
        between = demo().run.checkpoint_every_steps * demo().data.global_batch_size
        stall_s = statistics.median(row["checkpoint_stall_s"] for row in short)
        result["checkpoint_frac"] = round(stall_s * middle["synthetic"] / between, 5)
    result["images_per_s"] = {kind: round(value, 1) for kind, value in middle.items()}
    return result


if __name__ == "__main__":
    main()
