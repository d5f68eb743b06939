"""Predict images with a fine-tuned model: Parquet of predictions, and pictures of some.

    python -m jobs.predict runs/my-classes --images DIR --out predictions
    python -m jobs.predict runs/my-boxes --images s3://bucket/photos --out s3://bucket/boxes \
        --num-actors 8 --use-gpu --cpus-per-actor 4
    ray job submit --working-dir . -- python jobs/predict.py /shared/runs/my-classes --images ...

Expected at the end: how many images were predicted, how many are bad, and where the files are. The
columns are in docs/predict.md. Speed: not yet measured.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/predict.py` works too

import tyro

from pipeline.batch_inference import InferenceFailedError
from pipeline.cli import interrupt_on_signals, leave, quieten_ray_data, set_up_logging
from pipeline.predict import PredictConfig, predict

logger = logging.getLogger("jobs.predict")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    quieten_ray_data()
    interrupt_on_signals()
    try:
        config = tyro.cli(PredictConfig, prog="python -m jobs.predict", description=__doc__)
        logger.info(predict(config).report())
    except (ValueError, OSError, InferenceFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the output is unfinished, the same command begins anew")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
