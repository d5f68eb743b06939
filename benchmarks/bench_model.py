"""How fast is a pre-training step, against the official arithmetic and against a matrix product?

    python benchmarks/bench_model.py                                 # 2 CPU cores: 15 minutes
    python benchmarks/bench_model.py --device cuda --batch-size 256  # not yet measured

Forward, backward, AdamW and, with MFM, teacher and moving average, of one model in four modes:
`reference` (`reference_model.py`), `eager`, `bf16` (eager under autocast), `compiled`. On CUDA
reference and compiled run under bf16 autocast, too. Needs torch and timm alone. Each mode is a
process, and they take turns, so that what else the machine does hits all; medians over the rounds.
On the CPU ours keep the memory they free, as a training worker does, and the reference gives it
back, as the released code does; `--memory keep` and `let-go` have all do the same. `mfu` is what
the objective needs in floating-point operations, the same for every mode, against the rate of a
square matrix product of the mode's precision in the same rounds: the fastest of torch's, in float32
on CPUs of MKL's and oneDNN's. The reference multiplies as torch does of itself.

The last line is JSON: {mode: {objective: {ratio_vs_reference, images_per_s, flops_per_image, mfu,
peak_mb}}}.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from reference_model import ReferenceModel, ReferenceTeacher
from step_process import StepProcess, Taken, serve_steps
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.pretraining import PretrainingModel, create_pretraining_model
from models.teacher import EMATeacher
from models.tokens import split_tokens
from pipeline.compilation import compile_training
from pipeline.onednn_products import use_onednn
from pipeline.optim import build_optimizer, param_groups
from pipeline.process_memory import keep_freed_memory

MODES = ("reference", "eager", "bf16", "compiled")
OBJECTIVES = {"mim": 0.0, "mim_mfm": 0.3}
Measured = dict[tuple[str, str], list[Taken]]
"""By mode and objective, a round each."""
IMAGE_SIZE, NUM_PATCHES = 224, 196
MASK_RATIO, MOMENTUM, LR, WEIGHT_DECAY, BETAS = 0.75, 0.996, 1.5e-4, 0.05, (0.9, 0.95)


class Batch(NamedTuple):
    images: Tensor
    """(B, 3, H, W), normalised."""
    mask: Tensor
    """(B, N) bool, True = masked."""


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        serve(args, *args.serve)
        return
    keeps_memory(args, "keep")
    found: Measured = {key: [] for key in itertools.product(args.modes, args.objectives)}
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for objective in args.objectives:
        measure(args, objective, found, rates)
    report(args, found, rates)


def measure(
    args: argparse.Namespace,
    objective: str,
    found: Measured,
    rates: dict[torch.dtype, list[float]],
) -> None:
    """Fill in what the modes take, in turns, and the rates of matrix products beside them."""
    with contextlib.ExitStack() as stack:
        processes = {}
        for mode in args.modes:
            command = [__file__, *sys.argv[1:], "--serve", mode, objective]
            processes[mode] = stack.enter_context(StepProcess(command))
            first = processes[mode].take_turn()  # ready now
            print(f"{mode} {objective}: first turn {first.seconds:.1f} s a step", flush=True)
        for index in range(args.rounds):
            for dtype, values in rates.items():
                values.append(matmul_rate(args, dtype))
            for mode in args.modes:
                found[mode, objective].append(processes[mode].take_turn())
            print(f"{objective}: round {index + 1} of {args.rounds}", flush=True)


def serve(args: argparse.Namespace, mode: str, objective: str) -> None:
    """Steps of one mode, whenever the process that started this one asks for them."""
    is_reference = mode == "reference"
    as_run = "let-go" if is_reference else "keep"
    keeps_memory(args, as_run if args.memory == "as-run" else args.memory)
    if args.device == "cpu" and not is_reference:
        use_onednn()
    step, batch = make_step(args, mode, objective), make_batch(args)
    for _ in range(args.warmup):
        step(batch)

    def turn() -> float:
        if args.device == "cuda":
            step(batch)  # its memory was given back after the last turn
        return seconds(lambda: step(batch), args, args.steps)

    serve_steps(turn, args.device == "cuda")


def keeps_memory(args: argparse.Namespace, memory: str) -> None:
    """Have this process keep the memory it frees, or not."""
    if args.device == "cpu" and memory == "keep" and not keep_freed_memory():
        print("this C library cannot be told to keep memory", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="itpn_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps of a mode in a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--memory", default="as-run", choices=("as-run", "keep", "let-go"))
    parser.add_argument("--serve", nargs=2, metavar=("MODE", "OBJECTIVE"), help="used by itself")
    return parser.parse_args()


def make_batch(args: argparse.Namespace) -> Batch:
    """The same images and masks for every mode."""
    generator = torch.Generator().manual_seed(0)
    size = (args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randn(size, generator=generator)
    order = torch.rand(args.batch_size, NUM_PATCHES, generator=generator).argsort(dim=1)
    return Batch(images.to(args.device), (order < NUM_PATCHES * MASK_RATIO).to(args.device))


def new_model(args: argparse.Namespace, objective: str) -> PretrainingModel:
    """Fresh weights, 224 pixels."""
    torch.manual_seed(0)
    weight = OBJECTIVES[objective]
    return create_pretraining_model(args.model, img_size=IMAGE_SIZE, mfm_weight=weight)


def make_step(args: argparse.Namespace, mode: str, objective: str) -> Callable[[Batch], Tensor]:
    """A step of a mode, on fresh weights."""
    model = new_model(args, objective).to(args.device)
    if mode == "reference":
        return reference_step(ReferenceModel(model).to(args.device))
    is_compiled = mode == "compiled"
    is_bf16 = mode == "bf16" or (is_compiled and args.device == "cuda")
    return our_step(model, bf16=is_bf16, compiled=is_compiled)


class our_step:  # noqa: N801 (reads as the function it is)
    """A step as `pipeline.pretrain` makes it, without data, logging and guards."""

    def __init__(self, model: PretrainingModel, *, bf16: bool, compiled: bool = False) -> None:
        self.model, self.bf16 = model, bf16
        self.teacher = EMATeacher(model.encoder.backbone) if model.mfm else None
        self.optimizer = build_optimizer(model, lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS)
        if compiled:
            compile_training(model, self.teacher)

    def __call__(self, batch: Batch) -> Tensor:
        images, mask = batch
        num_visible = mask.shape[1] - int(mask.shape[1] * MASK_RATIO)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = None
            if self.teacher is not None:
                _, ids_masked = split_tokens(mask, num_visible)
                features = self.teacher(images, ids_masked)
            loss = self.model(images, mask, features, num_visible).total
        loss.backward()
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.update(self.model.encoder.backbone, MOMENTUM)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def reference_step(model: ReferenceModel) -> Callable[[Batch], Tensor]:
    """A step of the reference: AdamW parameter by parameter."""
    teacher = ReferenceTeacher(model) if model.mfm else None
    groups = param_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, foreach=False, fused=False)

    def step(batch: Batch) -> Tensor:
        is_cuda = batch.images.is_cuda
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=is_cuda):
            targets = teacher(*batch) if teacher else None
            loss: Tensor = model(*batch, targets)
        loss.backward()
        optimizer.step()
        if teacher:
            teacher.update(model, MOMENTUM)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def flops_per_image(args: argparse.Namespace, objective: str) -> int:
    """Operations of forward and backward, and of the teacher; two a multiply-add."""
    model = new_model(args, objective)
    args = argparse.Namespace(**vars(args) | {"batch_size": 1, "device": "cpu"})
    # On the CPU, where attention is plain: fused, its products would not be counted.
    with FlopCounterMode(display=False) as counter:
        our_step(model, bf16=False)(make_batch(args))
    return counter.get_total_flops()


def matmul_rate(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, by the faster of torch's ways."""
    size = 8192 if args.device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=args.device).to(dtype) for _ in range(2))
    precisions = ["highest"]
    if args.device == "cpu" and dtype == torch.float32 and use_onednn():
        precisions.append("medium")

    def multiply(precision: str, b: Tensor) -> Tensor:
        torch.set_float32_matmul_precision(precision)
        return a @ b

    ways = [partial(multiply, *way) for way in itertools.product(precisions, (b, b.mT))]
    once = [min(seconds(way, args, 1) for _ in range(2)) for way in ways]
    fastest = ways[once.index(min(once))]
    # For a second, as long as a step: a few products say more of the moment.
    taken = seconds(fastest, args, max(3, round(1 / min(once))))
    torch.set_float32_matmul_precision("highest")
    return 2 * size**3 / taken


def seconds(run: Callable[[], Any], args: argparse.Namespace, repeats: int) -> float:
    """Seconds of one call."""
    synchronize(args)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(args)
    return (time.perf_counter() - started) / repeats


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def report(
    args: argparse.Namespace, found: Measured, rates: dict[torch.dtype, list[float]]
) -> None:
    """Print the table, then the JSON."""
    for dtype, values in rates.items():
        rate = statistics.median(values) / 1e9
        print(f"matrix product, {dtype}: {rate:.0f} GFLOP/s ({spread(values, 1e9)})")
    result: dict[str, dict[str, Any]] = {mode: {} for mode in args.modes}
    for objective in args.objectives:
        flops = flops_per_image(args, objective)
        print(f"{objective}: {flops / 1e9:.1f} GFLOP an image; seconds a step, least to greatest:")
        times = {mode: [taken.seconds for taken in found[mode, objective]] for mode in args.modes}
        for mode in args.modes:
            is_bf16 = mode == "bf16" or (args.device == "cuda" and mode != "eager")
            taken = statistics.median(times[mode])
            base = statistics.median(times.get("reference", [float("nan")]))
            rate = statistics.median(rates[torch.bfloat16 if is_bf16 else torch.float32])
            row = {
                "ratio_vs_reference": round(base / taken, 3),
                "images_per_s": round(args.batch_size / taken, 3),
                "flops_per_image": flops,
                "mfu": round(flops * args.batch_size / taken / rate, 3),
                "peak_mb": round(found[mode, objective][-1].peak_mb),
            }
            result[mode][objective] = row
            print(f"  {mode:10} {taken:.3f} ({spread(times[mode])})  {row}")
    print(json.dumps(result))


def spread(values: list[float], unit: float = 1.0) -> str:
    return f"{min(values) / unit:.3g} to {max(values) / unit:.3g}"


if __name__ == "__main__":
    main()
