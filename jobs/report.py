"""Write the one-page HTML report of runs again: report.html in each run's folder.

    python -m jobs.report runs/demo
    python -m jobs.report runs/my-run runs/my-classes

Expected: a line with the path of the page for every run. Every run writes its own at its end; this
is for runs at work, runs that broke, and runs from before there was one. Needs no Ray.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/report.py` works too

import tyro

from pipeline.cli import leave, set_up_logging
from pipeline.html_report.page import write_report

logger = logging.getLogger("jobs.report")


def main() -> int:
    """Run the command line; returns the exit status: 1 if a page could not be written."""
    set_up_logging()
    runs = tyro.cli(
        tyro.conf.Positional[tuple[Path, ...]], prog="python -m jobs.report", description=__doc__
    )
    status = 0 if runs else 1
    if not runs:
        logger.error("error: no run is named; give one or more folders: runs/NAME ...")
    for run in runs:
        try:
            logger.info("%s", write_report(run))
        except OSError as error:
            logger.error("error: %s", error)
            status = 1
    return status


if __name__ == "__main__":
    leave(main())
