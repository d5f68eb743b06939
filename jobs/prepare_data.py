"""Turn any image source into Parquet shards of encoded images with a manifest.

    python -m jobs.prepare_data --source DIR --out OUT --val-fraction 0.05
    python -m jobs.prepare_data --source instances_val2017.json --images val2017 --out OUT \\
        --split-name val
    ray job submit --working-dir . -- python jobs/prepare_data.py --source s3://... --out s3://...

CPU only. Killed and repeated, the same command goes on where it stopped. Expected at the end: the
counts of each split, and the command that trains on it. Speed: not yet measured.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs by its path

import tyro

from pipeline.cli import interrupt_on_signals, leave, quieten_ray_data, set_up_logging
from pipeline.prepare.job import PreparationFailedError, prepare
from pipeline.prepare.report import prepare_report
from pipeline.prepare.settings import PrepareConfig

logger = logging.getLogger("jobs.prepare_data")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    quieten_ray_data()
    interrupt_on_signals()
    try:
        config = tyro.cli(PrepareConfig, prog="python -m jobs.prepare_data", description=__doc__)
        logger.info(prepare_report(config, prepare(config)))
    except (ValueError, FileNotFoundError, PreparationFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; finished shards are kept, the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
