"""What does Ray Data's executor thread cost the training process it lives in?

    python benchmarks/bench_executor_rest.py

Trains `itpn_nano` on one fixed batch, in a process whose executor has filled its buffers and waits
for its consumer, with our rest (20 to 100 ms a round) and without, interleaved. Prints steps/s
of both and, as the last line, JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import torch

import pipeline.data
from pipeline.cluster import cluster
from pipeline.config_values import apply_overrides
from pipeline.data import SyntheticBatches, TrainingBatches
from pipeline.demo_data import write_demo_photos
from pipeline.pretrain import TrainState, forward_backward, to_device
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import demo
from pipeline.sources import build_index

ROUNDS = 5
STEPS = 15
FILL_S = 60.0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_demo_photos(folder)
        overrides = {"data.path": f"{folder}/train", "scaling.num_workers": 1}
        config = apply_overrides(demo(), {**overrides, "data.global_batch_size": 8})
        torch.set_num_threads(1)
        with cluster(config):
            print(json.dumps(measure(config)))


def measure(config: PretrainConfig) -> dict[str, float]:
    """Median steps/s with and without the rest, and their ratio."""
    index_ref = ray.put(build_index(config.data.path))
    state = TrainState.build(config, torch.device("cpu"))
    batch = SyntheticBatches(config).batch
    images, mask = to_device(batch, config, torch.device("cpu"))
    rest_s = pipeline.data._EXECUTOR_REST_S
    rates: dict[float, list[float]] = {rest_s: [], 0.0: []}
    # Far more steps than are consumed: the executor runs ahead until its buffers are full.
    batches = TrainingBatches(config, index_ref, rank=0, start_step=0, num_steps=100_000)
    stream = iter(batches)
    for _ in range(batches.bridge_steps + 1):  # the first ones do not come from Ray Data
        next(stream)
    time.sleep(FILL_S)
    for _ in range(ROUNDS):
        for rest in rates:
            pipeline.data._EXECUTOR_REST_S = rest  # read by the executor at every round
            start = time.perf_counter()
            for _ in range(STEPS):
                forward_backward(state.model, state.teacher, images, mask, config)
            next(stream)
            rates[rest].append(STEPS / (time.perf_counter() - start))
    with_rest, without = (statistics.median(rates[rest]) for rest in (rest_s, 0.0))
    print(f"with rest {with_rest:.2f} steps/s {rates[rest_s]}")
    print(f"without   {without:.2f} steps/s {rates[0.0]}")
    return {"with_rest": with_rest, "without": without, "ratio": with_rest / without}


if __name__ == "__main__":
    main()
