"""Put runs side by side: status, metrics, and the settings in which they differ.

python -m jobs.compare runs/scratch runs/pretrained
python -m jobs.compare runs/my-sweep --metrics val/top1 val/top5 --out compared.csv
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/compare.py` works too

import tyro

from pipeline.cli import leave, set_up_logging
from pipeline.compare import CompareConfig, compare_runs
from pipeline.report import print_table

logger = logging.getLogger("jobs.compare")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    try:
        config = tyro.cli(CompareConfig, prog="python -m jobs.compare", description=__doc__)
        print_table(compare_runs(config))
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
