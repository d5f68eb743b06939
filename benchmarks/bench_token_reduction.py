"""What do token migration and token gathering save in the forward and backward pass of a trunk?

    python benchmarks/bench_token_reduction.py
    python benchmarks/bench_token_reduction.py --model fast_itpn_base_patch16_224 --img-size 512

Both options are our reading of Fast-iTPN (`models/token_reduction.py`): half of the tokens leave
after a third of the blocks of stage 3; windows of 7x7 tokens (8x8 where those divide the grid) with
4 gathering tokens, every fourth block global. The modes take turns, in another order every round,
and each is compared with "none" of the same round. On a machine that does other work, `--clock cpu
--threads 1` counts the seconds of the process instead of those on the wall. Needs torch and timm
alone. The default, `fast_itpn_tiny` at 224 and at 512 pixels, takes 3 minutes of processor time.
Results: docs/models.md, "Fewer tokens".

Prints median and spread (least to greatest round) of images/s, then FLOPs of the forward pass of an
image (a multiplication and an addition are two) and, as the last line, JSON
{"mode@size": {"ratio_vs_none", "images_per_s", "flops_per_image"}}; a ratio above 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.hivit import HiViT
from models.itpn import create_itpn
from models.token_reduction import TokenGathering, TokenMigration
from models.variants import get_variant

MODES = ("none", "migration", "gathering", "both")


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{args.model}, batch of {args.batch_size}, {device}, torch {torch.__version__}")
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds, {args.clock} time")
    result: dict[str, dict[str, float]] = {}
    for img_size in args.img_size:
        trunks = {mode: build_trunk(args, mode, img_size).to(device) for mode in MODES}
        images = torch.randn(args.batch_size, 3, img_size, img_size, device=device)
        rates = measure(trunks, images, args)
        for mode, trunk in trunks.items():
            ratios = [a / b for a, b in zip(rates[mode], rates["none"], strict=True)]
            result[f"{mode}@{img_size}"] = {
                "ratio_vs_none": round(statistics.median(ratios), 3),
                "images_per_s": round(statistics.median(rates[mode]), 3),
                "flops_per_image": count_flops(trunk, images[:1]),
            }
            print(row(f"{mode}@{img_size}", rates[mode], ratios, result))
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="fast_itpn_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of a mode in a round")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--window", type=int, default=0, help="0: 8 tokens where they divide")
    parser.add_argument("--num-tokens", type=int, default=4)
    parser.add_argument("--global-every", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def build_trunk(args: argparse.Namespace, mode: str, img_size: int) -> HiViT:
    """The trunk of a mode; all of them start from the same weights."""
    depth = get_variant(args.model).depths[2]
    window = args.window or (7 if img_size // 16 % 8 else 8)
    migration = TokenMigration(after_block=max(0, depth // 3 - 1), keep_ratio=args.keep_ratio)
    gathering = TokenGathering(
        window=window, num_tokens=args.num_tokens, global_every=args.global_every
    )
    torch.manual_seed(0)
    return create_itpn(
        args.model,
        img_size=img_size,
        rel_pos_bias=False,
        token_migration=migration if mode in ("migration", "both") else None,
        token_gathering=gathering if mode in ("gathering", "both") else None,
    ).backbone


def measure(
    trunks: dict[str, HiViT], images: Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Images/s of every mode and round."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    order = random.Random(0)
    rates: dict[str, list[float]] = {mode: [] for mode in trunks}
    for trunk in trunks.values():  # the first step allocates
        seconds_of_steps(trunk, images, 1, clock)
    for _ in range(args.rounds):
        for mode in order.sample(MODES, len(MODES)):
            seconds = seconds_of_steps(trunks[mode], images, args.steps, clock)
            rates[mode].append(args.steps * len(images) / seconds)
    return rates


def seconds_of_steps(trunk: HiViT, images: Tensor, steps: int, clock: Callable[[], float]) -> float:
    """Seconds of forward and backward passes."""
    _wait(images.device)
    start = clock()
    for _ in range(steps):
        trunk.zero_grad(set_to_none=True)
        features = trunk(images)
        torch.stack([f.square().mean() for f in features.values()]).sum().backward()
    _wait(images.device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(trunk: HiViT, image: Tensor) -> int:
    """FLOPs of the forward pass of one image."""
    # The counter knows matrix products on every device, fused attention on some only.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        trunk(image)
    return int(counter.get_total_flops())


def row(
    name: str, rates: list[float], ratios: list[float], result: dict[str, dict[str, float]]
) -> str:
    """One line of the table."""
    gflops = result[name]["flops_per_image"] / 1e9
    return (
        f"{name:14s} {statistics.median(rates):8.2f} images/s ({min(rates):.2f} to "
        f"{max(rates):.2f})  x{statistics.median(ratios):.2f} of none ({min(ratios):.2f} to "
        f"{max(ratios):.2f})  {gflops:.2f} GFLOPs"
    )


if __name__ == "__main__":
    main()
