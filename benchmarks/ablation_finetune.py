"""Fine-tunes every arm of an ablation with every seed in this process, and prints the table.

    python benchmarks/ablation_finetune.py detect --train nuclei/detect/train-{seed} \
        --val nuclei/detect/val --out nuclei-detect.jsonl \
        --arms scratch=scratch neck=runs/nuclei-mim "no neck=runs/nuclei-mim no-neck" \
        --seeds 0 1 2 --set optim.num_steps=150

Same recipe, budget, labelled images and order of the samples for every arm of a seed; {seed} is
replaced by it. One JSON line a run is appended to --out; runs that are there already are not
repeated, unless their settings differ. No Ray: samples and draws are those of a run on Ray with the
same config.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ablation_pretrain import parse_override
from rich.console import Console
from rich.table import Table

from pipeline.between_steps import Hooks
from pipeline.checkpoint import MODEL_FILE, Checkpointer
from pipeline.config_values import apply_overrides, config_hash
from pipeline.data import Batch, made_ahead, micro_batches, sample_stream
from pipeline.downstream.tasks import create_task
from pipeline.evaluation_data import share_of
from pipeline.finetune import finetune
from pipeline.finetune_config import FinetuneConfig, Task
from pipeline.finetune_recipes import small_classify, small_detect, small_segment
from pipeline.finetuning_run import TRAINING, VALIDATION, open_data, resolve_init
from pipeline.sources import Index

logger = logging.getLogger("ablation")
SMALL = {"classify": small_classify, "detect": small_detect, "segment": small_segment}
METRICS: dict[Task, tuple[str, ...]] = {
    "classify": ("val/top1",),
    "detect": ("val/box_ap", "val/box_ap50", "val/mask_ap", "val/mask_ap50"),
    "segment": ("val/miou",),
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args()
    torch.set_num_threads(args.threads)
    done = read_results(args.out)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for arm in args.arms:
            name, _, init = arm.partition("=")
            config = arm_config(args, init, seed)
            key = config_hash(config)
            if key not in done:
                done[key] = run(config) | {"config_hash": key}
                with args.out.open("a") as file:
                    file.write(json.dumps(done[key] | {"arm": name, "seed": seed}) + "\n")
            rows.append(done[key] | {"arm": name, "seed": seed})
            logger.info("%s seed %d: %s", name, seed, shown(args.task, done[key]["metrics"]))
    Console().print(table(args.task, rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=get_args(Task))
    parser.add_argument("--train", required=True, help="prepared set with labels; may hold {seed}")
    parser.add_argument("--val", required=True, help="the same, held out")
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON line a run")
    text = "NAME=INIT, INIT as --init of jobs/finetune, with ' no-neck' behind for the backbone"
    parser.add_argument("--arms", nargs="+", required=True, help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="itpn_nano_patch16_224")
    parser.add_argument("--threads", type=int, default=1)
    text = "dotted settings over the small recipe of the task, e.g. optim.num_steps=150"
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    return parser.parse_args()


def arm_config(args: argparse.Namespace, init: str, seed: int) -> FinetuneConfig:
    """The run of an arm with a seed."""
    path, _, option = init.partition(" ")
    if option not in ("", "no-neck"):
        raise ValueError(f"'{init}' ends in '{option}', which is not no-neck")
    changes = {
        "run.seed": seed,
        "run.log_every_steps": 25,
        "init.path": path.replace("{seed}", str(seed)),
        "init.neck": option != "no-neck",
        "model.name": args.model,
        "data.path": args.train.replace("{seed}", str(seed)),
        "data.val_path": args.val,
    } | dict(map(parse_override, args.set))
    config: FinetuneConfig = apply_overrides(SMALL[args.task](), changes)
    # Evaluated once, at the end: no step is chosen by its score on the held-out images.
    num_steps = config.optim.num_steps
    return apply_overrides(
        config, {"run.evaluate_every_steps": num_steps, "run.checkpoint_every_steps": num_steps}
    )


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by the hash of their config."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["config_hash"]: row for row in rows}


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune and evaluate; metrics, wall seconds and where the weights came from."""
    config, weights = resolve_init(config)
    train, val, classes = open_data(config)
    validation = VALIDATION(config, val)
    shares = share_of(validation, config.batch_size_per_worker)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), keep=1, facts={}, export_file=MODEL_FILE)
        outcome = finetune(
            config,
            create_task(config, classes, pretrain_size=weights.image_size),
            weights,
            num_samples=config.num_used(train.num_samples),
            batches_from=lambda step: batches_from(config, train, step),
            validation=Repeatable(lambda: made_ahead(validation, shares)),
            checkpointer=checkpointer,
            hooks=Hooks(on_metrics=log_metrics),
        )
        checkpointer.wait()
    return {
        "init": weights.source,
        "steps": outcome["steps"],
        "wall_s": round(time.perf_counter() - started, 1),
        "metrics": outcome["metrics"],
    }


def batches_from(config: FinetuneConfig, index: Index, first: int) -> Iterator[Batch]:
    """Micro-batches from a step on."""
    maker, stream = TRAINING(config, index), sample_stream(config, index)
    for step in range(first, config.num_steps(config.num_used(index.num_samples))):
        for draws in micro_batches(stream, config, step):
            yield maker.batch(draws)


def log_metrics(step: int, metrics: dict[str, float]) -> bool:
    """A line for each record; never asks for a stop."""
    losses = "  ".join(f"{k[6:]} {v:.3f}" for k, v in metrics.items() if k.startswith("train/loss"))
    logger.info("  %d  %s  img/s %.1f", step, losses, metrics["perf/images_per_s"])
    return False


class Repeatable:
    """Iterates anew over what a function makes."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.make())


def shown(task: Task, metrics: dict[str, float]) -> str:
    """The metrics of the table in one line."""
    return "  ".join(f"{key.removeprefix('val/')} {metrics[key]:.2f}" for key in METRICS[task])


def table(task: Task, rows: list[dict[str, Any]]) -> Table:
    """Mean and standard deviation over the seeds, and each seed's main figure."""
    keys = METRICS[task]
    names = [key.removeprefix("val/") for key in keys]
    result = Table("arm", *names, f"{names[0]} by seed", title=task)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row["metrics"] for row in rows if row["arm"] == arm]
        cells = []
        for key in keys:
            values = [metrics[key] for metrics in of_arm]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        result.add_row(arm, *cells, " ".join(f"{metrics[keys[0]]:.2f}" for metrics in of_arm))
    return result


if __name__ == "__main__":
    main()
