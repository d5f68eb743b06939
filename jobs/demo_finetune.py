"""Fine-tune the demo's encoder for three tasks, beside random weights: `make demo-finetune`.

    python -m jobs.demo_finetune     # 2 CPU cores, under 8 minutes

Runs `demo` first where that has not been done. Expected: one table, task by task, and the same
figures in runs/demo-finetune/summary.json.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/...` works too

import models
from pipeline.cli import leave, set_up_logging
from pipeline.demo_finetune import run_demo_finetune
from pipeline.report import first_line
from pipeline.trainer import RunFailedError

logger = logging.getLogger("jobs.demo_finetune")


def main() -> int:
    """Run the demo; returns the exit status."""
    set_up_logging()
    logger.info(first_line(Path(models.__file__).parent))
    try:
        run_demo_finetune()
    except (ValueError, OSError, ModuleNotFoundError, RunFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; what is finished is kept, the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
