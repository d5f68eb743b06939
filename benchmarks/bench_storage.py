"""What object storage costs when a quarter of its requests fail.

    python benchmarks/bench_storage.py

Two CPU cores, about a minute: calls of `pipeline.storage`, one after another. moto's S3 server on
loopback behind a proxy of ours (both those of the tests: `pip install -e '.[test]'`); calm and
spoiled rounds take turns. Not how fast S3 is, but what retries cost: the ratio, and requests sent
for requests needed.

The last line is JSON: {work: {calm_s, spoiled_s, ratio, calm_requests, spoiled_requests}}, medians.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import storage
from tests.s3_proxy import FaultProxy, Kind, fault_proxy, seeded
from tests.s3_server import BUCKET, environment, s3_server

SPOILED: dict[Kind, float] = {
    "503": 0.08,
    "500": 0.02,
    "reset": 0.04,
    "lost_answer": 0.02,
    "truncated": 0.04,
    "slow": 0.05,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-files", type=int, default=100)
    parser.add_argument("--file-kb", type=int, default=20)
    parser.add_argument("--large-mb", type=int, default=100)
    args = parser.parse_args()
    logging.getLogger("pipeline.storage").setLevel(logging.ERROR)  # retries are what is measured
    rows: dict[str, dict[str, list[float]]] = {}
    with s3_server() as server, fault_proxy(server.url) as proxy:
        os.environ.update(environment(proxy.url))
        with tempfile.TemporaryDirectory() as folder:
            for index in range(args.rounds):
                for weather in ("calm", "spoiled"):
                    proxy.rule = seeded(SPOILED, seed=index) if weather == "spoiled" else None
                    for name, work in works(args, Path(folder), f"{index}-{weather}").items():
                        seconds, requests = timed(work, proxy)
                        found = rows.setdefault(name, {})
                        found.setdefault(f"{weather}_s", []).append(seconds)
                        found.setdefault(f"{weather}_requests", []).append(requests)
                        print(f"round {index} {weather:8s}{name:14s}{seconds:8.2f} s {requests:5d}")
    print(json.dumps({name: summary(found) for name, found in rows.items()}))


def works(args: argparse.Namespace, folder: Path, prefix: str) -> dict[str, Callable[[], object]]:
    """What is timed, in this order."""
    filesystem, root = storage.resolve(f"s3://{BUCKET}/{prefix}")
    content = os.urandom(args.file_kb * 1000)
    large = folder / "large"
    if not large.exists():
        large.write_bytes(os.urandom(args.large_mb * 10**6))
    names = [f"{root}/small/{i:04d}" for i in range(args.num_files)]
    return {
        "small written": lambda: [storage.write_bytes(filesystem, n, content) for n in names],
        "small read": lambda: [storage.read_bytes(filesystem, n) for n in names],
        "large written": lambda: storage.upload(filesystem, f"{root}/large", large),
        "large read": lambda: storage.download(filesystem, f"{root}/large", folder / "back"),
    }


def timed(work: Callable[[], object], proxy: FaultProxy) -> tuple[float, int]:
    """Seconds, and requests that reached the proxy."""
    before, started = len(proxy.requests), time.perf_counter()
    work()
    return time.perf_counter() - started, len(proxy.requests) - before


def summary(found: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds; the ratio is taken within a round."""
    medians = {key: round(statistics.median(values), 2) for key, values in found.items()}
    pairs = zip(found["spoiled_s"], found["calm_s"], strict=True)
    return {**medians, "ratio": round(statistics.median(a / b for a, b in pairs), 2)}


if __name__ == "__main__":
    main()
