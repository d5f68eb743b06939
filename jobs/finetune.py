"""Fine-tune a pre-trained iTPN for one of three tasks.

    python -m jobs.finetune classify small-classify --init runs/demo --data.path DIR/train \
        --data.val-path DIR/val --run.name my-classes
    ray job submit --working-dir . -- python jobs/finetune.py detect base-coco-1x --init RUN ...

The first line after the header is the load report: what became of every pre-trained weight.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import cast, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/finetune.py` works too

import models
from pipeline.cli import interrupt_on_signals, leave, parse_recipe_command, set_up_logging
from pipeline.dry_run import finetune_dry_run
from pipeline.finetune_config import Task
from pipeline.finetune_recipes import FINETUNE_RECIPES
from pipeline.finetuning_run import run_finetuning
from pipeline.report import final_finetune_report, first_line
from pipeline.trainer import RunFailedError

logger = logging.getLogger("jobs.finetune")
TASKS = get_args(Task)


def main() -> int:
    """Run the command line; returns the exit status."""
    if len(sys.argv) < 2 or sys.argv[1] not in TASKS:
        is_help = sys.argv[1:2] in (["-h"], ["--help"])
        usage = f"usage: python -m jobs.finetune {'|'.join(TASKS)} RECIPE --init RUN ..."
        print(f"{usage}\n\n{__doc__}", file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else 2
    task = cast(Task, sys.argv[1])
    config = parse_recipe_command(
        FINETUNE_RECIPES[task],
        sys.argv[2:],
        prog=f"python -m jobs.finetune {task}",
        description="Fine-tune a pre-trained iTPN: backbone and neck.",
    )
    set_up_logging()
    interrupt_on_signals()
    logger.info(first_line(Path(models.__file__).parent))
    try:
        if config.run.dry_run:
            logger.info(finetune_dry_run(config))
        else:
            logger.info(final_finetune_report(config, run_finetuning(config)))
    except (ValueError, OSError, ModuleNotFoundError, RunFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the newest checkpoint is kept, the same command resumes the run")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
