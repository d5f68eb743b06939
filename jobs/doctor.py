"""Look at every node of a Ray cluster before a run does; prints what to fix.

python -m jobs.doctor
ray job submit --working-dir . -- python jobs/doctor.py --storage-path /mnt/runs --use-gpu

Without a cluster it looks at this machine. Takes about ten seconds, more where MLflow is looked at;
exit status 1 if anything would end or spoil a run.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/doctor.py` works too

import tyro

from pipeline.cli import leave, set_up_logging
from pipeline.doctor import DoctorConfig, examine
from pipeline.doctor_findings import STATUSES, overall, table
from pipeline.report import print_table

logger = logging.getLogger("jobs.doctor")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    try:
        config = tyro.cli(DoctorConfig, prog="python -m jobs.doctor", description=__doc__)
        findings = examine(config)
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    print_table(table(findings))
    counts = {status: sum(f.status == status for f in findings) for status in STATUSES}
    logger.info(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if overall(findings) == "fail" else 0


if __name__ == "__main__":
    leave(main())
