"""Compute the steps of a run again that were not finite, and name the samples at fault.

    python -m jobs.replay runs/my-run/nonfinite/step_00000012

Expected: one line a step with its loss and gradient norm, then the samples whose own loss or
gradient is not finite. Needs the data set of the run; no Ray.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs by its path

import tyro

from pipeline.cli import leave, set_up_logging
from pipeline.replay import replay, replay_report

logger = logging.getLogger("jobs.replay")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    dump = tyro.cli(tyro.conf.Positional[Path], prog="python -m jobs.replay", description=__doc__)
    try:
        logger.info(replay_report(replay(dump)))
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
