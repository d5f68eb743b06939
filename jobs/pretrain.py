"""Pre-train an iTPN by MIM + MFM.

    python -m jobs.pretrain demo                       # 16 photographs, 2 CPU cores, < 5 minutes
    python -m jobs.pretrain pixel-base-in1k --data.path DIR --run.name my-run
    ray job submit --working-dir . -- python jobs/pretrain.py RECIPE ...

Expected of the demo: held-out masked-pixel error below 0.75 of the best trivial predictor.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/pretrain.py` works too

import models
from pipeline.cli import interrupt_on_signals, leave, parse_recipe_command, set_up_logging
from pipeline.demo_data import write_demo_photos
from pipeline.dry_run import dry_run
from pipeline.pretraining_run import run_pretraining
from pipeline.recipes import DEMO_DATA, PRETRAIN_RECIPES
from pipeline.report import final_report, first_line
from pipeline.trainer import RunFailedError

logger = logging.getLogger("jobs.pretrain")


def main() -> int:
    """Run the command line; returns the exit status."""
    config = parse_recipe_command(
        PRETRAIN_RECIPES,
        sys.argv[1:],
        prog="python -m jobs.pretrain",
        description="Pre-train an iTPN by masked image and masked feature modelling.",
    )
    set_up_logging()
    interrupt_on_signals()
    logger.info(first_line(Path(models.__file__).parent))
    try:
        if config.data.path.startswith(DEMO_DATA):
            write_demo_photos(DEMO_DATA)
        if config.run.dry_run:
            logger.info(dry_run(config))
        else:
            logger.info(final_report(config, run_pretraining(config)))
    except (ValueError, OSError, ModuleNotFoundError, RunFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the newest checkpoint is kept, the same command resumes the run")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
