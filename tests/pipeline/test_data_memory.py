"""Memory of a data process: that of what it reads next, not of the data set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPO_ROOT
from tests.pipeline.samples import encode, noise_image, write_files, write_prepared

READER = """
import sys
import numpy as np
from pipeline.config_values import apply_overrides
from pipeline.data import SampleFactory, micro_batches, sample_stream
from pipeline.recipes import debug
from pipeline.sources import build_index

overrides = {"data.path": sys.argv[1], "data.global_batch_size": 64, "data.shuffle_window": 128}
config = apply_overrides(debug(), overrides | {"scaling.max_batch_size_per_worker": 64})
index = build_index(config.data.path)
factory, stream = SampleFactory.build(config, index), sample_stream(config, index)
num_bad = 0
for first in range(0, 24, 2):  # tasks of two steps, as `_load_steps` makes them
    micros = [m for step in (first, first + 1) for m in micro_batches(stream, config, step, 0)]
    factory.reader.plan(np.concatenate([micro.rows for micro in micros]).tolist())
    for micro in micros:
        num_bad += int((factory.batch(micro)["bad"] != "").sum())
assert num_bad == 0
# Not getrusage: its peak is inherited from the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(index.num_samples, status["VmHWM"].split()[0])
"""


def peak_kib(path: Path, num_samples: int) -> int:
    """Peak memory of a process that makes 24 steps of 64 samples."""
    command = [sys.executable, "-c", READER, str(path)]
    done = subprocess.run(
        command, cwd=REPO_ROOT, capture_output=True, text=True, check=True, timeout=200
    )
    found, peak = map(int, done.stdout.split())
    assert found == num_samples
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["prepared", "files"])
def test_memory_with_ten_times_the_samples_stays_within_ten_percent(
    kind: str, tmp_path: Path
) -> None:
    """24 x 64 samples of 2,000 and of 20,000: all of the larger set would be 80 MB more."""
    generator = np.random.default_rng(0)
    peaks = []
    for num_samples in (2_000, 20_000):
        folder = tmp_path / str(num_samples)
        if kind == "prepared":
            # 4 kB of the image, so that what is kept of the set can be seen
            image = encode(noise_image(0, (64, 64)), "JPEG")
            images = [image + generator.bytes(4000 - len(image) % 4000) for _ in range(num_samples)]
            write_prepared(folder, images, rows_per_shard=5000, rows_per_group=64)
        else:
            image = encode(noise_image(0, (8, 8)), "JPEG")
            write_files(folder, {f"{i:05d}.jpg": image for i in range(num_samples)})
        peaks.append(peak_kib(folder, num_samples))
    assert peaks[1] < 1.1 * peaks[0], peaks
