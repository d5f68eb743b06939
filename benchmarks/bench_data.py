"""How fast does the data plane deliver training crops, against the loader the official code uses?

    python benchmarks/bench_data.py [--rounds 3] [--num-images 2000] [--num-cpus 2]

Delivered 224-px uint8 crops/s at the trainer, from prepared Parquet and from a folder, against
* dataloader: torch DataLoader + torchvision ImageFolder + RandomResizedCrop(224, bicubic, Pillow) +
  flip + ToTensor + Normalize, the loader of the official code, with as many worker processes;
* ceiling: our own decode + crop of encoded bytes in memory, in one process, times the cores; and,
  for the record, the same in as many processes at once (`parallel_images_per_s`).

All in one run, interleaved. Each rate is taken between two fifths and four fifths of the images,
when all processes run and queues neither fill nor drain. Each of our pipelines gets a fresh Ray, so
that the time to its first batch includes starting it up. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import ray
from PIL import Image
from ray._private.internal_api import node_stats

from pipeline.cluster import cluster
from pipeline.config_values import apply_overrides
from pipeline.data import TrainingBatches
from pipeline.demo_data import write_demo_photos
from pipeline.prepare.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import demo
from pipeline.reproducibility import sample_generator
from pipeline.sources import build_index
from pipeline.transforms import random_resized_crop

IMAGE_SIZE = 224
BATCH_SIZE = 64
PASSES = 5  # over the images, in one measurement
CEILING_S = 6.0
GRAIN = 4.0  # levels of noise, so that the files are as large as a camera's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--num-cpus", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.num_images)
        prepare_parquet(Path(folder))
        print(json.dumps(measure(Path(folder), args.rounds, args.num_images, args.num_cpus)))


def measure(folder: Path, rounds: int, num_images: int, num_cpus: int) -> dict[str, Any]:
    """Medians over the rounds, and what they are relative to each other."""
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        measurements = {
            "dataloader": partial(measure_dataloader, folder / "images", num_images, num_cpus),
            "parquet": partial(measure_ours, folder / "prepared" / "train", num_images, num_cpus),
            "folder": partial(measure_ours, folder / "images", num_images, num_cpus),
            "ceiling": partial(measure_ceiling, folder / "images", num_cpus),
        }
        for name, run in measurements.items():
            result = run()
            runs.setdefault(name, []).append(result)
            shown = "  ".join(f"{key} {value:.5g}" for key, value in result.items())
            print(f"round {number + 1}/{rounds}  {name:10s} {shown}", flush=True)
    return summarise(runs, num_cpus)


def summarise(runs: dict[str, list[dict[str, float]]], num_cpus: int) -> dict[str, Any]:
    """The JSON: medians, spread = (largest - smallest) / median, and ratios."""
    summary: dict[str, Any] = {}
    for name, results in runs.items():
        rates = [result["images_per_s"] for result in results]
        summary[name] = {
            key: round(statistics.median(result[key] for result in results), 2)
            for key in results[0]
        }
        summary[name]["spread"] = round((max(rates) - min(rates)) / statistics.median(rates), 3)
    ceiling = summary["ceiling"]["images_per_s"] * num_cpus
    for name in ("parquet", "folder"):
        rate = summary[name]["images_per_s"]
        summary[name]["ratio_vs_dataloader"] = round(
            rate / summary["dataloader"]["images_per_s"], 3
        )
        summary[name]["ratio_vs_ceiling"] = round(rate / ceiling, 3)
        parallel = summary["ceiling"]["parallel_images_per_s"]
        summary[name]["ratio_vs_parallel_ceiling"] = round(rate / parallel, 3)
    return summary


def steady_rate(batches: Iterable[int], total: int) -> tuple[float, float]:
    """Images/s between 40 % and 80 % of `total`, and seconds to the first batch.

    Args:
        batches: yields the number of images of each batch.
        total: images in all.
    """
    start = time.perf_counter()
    first_s, seen, marks = 0.0, 0, []
    for size in batches:
        now = time.perf_counter()
        first_s = first_s or now - start
        seen += size
        if 0.4 * total <= seen <= 0.8 * total:
            marks.append((seen, now))
    (images_a, time_a), (images_b, time_b) = marks[0], marks[-1]
    return (images_b - images_a) / (time_b - time_a), first_s


def measure_dataloader(folder: Path, num_images: int, num_workers: int) -> dict[str, float]:
    """The official loader, to float32 tensors in the consuming process."""
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                IMAGE_SIZE, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    dataset = ImageFolder(str(folder), transform)
    total = num_images * PASSES
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=total)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH_SIZE, sampler=sampler, num_workers=num_workers, drop_last=True
    )
    rate, first_s = steady_rate((len(images) for images, _ in loader), total)
    return {"images_per_s": rate, "first_batch_s": first_s}


def measure_ours(path: Path, num_images: int, num_cpus: int) -> dict[str, float]:
    """Our data plane, in a fresh Ray."""
    config = benchmark_config(path, num_cpus)
    num_steps = num_images * PASSES // BATCH_SIZE
    index = build_index(str(path))
    with cluster(config), Watch() as watch:
        batches = TrainingBatches(config, ray.put(index), rank=0, start_step=0, num_steps=num_steps)
        sizes = (len(batch["image"]) for batch in batches)
        rate, first_s = steady_rate(sizes, num_steps * BATCH_SIZE)
    return {
        "images_per_s": rate,
        "first_batch_s": first_s,
        "peak_rss_mb": watch.rss_mb,
        "object_store_peak_mb": watch.store_mb,
    }


def benchmark_config(path: Path, num_cpus: int) -> PretrainConfig:
    """The demo with ImageNet's crops and one worker."""
    return apply_overrides(
        demo(),
        {
            "data.path": str(path),
            "data.image_size": IMAGE_SIZE,
            "data.crop_scale": [0.2, 1.0],
            "data.global_batch_size": BATCH_SIZE,
            "data.num_cpus": num_cpus,
            "scaling.num_workers": 1,
        },
    )


class Watch:
    """Peaks while it is open: private memory of one data process, and of the object store."""

    def __init__(self) -> None:
        self.rss_mb = self.store_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        node = next(node for node in ray.nodes() if node["Alive"])
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        while not self._stop.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        memory = process.memory_info()
                        self.rss_mb = max(self.rss_mb, (memory.rss - memory.shared) / 2**20)
                except psutil.Error:
                    continue  # it has ended
            store = node_stats(*address).store_stats
            self.store_mb = max(self.store_mb, store.object_store_bytes_used / 2**20)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure_ceiling(folder: Path, num_cpus: int) -> dict[str, float]:
    """Decode + crop of bytes in memory: one process alone, then one a core."""
    context = multiprocessing.get_context("spawn")
    paths = sorted(str(path) for path in folder.rglob("*.jpg"))[:500]
    with context.Pool(num_cpus) as pool:
        pool.map(_crops_per_s, [(paths, 0.2)] * num_cpus, chunksize=1)  # imports
        alone = pool.map(_crops_per_s, [(paths, CEILING_S)])[0]
        together = sum(pool.map(_crops_per_s, [(paths, CEILING_S)] * num_cpus, chunksize=1))
    return {"images_per_s": alone, "parallel_images_per_s": together}


def _crops_per_s(work: tuple[list[str], float]) -> float:
    paths, seconds = work
    encoded = [Path(path).read_bytes() for path in paths]
    start, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        random_resized_crop(
            encoded[done % len(encoded)],
            sample_generator(0, done // len(encoded), done, "crop"),
            image_size=IMAGE_SIZE,
            scale=(0.2, 1.0),
            ratio=(3 / 4, 4 / 3),
            flip_prob=0.5,
        )
        done += 1
    return done / elapsed


def write_images(folder: Path, num_images: int) -> None:
    """JPEGs of about 500x375 in ten class folders: random regions of the demo's photographs."""
    write_demo_photos(folder / "photos")
    photos = [Image.open(path) for path in sorted((folder / "photos" / "train").iterdir())]
    generator = np.random.default_rng(0)
    for i in range(num_images):
        photo = photos[i % len(photos)]
        width, height = (int(side * generator.uniform(0.9, 1.1)) for side in (500, 375))
        share = generator.uniform(0.6, 1.0) * min(photo.width / width, photo.height / height)
        w, h = width * share, height * share
        left = generator.uniform(0, photo.width - w)
        upper = generator.uniform(0, photo.height - h)
        region = photo.resize(
            (width, height), Image.Resampling.BICUBIC, box=(left, upper, left + w, upper + h)
        )
        pixels = np.asarray(region) + generator.normal(0, GRAIN, (height, width, 1))
        name = folder / "images" / f"class_{i % 10}" / f"{i:05d}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(name, quality=92)


def prepare_parquet(folder: Path) -> None:
    """The same images as a prepared data set."""
    prepare(PrepareConfig(source=str(folder / "images"), out=str(folder / "prepared")))


if __name__ == "__main__":
    main()
