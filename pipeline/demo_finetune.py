"""`make demo-finetune`: the demo's encoder on three tasks, beside random weights.

Six short runs on one private cluster: each task from scratch and from the pre-trained backbone and
neck, with the same recipe, budget and seed. Surprising: nothing here is tuned for the pre-trained
side; the figures are one seed of a tiny model and say little more than that everything works.
`docs/experiments.md` has the measured comparison.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.cluster import joined_cluster, needed_cpus
from pipeline.config_values import apply_overrides
from pipeline.demo_data import write_demo_photos
from pipeline.demo_labels import DemoTask, prepare_demo_labels
from pipeline.finetune_config import SCRATCH, FinetuneConfig, Task
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


def demo_runs(storage_path: str = "runs") -> dict[Task, FinetuneConfig]:
    """The run of each task, from scratch; the other arm differs in `--init` alone."""
    recipes = {"classify": small_classify(), "detect": small_detect(), "segment": small_segment()}
    steps = {"classify": 160, "detect": 60, "segment": 60}
    runs: dict[Task, FinetuneConfig] = {}
    for task, data_set in _DATA_SETS.items():
        folder = f"{DEMO_DATA}/{data_set}"
        runs[task] = apply_overrides(
            recipes[task],
            {
                "run.name": f"demo-{task}-{SCRATCH}",
                "run.storage_path": storage_path,
                "run.checkpoint_every_steps": steps[task],
                "run.evaluate_every_steps": steps[task],
                "run.picture_every_steps": steps[task],
                "init.path": SCRATCH,
                "model.name": demo().model.name,
                "data.path": f"{folder}/train",
                "data.val_path": f"{folder}/val",
                "optim.num_steps": steps[task],
                # One process on both cores of the machine the demo is for.
                "scaling.cpus_per_worker": 2.0,
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
    cpus = max(needed_cpus(c, c.scaling.max_workers) for c in (pretraining, *runs.values()))
    figures: dict[Task, dict[str, Any]] = {}
    with joined_cluster(math.ceil(cpus)):
        if not encoder.is_finished:
            run_pretraining(pretraining)
        for task, config in runs.items():
            figures[task] = {}
            for arm in ARMS:
                changes = {"run.name": f"demo-{task}-{arm}"}
                if arm == "pretrained":
                    changes["init.path"] = str(encoder.path)
                summary = _summary(apply_overrides(config, changes))
                figures[task] |= {"metric": summary["metric"], arm: summary["value"]}
    folder = Path(storage_path) / "demo-finetune"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(json.dumps(figures, indent=1))
    Console().print(figures_table(figures))
    logger.info("written to %s", folder / SUMMARY_FILE)
    return figures


def _summary(config: FinetuneConfig) -> dict[str, Any]:
    folder = RunFolder(config)
    if not folder.is_finished:
        return run_finetuning(config)
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
