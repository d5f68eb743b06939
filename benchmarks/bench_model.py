"""How fast is a pre-training step, against the official arithmetic and against a matrix product?

    python benchmarks/bench_model.py                                 # 2 CPU cores: 15 minutes
    python benchmarks/bench_model.py --device cuda --batch-size 256  # not yet measured

Forward, backward, AdamW and, with MFM, teacher and moving average, of one model in four modes:
`reference` (`reference_model.py`), `eager`, `bf16` (eager under autocast), `compiled`. On CUDA
reference and compiled run under bf16 autocast, too. Needs torch and timm alone. Modes take turns,
so that what else the machine does hits all; medians over the rounds. `mfu` is what the objective
needs in floating-point operations, the same for every mode, against the rate of a square matrix
product of the mode's precision in the same rounds. Peak memory is that of a process of its own.

The last line is JSON: {mode: {objective: {ratio_vs_reference, images_per_s, flops_per_image, mfu,
peak_mb}}}.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from reference_model import ReferenceModel, ReferenceTeacher
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.pretraining import PretrainingModel, create_pretraining_model
from models.teacher import EMATeacher
from models.tokens import split_tokens
from pipeline.compilation import compile_training
from pipeline.optim import build_optimizer, param_groups

MODES = ("reference", "eager", "bf16", "compiled")
OBJECTIVES = {"mim": 0.0, "mim_mfm": 0.3}
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
    torch.set_float32_matmul_precision("highest")
    if args.peak_of:
        print(json.dumps(peak_mb(args, *args.peak_of)))
        return
    batch = make_batch(args)
    steps = {
        (mode, objective): step
        for objective in args.objectives
        for mode, step in make_steps(args, objective).items()
    }
    for key, step in steps.items():
        started = time.perf_counter()
        for _ in range(args.warmup):
            step(batch)
        synchronize(args)
        print(f"{' '.join(key)}: ready after {time.perf_counter() - started:.1f} s", flush=True)
    times: dict[Any, list[float]] = {key: [] for key in (*steps, torch.float32, torch.bfloat16)}
    for index in range(args.rounds):
        for dtype in (torch.float32, torch.bfloat16):
            times[dtype].append(matmul_rate(args, dtype))
        for key, step in steps.items():
            times[key].append(seconds(lambda step=step: step(batch), args, args.steps))
        print(f"round {index + 1} of {args.rounds}", flush=True)
    report(args, times)


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
    parser.add_argument("--peak-of", nargs=2, metavar=("MODE", "OBJECTIVE"), help="used by itself")
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


def make_steps(args: argparse.Namespace, objective: str) -> dict[str, Callable[[Batch], Tensor]]:
    """A step of each mode; eager and bf16 share weights and optimiser, to spare memory."""
    model = new_model(args, objective).to(args.device)
    steps: dict[str, Callable[[Batch], Tensor]] = {}
    if "reference" in args.modes:
        steps["reference"] = reference_step(ReferenceModel(model).to(args.device))
    if "compiled" in args.modes:
        clone = copy.deepcopy(model)
        steps["compiled"] = our_step(clone, bf16=args.device == "cuda", compiled=True)
    if {"eager", "bf16"} & set(args.modes):
        steps["eager"] = our_step(model, bf16=False)
        steps["bf16"] = our_step(model, bf16=True, optimizer=steps["eager"].optimizer)
    return {mode: steps[mode] for mode in args.modes}


class our_step:  # noqa: N801 (reads as the function it is)
    """A step as `pipeline.pretrain` makes it, without data, logging and guards."""

    def __init__(
        self,
        model: PretrainingModel,
        *,
        bf16: bool,
        compiled: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model, self.bf16 = model, bf16
        self.teacher = EMATeacher(model.encoder.backbone) if model.mfm else None
        self.optimizer = optimizer or build_optimizer(
            model, lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS
        )
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
    # The parts of fused attention are only counted when they are computed one by one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        our_step(model, bf16=False)(make_batch(args))
    return counter.get_total_flops()


def matmul_rate(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product."""
    size = 8192 if args.device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=args.device).to(dtype) for _ in range(2))
    a @ b
    repeats = 20 if args.device == "cuda" else 3
    return 2 * size**3 / seconds(lambda: a @ b, args, repeats)


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


def peak_mb(args: argparse.Namespace, mode: str, objective: str) -> float:
    """Largest memory of this process (on CUDA: of tensors) over two steps of one mode."""
    args.modes = [mode]
    step, batch = make_steps(args, objective)[mode], make_batch(args)
    for _ in range(2):
        step(batch)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its maximum begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def peak_of(args: argparse.Namespace, mode: str, objective: str) -> float:
    """`peak_mb` in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", mode, objective, "--device", args.device]
    command += ["--model", args.model, "--batch-size", str(args.batch_size)]
    command += ["--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace, times: dict[Any, list[float]]) -> None:
    """Print the table, then the JSON."""
    rates = {dtype: statistics.median(times[dtype]) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, rate in rates.items():
        print(f"matrix product, {dtype}: {rate / 1e9:.0f} GFLOP/s ({spread(times[dtype], 1e9)})")
    result: dict[str, dict[str, Any]] = {mode: {} for mode in args.modes}
    for objective in args.objectives:
        flops = flops_per_image(args, objective)
        print(f"{objective}: {flops / 1e9:.1f} GFLOP an image; seconds a step, least to greatest:")
        for mode in args.modes:
            is_bf16 = mode == "bf16" or (args.device == "cuda" and mode != "eager")
            taken = statistics.median(times[mode, objective])
            base = statistics.median(times.get(("reference", objective), [float("nan")]))
            rate = flops * args.batch_size / taken
            row = {
                "ratio_vs_reference": round(base / taken, 3),
                "images_per_s": round(args.batch_size / taken, 3),
                "flops_per_image": flops,
                "mfu": round(rate / rates[torch.bfloat16 if is_bf16 else torch.float32], 3),
                "peak_mb": round(peak_of(args, mode, objective)),
            }
            result[mode][objective] = row
            print(f"  {mode:10} {taken:.3f} ({spread(times[mode, objective])})  {row}")
    print(json.dumps(result))


def spread(values: list[float], unit: float = 1.0) -> str:
    return f"{min(values) / unit:.3g} to {max(values) / unit:.3g}"


if __name__ == "__main__":
    main()
