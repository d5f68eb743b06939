"""`make demo-finetune`: the demo's encoder on three tasks, beside random weights.

Six short runs on one private cluster: each task from scratch and, at the same time, from the
pre-trained backbone and neck, with the same recipe, budget and seed. Surprising: the figures are
one seed of a tiny model after a minute, and say little more than that everything works.
`docs/experiments.md` has the measured comparison.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.cluster import joined_cluster, needed_cpus
from pipeline.config import SCRATCH
from pipeline.config_values import apply_overrides
from pipeline.demo_data import write_demo_photos
from pipeline.demo_labels import DemoTask, prepare_demo_labels
from pipeline.finetune_config import FinetuneConfig, Task
from pipeline.finetune_recipes import small_classify, small_detect, small_segment
from pipeline.finetuning_run import run_finetuning
from pipeline.pretraining_run import run_pretraining
from pipeline.recipes import DEMO_DATA, demo
from pipeline.run_folder import RunFolder

logger = logging.getLogger(__name__)
ARMS = ("scratch", "pretrained")
SUMMARY_FILE = "summary.json"
_DATA_SETS: dict[Task, DemoTask] = {
    "classify": "digits",
    "detect": "scenes-detect",
    "segment": "scenes-segment",
}


_CHANGES: dict[Task, dict[str, Any]] = {
    "classify": {"optim.num_steps": 120},
    "detect": {
        "optim.num_steps": 64,
        "detector.min_sizes": (112, 128, 144),
        "detector.eval_min_size": 128,
    },
    "segment": {
        "optim.num_steps": 80,
        "optim.lr": 3e-3,
        "data.image_size": 96,
        # Enlarged, a stroke of a digit is wider than the finest cell of the pyramid, 4 pixels.
        "segmenter.scale_range": (1.5, 2.5),
        "segmenter.eval_short_side": 320,
        "segmenter.channels": 32,
    },
}


def demo_runs(storage_path: str = "runs") -> dict[Task, FinetuneConfig]:
    """The run of each task, from scratch; the other arm differs in `--init` alone."""
    recipes = {"classify": small_classify(), "detect": small_detect(), "segment": small_segment()}
    runs: dict[Task, FinetuneConfig] = {}
    for task, data_set in _DATA_SETS.items():
        folder = f"{DEMO_DATA}/{data_set}"
        num_steps = _CHANGES[task]["optim.num_steps"]
        runs[task] = apply_overrides(
            recipes[task],
            {
                "run.name": f"demo-{task}-{SCRATCH}",
                "run.storage_path": storage_path,
                "run.checkpoint_every_steps": num_steps,
                "run.evaluate_every_steps": num_steps,
                "run.picture_every_steps": num_steps,
                "init.path": SCRATCH,
                "model.name": demo().model.name,
                "data.path": f"{folder}/train",
                "data.val_path": f"{folder}/val",
                # Two runs side by side on two cores: starting takes longer than learning here.
                "scaling.cpus_per_worker": 1.0,
                "data.num_cpus": 0,
                **_CHANGES[task],
            },
        )
    return runs


def run_demo_finetune(storage_path: str = "runs") -> dict[Task, dict[str, Any]]:
    """Pre-train where that has not been done, fine-tune all, print the table; returns its figures.

    What is finished is not repeated. Writes <storage_path>/demo-finetune/summary.json:
    {task: {metric, scratch, pretrained}}.

    Raises:
        ValueError: a run folder holds a run of another configuration.
        RunFailedError: one of the runs failed.
    """
    write_demo_photos(DEMO_DATA)
    prepare_demo_labels(DEMO_DATA)
    pretraining = apply_overrides(demo(), {"run.storage_path": storage_path})
    encoder = RunFolder(pretraining)
    runs = demo_runs(storage_path)
    side_by_side = [needed_cpus(c, 1) * len(ARMS) for c in runs.values()]
    cpus = max(needed_cpus(pretraining, pretraining.scaling.max_workers), *side_by_side)
    figures: dict[Task, dict[str, Any]] = {}
    with joined_cluster(math.ceil(cpus)):
        if not encoder.is_finished:
            run_pretraining(pretraining)
        for task, config in runs.items():
            scratch, pretrained = _both_arms(config, encoder)
            figures[task] = {
                "metric": scratch["metric"],
                "scratch": scratch["value"],
                "pretrained": pretrained["value"],
            }
    folder = Path(storage_path) / "demo-finetune"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(json.dumps(figures, indent=1))
    Console().print(figures_table(figures))
    logger.info("written to %s", folder / SUMMARY_FILE)
    return figures


def _both_arms(config: FinetuneConfig, encoder: RunFolder) -> list[dict[str, Any]]:
    """Summaries of a task's runs in the order of ARMS; the runs are done side by side."""
    inits = {"scratch": SCRATCH, "pretrained": str(encoder.path)}
    configs = [
        apply_overrides(config, {"run.name": f"demo-{config.task}-{arm}", "init.path": inits[arm]})
        for arm in ARMS
    ]
    stop = threading.Event()
    with ThreadPoolExecutor(len(ARMS)) as pool:
        futures = [pool.submit(_summary, config, stop) for config in configs]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises what was raised first
        except BaseException:
            stop.set()  # the other one saves and ends; the same command goes on with it
            raise
    return [future.result() for future in futures]


def _summary(config: FinetuneConfig, stop: threading.Event) -> dict[str, Any]:
    folder = RunFolder(config)
    if not folder.is_finished:
        return run_finetuning(config, stop=stop)
    folder.check_config()  # figures side by side must be of the same recipe
    summary: dict[str, Any] = json.loads(folder.summary_file.read_text())
    logger.info("run '%s' is finished", config.run.name)
    return summary


def figures_table(figures: dict[Task, dict[str, Any]]) -> Table:
    """Task, metric, scratch against pre-trained."""
    table = Table("task", "metric", "scratch", "pre-trained", title="same recipe, same steps")
    for task, row in figures.items():
        metric = str(row["metric"]).removeprefix("val/")
        table.add_row(task, metric, *(f"{row[arm]:.2f}" for arm in ARMS))
    return table
