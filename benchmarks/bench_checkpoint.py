"""What a checkpoint costs training, with the demo's model: steps around one against steps without.

    python benchmarks/bench_checkpoint.py --rounds 6

Two CPU cores, about four minutes: one run of the real loop on synthetic images with a checkpoint
every `2 * --window` steps. A round compares the window of steps in which a checkpoint is taken and
written with the window after it, which has none. Expected: the last line, JSON, with
`overhead_frac`, the share of step time at the demo's interval, below 0.02.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pipeline.between_steps import Hooks
from pipeline.checkpoint import Checkpointer, Saved
from pipeline.config_values import apply_overrides
from pipeline.data import Batch, SyntheticBatches
from pipeline.pretrain import pretrain
from pipeline.recipes import demo


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--window", type=int, default=25, help="steps; must outlast the writing")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(json.dumps(measure(args.rounds, args.window)))


def measure(rounds: int, window: int) -> dict[str, Any]:
    """Medians over the rounds."""
    marks, saves = _run(num_steps=2 * window * (rounds + 1) + 1, checkpoint_every=2 * window)
    extra_s, step_s = [], []
    for number in range(1, rounds + 1):
        first = 2 * window * number - 1  # the checkpoint follows this step
        with_s = marks[first + window] - marks[first]
        without_s = marks[first + 2 * window] - marks[first + window]
        extra_s.append(with_s - without_s)
        step_s.append(without_s / window)
    interval = demo().run.checkpoint_every_steps
    interval_s = interval * statistics.median(step_s)
    assert max(saved.save_s for saved in saves) < window * min(step_s), "raise --window"
    return {
        "overhead_frac": round(statistics.median(extra_s) / interval_s, 5),
        "spread": [round(extra / interval_s, 5) for extra in sorted(extra_s)],
        "checkpoint_every_steps": interval,
        "step_s": round(statistics.median(step_s), 4),
        "checkpoint_adds_s": round(statistics.median(extra_s), 4),
        "stall_s": round(statistics.median(saved.stall_s for saved in saves), 4),
        "save_s": round(statistics.median(saved.save_s for saved in saves), 4),
        "mib": round(saves[0].num_bytes / 2**20, 1),
    }


def _run(num_steps: int, checkpoint_every: int) -> tuple[list[float], list[Saved]]:
    """When each step began, and how its checkpoints went."""
    config = apply_overrides(
        demo(),
        {
            "optim.num_steps": num_steps,
            "scaling.num_workers": 1,
            "data.synthetic": True,
            "run.checkpoint_every_steps": checkpoint_every,
            "run.evaluate_every_steps": num_steps + 1,
            "run.picture_every_steps": num_steps + 1,
        },
    )
    marks: list[float] = []
    saves: list[Saved] = []
    batch = SyntheticBatches(config).batch

    def batches(start: int) -> Iterator[Batch]:
        while True:
            marks.append(time.perf_counter())
            yield batch

    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        checkpointer = Checkpointer(folder, keep=2, facts={})

        def on_metrics(step: int, metrics: dict[str, float]) -> bool:
            saves.extend(checkpointer.finished())
            return False

        pretrain(
            config,
            num_samples=1000,
            batches_from=batches,
            evaluation_batch={key: values[:2] for key, values in batch.items()},
            checkpointer=checkpointer,
            hooks=Hooks(on_metrics=on_metrics),
        )
    return marks, saves


if __name__ == "__main__":
    main()
