"""Where the time of a whole pre-training run goes: data, orchestration, start and end.

    python benchmarks/bench_pretrain.py --rounds 3

Two CPU cores, about ten minutes. Runs of the recipe `demo` with one training process of one thread
and the data plane on the other core take turns: `real` and `synthetic` by `jobs.pretrain`, `two`
on synthetic images in two such processes, `bare` the loop of `synthetic` in a process without Ray.
Images/s are those of the runs' own summaries (without the first ten steps, evaluations, pictures
and checkpoints). `short` is the demo as it is for 12 steps. Its start: from the command to the end
of the first optimiser step. Its exit: from the end of the last step to the end of the process, over
evaluation, checkpoint, picture, MLflow and the end of Ray; the evaluation, which some 1,000 crops
and not the end of the run make long, is also given alone. Checkpoints: how long training stands
still for one, as a share of the steps between two of the demo's.

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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.checkpoint import Checkpointer
from pipeline.config_values import apply_overrides
from pipeline.data import SyntheticBatches
from pipeline.pretrain import pretrain
from pipeline.recipes import demo

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("real", "synthetic", "two", "bare", "short")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=150)
    parser.add_argument("--bare", action="store_true", help="used by itself")
    args = parser.parse_args()
    if args.bare:
        print(json.dumps(run_bare(args.num_steps)))
        return
    rows: list[dict[str, Any]] = []
    for index in range(args.rounds):
        # Who comes first changes: a machine that slows down hits all.
        order = KINDS[index % 5 :] + KINDS[: index % 5]
        for kind in order:
            with tempfile.TemporaryDirectory() as folder:
                rows.append({"round": index, "kind": kind, **run(kind, args.num_steps, folder)})
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(summary(rows)))


def settings(kind: str, num_steps: int) -> dict[str, Any]:
    """What differs from the demo."""
    if kind == "short":
        return {"optim.num_steps": 12, "run.log_every_steps": 1}
    changes: dict[str, Any] = {
        "optim.num_steps": num_steps,
        "scaling.num_workers": 2 if kind == "two" else 1,
        "scaling.max_batch_size_per_worker": 8 if kind == "two" else 16,
        "data.num_cpus": 1,
        "run.evaluate_every_steps": num_steps,
        "run.picture_every_steps": num_steps,
        "run.checkpoint_every_steps": num_steps,
    }
    return changes | ({} if kind == "real" else {"data.synthetic": True})


def run(kind: str, num_steps: int, folder: str) -> dict[str, Any]:
    """One run in a process of its own; its seconds and images/s."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    if kind != "short":
        environment["OMP_NUM_THREADS"] = "1"
    if kind == "bare":
        command = [sys.executable, __file__, "--bare", "--num-steps", str(num_steps)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    command = [sys.executable, "-m", "jobs.pretrain", "demo", "--run.storage-path", folder]
    for key, value in settings(kind, num_steps).items():
        flag = key.replace("_", "-")
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    started = time.time()
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
    ended = time.time()
    records, events = (read_lines(folder, name) for name in ("metrics.jsonl", "events.jsonl"))
    of_run = json.loads((Path(folder) / "demo" / "summary.json").read_text())
    stall_s = [event["stall_s"] for event in events if event["event"] == "checkpoint"]
    between_s = (
        demo().run.checkpoint_every_steps * demo().data.global_batch_size / of_run["images_per_s"]
    )
    # Known to a step where every step is logged, that is in `short`.
    last_step_end = records[-2]["time"] + records[-1]["perf/step_s"]
    return {
        "images_per_s": of_run["images_per_s"],
        "data_wait_frac": of_run["data_wait_frac"],
        "first_step_s": round(records[0]["time"] - started, 2),
        "exit_s": round(ended - last_step_end, 2),
        "last_evaluation_s": round(records[-1]["time"] - last_step_end, 2),
        "checkpoint_frac": round(statistics.median(stall_s) / between_s, 5),
        "command_s": round(ended - started, 2),
    }


def read_lines(folder: str, name: str) -> list[dict[str, Any]]:
    """A file of JSON lines that the run left."""
    return [json.loads(line) for line in (Path(folder) / "demo" / name).read_text().splitlines()]


def run_bare(num_steps: int) -> dict[str, Any]:
    """The loop alone, on synthetic images."""
    config = apply_overrides(demo(), settings("synthetic", num_steps))
    synthetic = SyntheticBatches(config)
    with tempfile.TemporaryDirectory() as folder:
        outcome = pretrain(
            config,
            num_samples=config.data.global_batch_size,
            batches_from=lambda step: synthetic,
            evaluation_batch=synthetic.batch,
            checkpointer=Checkpointer(folder, keep=1, facts={}),
        )
    return {"images_per_s": outcome["images_per_s"]}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians; ratios are taken within a round."""

    def of(kind: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["kind"] == kind]

    def ratio(kind: str, reference: str) -> float:
        pairs = zip(of(kind, "images_per_s"), of(reference, "images_per_s"), strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "real_vs_synthetic": ratio("real", "synthetic"),
        "ray_vs_bare": ratio("synthetic", "bare"),
        "two_vs_one": ratio("two", "synthetic"),
        "first_step_s": statistics.median(of("short", "first_step_s")),
        "exit_s": statistics.median(of("short", "exit_s")),
        "last_evaluation_s": statistics.median(of("short", "last_evaluation_s")),
        "checkpoint_frac": statistics.median(of("synthetic", "checkpoint_frac")),
        "images_per_s": {kind: statistics.median(of(kind, "images_per_s")) for kind in KINDS[:4]},
    }


if __name__ == "__main__":
    main()
