"""Score a fine-tuned run on a validation set, or probe a pre-trained one (kNN, linear).

python -m jobs.evaluate runs/my-classes --data DIR/val --out scores/
python -m jobs.evaluate runs/demo --train-data DIR/train --data DIR/val
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/evaluate.py` works too

import tyro

from pipeline.cli import leave, set_up_logging
from pipeline.evaluation_run import EvaluateConfig, evaluate_run

logger = logging.getLogger("jobs.evaluate")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    try:
        config = tyro.cli(EvaluateConfig, prog="python -m jobs.evaluate", description=__doc__)
        for key, value in evaluate_run(config).items():
            logger.info("%-20s %10.3f", key.removeprefix("val/"), value)
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
