"""Fan fine-tuning out: many trials of one recipe, hopeless ones given up, compared in one place.

    python -m jobs.sweep classify small-classify --init runs/demo --data.path DIR/train \
        --data.val-path DIR/val --run.name lr --num-trials 8 \
        --space.optim.lr loguniform:1e-4:1e-2 --space.optim.layer-decay choice:0.65,0.8,0.95
    ray job submit --working-dir . -- python jobs/sweep.py ...

`--space.KEY` takes choice:A,B,...  grid:A,B,...  uniform:LOW:HIGH  loguniform:LOW:HIGH
int:LOW:HIGH; `--space NAME` a space of pipeline/sweeps/space_recipes.py. Everything else is a
setting of the sweep (--num-trials, --searcher, ...) or of `jobs/finetune.py`. The same command goes
on with a sweep that was cut off. Its last line is the command of the best trial.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/sweep.py` works too

import models
from pipeline.cli import interrupt_on_signals, leave, set_up_logging
from pipeline.report import first_line
from pipeline.sweep import run_sweep, sweep_dry_run
from pipeline.sweeps.command import parse_sweep_command
from pipeline.trainer import RunFailedError

logger = logging.getLogger("jobs.sweep")
USAGE = "usage: python -m jobs.sweep classify|detect|segment RECIPE --init RUN --space.KEY ..."


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        command = parse_sweep_command(sys.argv[1:], f"{USAGE}\n\n{__doc__}")
        set_up_logging()
        interrupt_on_signals()
        logger.info(first_line(Path(models.__file__).parent))
        sweep = command.base, command.sweep, command.axes
        if command.base.run.dry_run:
            logger.info(sweep_dry_run(*sweep))
        else:
            run_sweep(*sweep, recipe=command.recipe, command=command.single)
    except (ValueError, OSError, ModuleNotFoundError, RunFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; trials keep their checkpoints, the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
