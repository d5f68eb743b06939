"""What 8, 64 and 512 GPUs would need: arithmetic on measured constants, no measurement itself.

    python benchmarks/scaling_model.py --model itpn_base_patch16_224
    python benchmarks/scaling_model.py --model itpn_large_patch16_224

Seconds; prints the tables of docs/scaling.md. Measured here: operations an image, weights, the CPU
time of a sample in the data plane and in the training process. Assumed: the GPU (data sheet times
an MFU that has not been measured), the mean file size of the data sets (as their publishers say).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_model import flops_per_image

from models.pretraining import create_pretraining_model

CROP_CPU_S = 2.5e-3
"""CPU seconds a sample costs in a data process (results/2026-11-data-plane.md; 500x375 JPEG)."""
TRAINER_CPU_S = 0.19e-3
"""CPU seconds it costs in the training process, in the threads of Ray Data (the same file)."""
SAMPLE_BYTES = 3 * 224 * 224 + 196
DATASETS = {"ImageNet-21k": (14.2e6, 1.3e12), "LAION-400M": (413e6, 10e12)}
"""Images and bytes, as published."""
NUM_GPUS = (8, 64, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="itpn_base_patch16_224")
    parser.add_argument("--gpu-tflops", type=float, default=989.0, help="bf16, dense")
    parser.add_argument("--mfu", type=float, default=0.45)
    parser.add_argument("--batch-size", type=int, default=4096, help="global, of the recipe")
    args = parser.parse_args()
    flops = flops_per_image(args, "mim_mfm")
    model = create_pretraining_model(args.model)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    teacher = sum(p.numel() for p in model.encoder.backbone.parameters())
    rate = args.gpu_tflops * 1e12 * args.mfu / flops
    print(
        f"{args.model}, MIM + MFM: {flops / 1e9:.1f} GFLOP an image, {weights / 1e6:.1f} M weights"
    )
    print(f"one GPU: {rate:.0f} images/s; its training process: {rate * TRAINER_CPU_S:.2f} cores")
    checkpoint = 4 * (3 * weights + teacher)
    print(f"a checkpoint: {checkpoint / 1e9:.2f} GB\n")
    columns = " | ".join(f"{n} GPUs" for n in NUM_GPUS)
    print(f"| | {columns} |\n| --- |{' --- |' * len(NUM_GPUS)}")
    for label, value in rows(args, rate, weights).items():
        print(f"| {label} | {' | '.join(value(n) for n in NUM_GPUS)} |")


def rows(args: argparse.Namespace, rate: float, weights: int) -> dict:
    """Label -> function of the number of GPUs, which gives a cell."""

    def step_s(n: int) -> float:
        return args.batch_size / (n * rate)

    def link(n: int) -> float:  # of a ring: each GPU sends and receives this much a second
        return 2 * (n - 1) / n * 4 * weights / step_s(n) / 1e9

    def epoch(n: int, images: float) -> str:
        seconds = images / (n * rate)
        return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.1f} min"

    cells = {
        "images/s": lambda n: f"{n * rate:,.0f}",
        "cores that decode": lambda n: f"{n * rate * CROP_CPU_S:,.0f}",
        "samples into the trainers, GB/s": lambda n: f"{n * rate * SAMPLE_BYTES / 1e9:.1f}",
        f"a step at batch {args.batch_size}, ms": lambda n: f"{1e3 * step_s(n):.1f}",
        "all-reduce to hide it, GB/s a GPU": lambda n: f"{link(n):.1f}",
    }
    for name, (images, size) in DATASETS.items():
        mean = size / images
        cells[f"{name}: an epoch"] = lambda n, images=images: epoch(n, images)
        cells[f"{name}: reading, GB/s"] = lambda n, mean=mean: f"{n * rate * mean / 1e9:.2f}"
    return cells


if __name__ == "__main__":
    main()
