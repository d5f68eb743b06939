"""Export a trained model: weights, timm, ONNX, torch.export or MLflow, with a model card.

    python -m jobs.export runs/demo --to exported --format all
    python -m jobs.export runs/my-classes --to exported --format onnx --licence CC-BY-4.0
    python -m jobs.export encoder.safetensors --model-name itpn_base_patch16_224 --to exported

Expected at the end: a line for every form with what its check found, and where the folder is. A
graph is compared with the model on random images before it counts. Time: not yet measured.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/export.py` works too

import tyro

from pipeline.cli import interrupt_on_signals, leave, set_up_logging
from pipeline.export import ExportConfig, export
from pipeline.exports.exportable import ExportFailedError

logger = logging.getLogger("jobs.export")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    interrupt_on_signals()
    try:
        config = tyro.cli(ExportConfig, prog="python -m jobs.export", description=__doc__)
        logger.info(export(config).report())
    except (ValueError, OSError, ExportFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
