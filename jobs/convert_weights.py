"""Turn published weights into a folder that --init takes; says what is in the file.

    python -m jobs.convert_weights itpn_base_pixel.pth --to weights/itpn-base
    python -m jobs.finetune segment own --init weights/itpn-base ...
    python -m jobs.pretrain pixel-base-in1k --init weights/itpn-base ...

Reads official iTPN, HiViT and Fast-iTPN files, those of mmdetection and mmsegmentation, and ours.
Expected at the end: the layout, the dimensions, a table of what became of every key, and the
folder. Takes seconds.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` works too

import tyro

from pipeline.cli import leave, set_up_logging
from pipeline.weight_conversion import ConversionConfig, convert_weights

logger = logging.getLogger("jobs.convert_weights")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    try:
        config = tyro.cli(
            ConversionConfig, prog="python -m jobs.convert_weights", description=__doc__
        )
        logger.info(convert_weights(config).text())
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
