"""Embed images with a pre-trained encoder: Parquet of feature vectors of every stage and level, and
two pictures of what the encoder tells apart (_pca.png) and finds alike (_neighbours.png).

    python -m jobs.embed runs/demo --images DIR --out embeddings
    python -m jobs.embed runs/demo --images DIR --out out --num-neighbours 3 --retrieve-by pyramid4
    python -m jobs.embed encoder.safetensors --model-name itpn_base_patch16_224 --images ...
    ray job submit --working-dir . -- python jobs/embed.py /shared/runs/demo --images ...

Expected at the end: how many images were embedded, how many are bad, and where the files and
pictures are. The columns are in docs/predict.md. Speed: not yet measured.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/embed.py` works too

import tyro

from pipeline.batch_inference import InferenceFailedError
from pipeline.cli import interrupt_on_signals, leave, quieten_ray_data, set_up_logging
from pipeline.embed import EmbedConfig, embed

logger = logging.getLogger("jobs.embed")


def main() -> int:
    """Run the command line; returns the exit status."""
    set_up_logging()
    quieten_ray_data()
    interrupt_on_signals()
    try:
        config = tyro.cli(EmbedConfig, prog="python -m jobs.embed", description=__doc__)
        logger.info(embed(config).report())
    except (ValueError, OSError, InferenceFailedError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the output is unfinished, the same command begins anew")
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
