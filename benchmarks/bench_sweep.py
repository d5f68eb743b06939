"""What do two trials at a time gain over the same two runs one after the other?

    python benchmarks/bench_sweep.py --init runs/demo --data runs/demo-data/digits --num-steps 200

Each round runs both ways in this process, on one private cluster with as many CPUs as the machine,
in changing order; the ratio of a round compares within it. Training alone is compared, too: from a
run's first log line to its last.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import interrupt_on_signals
from pipeline.cluster import joined_cluster
from pipeline.config_values import apply_overrides
from pipeline.finetune_config import FinetuneConfig
from pipeline.finetune_recipes import small_classify
from pipeline.finetuning_run import run_finetuning
from pipeline.metrics_file import read_records
from pipeline.sweep import run_sweep
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.space import parse_space

SPACE = parse_space({"run.seed": "grid:0,1"})


def main() -> None:
    args = parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    interrupt_on_signals()
    rounds: list[dict[str, float]] = []
    with joined_cluster(args.cpus):
        one_after_the_other(args, warm_up=True)
        for number in range(args.rounds):
            ways = {"sweep": at_a_time, "alone": one_after_the_other}
            names = list(ways) if number % 2 else list(reversed(ways))
            found = {name: ways[name](args) for name in names}
            rounds.append(
                {
                    "whole": found["alone"][0] / found["sweep"][0],
                    "training": found["alone"][1] / found["sweep"][1],
                    "sweep_s": found["sweep"][0],
                    "alone_s": found["alone"][0],
                }
            )
            print(json.dumps(rounds[-1]))
    for key in ("whole", "training"):
        ratios = [entry[key] for entry in rounds]
        print(
            f"throughput of two trials at a time / one after the other, {key}: "
            f"{statistics.median(ratios):.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True, help="pre-trained run, or scratch")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and val")
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2, help="of the private cluster")
    parser.add_argument("--alone-cpus", type=float, default=1.0, help="CPUs of a run on its own")
    parser.add_argument("--data-cpus", type=int, default=0, help="data.num_cpus of every run")
    return parser.parse_args()


def config(args: argparse.Namespace, folder: Path, **changes: Any) -> FinetuneConfig:
    return apply_overrides(
        small_classify(),
        {
            "init.path": args.init,
            "data.path": str(args.data / "train"),
            "data.val_path": str(args.data / "val"),
            "data.num_cpus": args.data_cpus,
            "optim.num_steps": args.num_steps,
            "run.storage_path": str(folder),
            "run.log_every_steps": 5,
            "tracking.system_metrics": False,
            **changes,
        },
    )


def at_a_time(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a sweep of two trials, and of their training."""
    folder = Path(tempfile.mkdtemp())
    base = config(args, folder, **{"run.name": "sweep"})
    sweep = SweepConfig(searcher="grid", num_trials=2, scheduler="none", grace=0.99, register=False)
    start = time.perf_counter()
    run_sweep(base, sweep, SPACE, recipe=base, command="")
    seconds = time.perf_counter() - start
    spans = [span(folder / "sweep" / f"trial_000{n}") for n in range(2)]
    shutil.rmtree(folder)
    return seconds, max(end for _, end in spans) - min(begin for begin, _ in spans)


def one_after_the_other(args: argparse.Namespace, warm_up: bool = False) -> tuple[float, float]:
    """The same of two runs."""
    folder = Path(tempfile.mkdtemp())
    start, training = time.perf_counter(), 0.0
    for seed in range(1 if warm_up else 2):
        changes = {"run.name": f"run{seed}", "run.seed": seed}
        changes |= {"run.evaluate_every_steps": 10**6, "scaling.cpus_per_worker": args.alone_cpus}
        run_finetuning(config(args, folder, **changes))
        begin, end = span(folder / f"run{seed}")
        training += end - begin
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds, training


def span(folder: Path) -> tuple[float, float]:
    """When a run logged first and last."""
    times = [record["time"] for record in read_records(folder / "metrics.jsonl")]
    return times[0], times[-1]


if __name__ == "__main__":
    main()
