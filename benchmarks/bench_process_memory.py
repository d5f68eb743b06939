"""What does it gain that a training process keeps the memory it frees?

    python benchmarks/bench_process_memory.py

A pre-training step of `bench_model.py` on the CPU in two processes that take turns: one keeps what
it frees (`pipeline/process_memory.py`), one lets go of it. Two CPU cores, six minutes.

The last line is JSON, medians of a step: {mode: {let_go_s, keep_s, keep_vs_let_go,
let_go_page_faults, keep_page_faults}}; the ratio is that of speeds within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from step_process import StepProcess, Taken

BENCH_MODEL = str(Path(__file__).parent / "bench_model.py")
MODES = ("reference", "eager", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="itpn_base_patch16_224")
    parser.add_argument("--objective", default="mim", choices=("mim", "mim_mfm"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    result = {}
    for mode in MODES:
        result[mode] = compare(args, mode)
        print(mode, result[mode], flush=True)
    print(json.dumps(result))


def compare(args: argparse.Namespace, mode: str) -> dict[str, float]:
    """Both ways with one mode."""
    command = [BENCH_MODEL, "--model", args.model, "--serve", mode, args.objective, "--memory"]
    rows: list[tuple[Taken, Taken]] = []
    with StepProcess([*command, "let-go"]) as let_go, StepProcess([*command, "keep"]) as keep:
        for process in (let_go, keep):
            process.take_turn()  # warm now
        for index in range(args.rounds):
            order = (let_go, keep) if index % 2 else (keep, let_go)  # who comes first changes
            taken = {process: process.take_turn() for process in order}
            rows.append((taken[let_go], taken[keep]))
    first, second = zip(*rows, strict=True)
    return {
        "let_go_s": round(statistics.median(taken.seconds for taken in first), 3),
        "keep_s": round(statistics.median(taken.seconds for taken in second), 3),
        "keep_vs_let_go": round(statistics.median(a.seconds / b.seconds for a, b in rows), 3),
        "let_go_page_faults": statistics.median(taken.page_faults for taken in first),
        "keep_page_faults": statistics.median(taken.page_faults for taken in second),
    }


if __name__ == "__main__":
    main()
