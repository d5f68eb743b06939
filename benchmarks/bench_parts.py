"""Parts of a step that were chosen by measurement: AdamW, attention, float32 products, pixels.

"medium" is float32 through oneDNN, "highest" as torch multiplies of itself (`onednn_products.py`).

    python benchmarks/bench_parts.py

Two CPU cores, a minute. Milliseconds, medians of interleaved repeats; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import attention
from pipeline.data import SyntheticBatches
from pipeline.onednn_products import use_onednn
from pipeline.pretrain import to_device
from pipeline.process_memory import keep_freed_memory
from pipeline.recipes import demo

SIZES = {"decoder": (8, 16, 196, 32), "student": (8, 8, 49, 64), "teacher": (8, 8, 147, 64)}
"""(B, H, N, K) of attention in iTPN-B at a batch of 8."""
TOKENS = (1568, 392)
"""Of its decoder and its encoder, then."""
_NUM_BATCHES = 101


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    result: dict[str, Any] = {"adamw, 82 M weights": compare(optimisers(), args.repeats)}
    for name, size in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            key = f"attention of the {name}, {str(dtype).removeprefix('torch.')}"
            result[key] = compare(attentions(size, dtype), args.repeats)
    for tokens in TOKENS:
        result[f"512 -> 2048 of {tokens} tokens, float32"] = compare(linears(tokens), args.repeats)
    result["pixels of 16 images of 160"] = compare(pixels(), args.repeats)
    for key, row in result.items():
        print(f"{key}: {row}")
    print(json.dumps(result))


def compare(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 2):  # the first two do not count
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()}


def optimisers() -> dict[str, Callable[[], Any]]:
    """A step of AdamW over 78 matrices."""
    weights = [nn.Parameter(torch.randn(2048, 512)) for _ in range(78)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    kinds = {"one by one": {"foreach": False}, "foreach": {"foreach": True}}
    kinds["fused"] = {"fused": True}
    return {name: torch.optim.AdamW(weights, lr=1e-4, **kind).step for name, kind in kinds.items()}


def attentions(size: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Forward and backward of plain and of torch's fused attention."""
    B, H, N, K = size
    qkv = torch.randn(B, N, 3, H, K).to(dtype).requires_grad_()
    gradient = torch.randn(B, N, H * K).to(dtype)

    def run(attend: Callable[..., Tensor]) -> Callable[[], Any]:
        def step() -> None:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            attend(q, k, v).transpose(1, 2).reshape(B, N, H * K).backward(gradient)
            qkv.grad = None

        return step

    ways = {"plain": run(attention), "fused": run(F.scaled_dot_product_attention)}
    return both_ways(ways) if dtype == torch.float32 else ways


def linears(tokens: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward of a layer."""
    layer = nn.Linear(512, 2048)
    input = torch.randn(tokens, 512, requires_grad=True)
    gradient = torch.randn(tokens, 2048)

    def step() -> None:
        layer(input).backward(gradient)
        layer.zero_grad(set_to_none=True)
        input.grad = None

    return both_ways({"layer": step})


def both_ways(ways: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Each as torch multiplies of itself, and through oneDNN, where that is to be had."""

    def run(way: Callable[[], Any], precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        way()
        torch.set_float32_matmul_precision("highest")

    precisions = ("highest", "medium") if use_onednn() else ("highest",)
    torch.set_float32_matmul_precision("highest")
    return {
        f"{name}, {precision}": partial(run, way, precision)
        for precision in precisions
        for name, way in ways.items()
    }


def pixels() -> dict[str, Callable[[], Any]]:
    """uint8 pixels to normalised planes: ordered last, as the formula has it, and first.

    Each time others, as in training: no cache knows them.
    """
    config, device = demo(), torch.device("cpu")
    batch = SyntheticBatches(config).batch
    batches = cycle([batch | {"image": batch["image"].copy()} for _ in range(_NUM_BATCHES)])
    mean, std = (torch.tensor(v) * 255 for v in (config.data.mean, config.data.std))

    def ordered_last() -> Tensor:
        images = (torch.from_numpy(next(batches)["image"]).float() - mean) / std
        return images.permute(0, 3, 1, 2).contiguous()

    return {"ordered last": ordered_last, "first": lambda: to_device(next(batches), config, device)}


if __name__ == "__main__":
    main()
