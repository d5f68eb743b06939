"""Pre-trains one arm of the ablation in this process: no Ray, images decoded once.

    python benchmarks/ablation_pretrain.py --images digits/unlabelled --val-images digits/val \
        --out ablation/digits/mim --set objective.mfm_weight=0

Writes what a run folder has: encoder.safetensors, config.json, metrics.jsonl, summary.json, and the
last reconstruction picture. Samples, crops and masks are those of a run on Ray with the same
config. The same command goes on after a kill. The last line printed is JSON with the held-out
ratios; a ratio above 0.7 means that little more than the mean image was learnt.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from pipeline.between_steps import Hooks
from pipeline.checkpoint import Checkpointer
from pipeline.config import OptimConfig, RunConfig
from pipeline.config_values import apply_overrides, config_hash
from pipeline.data import Batch, SampleFactory, micro_batches, sample_stream
from pipeline.decoding import decode_image
from pipeline.metrics_file import MetricsFile
from pipeline.objectives import objective_of
from pipeline.pretrain import pretrain
from pipeline.pretrain_config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainConfig,
    PretrainScalingConfig,
)
from pipeline.pretrain_weights import read_pretrain_weights
from pipeline.reading import Sample, SampleReader
from pipeline.run_folder import RunFolder
from pipeline.sources import Index, build_index

logger = logging.getLogger("ablation")
MAX_DECODED_BYTES = 4 * 2**30


class DecodedReader(SampleReader):
    """Reads samples that were decoded before: as uncompressed PPM, which opens in no time."""

    def __init__(self, index: Index, image_column: str = "image") -> None:
        super().__init__(index, image_column)
        self._samples: dict[int, Sample] = {}
        self._num_bytes = 0

    def read(self, row: int) -> Sample:
        """Like `SampleReader.read`, from memory the second time."""
        if row in self._samples:
            return self._samples[row]
        sample = super().read(row)
        pixels = np.asarray(decode_image(sample.encoded))  # (H, W, 3) uint8
        header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
        sample = sample._replace(encoded=header + pixels.tobytes())
        self._num_bytes += len(sample.encoded)
        if self._num_bytes < MAX_DECODED_BYTES:
            self._samples[row] = sample
        return sample


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    summary = run(build_config(args))
    print(json.dumps(summary))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of images or prepared data set")
    parser.add_argument("--val-images", required=True, help="the same, held out")
    parser.add_argument("--out", type=Path, required=True, help="run folder to write")
    parser.add_argument("--model", default="itpn_nano_patch16_224")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    text = "dotted settings, e.g. objective.mfm_weight=0 'data.crop_scale=[0.5,1]'"
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    return parser.parse_args()


def build_config(args: argparse.Namespace) -> PretrainConfig:
    """The config of the arm: defaults for small images, then the command line."""
    config = PretrainConfig(
        run=RunConfig(
            name=args.out.name,
            storage_path=str(args.out.parent),
            seed=args.seed,
            log_every_steps=50,
            evaluate_every_steps=500,
            checkpoint_every_steps=500,
            picture_every_steps=args.num_steps,
            keep_checkpoints=1,
        ),
        data=DataConfig(
            path=args.images,
            val_path=args.val_images,
            image_size=args.image_size,
            global_batch_size=args.batch_size,
            crop_scale=(0.5, 1.0),
            flip_prob=0.0,
            num_eval_crops=512,
        ),
        model=ModelConfig(name=args.model),
        objective=ObjectiveConfig(mask_ratio=0.6, norm_pix_loss=False, teacher_momentum=0.99),
        optim=OptimConfig(lr=2e-3, num_steps=args.num_steps, warmup_ratio=0.05, clip_grad_norm=1.0),
        scaling=PretrainScalingConfig(max_batch_size_per_worker=args.batch_size),
    )
    return apply_overrides(config, dict(map(parse_override, args.set)))


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` -> key and value, read as JSON where it is JSON.

    Raises:
        ValueError: there is no "=" in it.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"'{text}' is no KEY=VALUE; write e.g. objective.mfm_weight=0")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def run(config: PretrainConfig) -> dict[str, Any]:
    """Pre-train; returns what summary.json holds.

    Raises:
        ValueError: the folder holds a finished run, or one of another config.
    """
    folder = RunFolder(config)
    folder.check()
    folder.open()
    index = build_index(config.data.path)
    factory = SampleFactory(config, DecodedReader(index))
    val_index = build_index(config.data.val_path, "data.val_path")
    held_out = SampleFactory.build(config, val_index).evaluation_batch()
    facts = {
        "model": config.model.name,
        "image_size": str(config.data.image_size),
        "run": config.run.name,
        "config_hash": config_hash(config),
    }
    checkpointer = Checkpointer(folder.checkpoints, keep=config.run.keep_checkpoints, facts=facts)
    reporter = Reporter(config, folder.path, index.num_samples)
    started = time.perf_counter()
    outcome = pretrain(
        config,
        num_samples=index.num_samples,
        batches_from=lambda step: batches_from(factory, step),
        evaluation_batch=held_out,
        weights=read_pretrain_weights(config),
        checkpointer=checkpointer,
        hooks=Hooks(
            on_start=reporter.on_start,
            on_metrics=reporter.on_metrics,
            on_picture=lambda step, kind, png: (folder.path / "reconstruction.png").write_bytes(
                png
            ),
        ),
    )
    newest = checkpointer.latest()
    assert newest is not None, "the last step writes a checkpoint"
    metrics = outcome["metrics"]
    summary = {
        "run": config.run.name,
        "steps": outcome["steps"],
        "wall_s": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        **objective_of(config).headline(metrics),
        "metrics": metrics,
    }
    folder.finish(summary, newest)
    return summary


def batches_from(factory: SampleFactory, step: int) -> Iterator[Batch]:
    """Micro-batches from a step on, for ever."""
    stream = sample_stream(factory.config, factory.reader.index)
    while True:
        for micro in micro_batches(stream, factory.config, step):
            yield factory.batch(micro)
        step += 1


class Reporter:
    """Writes metrics.jsonl and a line for each record."""

    def __init__(self, config: PretrainConfig, folder: Path, num_samples: int) -> None:
        self.num_steps = config.num_steps(num_samples)
        self.folder = folder

    def on_start(self, step: int) -> None:
        self._file = MetricsFile(self.folder / "metrics.jsonl", start_step=step)

    def on_metrics(self, step: int, metrics: dict[str, float]) -> bool:
        self._file.append({"step": step, **metrics})
        keys = ("train/loss_mim", "perf/images_per_s", "perf/data_wait_frac")
        shown = [key for key in (*keys, *metrics) if key in keys or "over_baseline" in key]
        values = "  ".join(f"{k.split('/')[1]} {metrics[k]:.4g}" for k in shown if k in metrics)
        logger.info("%d/%d  %s", step, self.num_steps, values)
        return False


if __name__ == "__main__":
    main()
