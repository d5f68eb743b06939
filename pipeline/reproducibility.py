"""Randomness and provenance.

Everything random about a sample is a function of (seed, epoch, sample id): a counter-based
generator (Philox) is keyed by them, so neither the worker count nor a restart can change a crop or
a mask.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

Stream = Literal["order", "crop", "mask", "used"]
_STREAMS: dict[Stream, int] = {"order": 0, "crop": 1, "mask": 2, "used": 3}
EVAL_EPOCH = 2**40
"""First epoch number of evaluation crops; training never gets there."""


def sample_generator(seed: int, epoch: int, sample_id: int, stream: Stream) -> np.random.Generator:
    """Generator for one use of one sample in one epoch.

    Args:
        seed: seed of the run.
        epoch: pass over the data, from 0.
        sample_id: stable 64-bit id of the sample (any number for "order" and "used").
        stream: what the numbers are for; streams never share numbers.
    """
    # The counter's low words count the draws; its high words tell epochs and streams apart.
    # uint64 arrays, because numpy makes a list with an id of 2**63 or more a float and loses bits.
    counter = np.array([0, 0, _STREAMS[stream], epoch], dtype=np.uint64)
    key = np.array([seed, sample_id], dtype=np.uint64)
    philox = np.random.Philox(_Key(key), counter=counter)  # type: ignore[arg-type]
    return np.random.Generator(philox)


class _Key(ISeedSequence):
    """A Philox key in the clothes of a seed sequence.

    `Philox(key=...)` sets the same key, but first gathers entropy from the system that it then
    throws away, which made two generators a sample cost 5 % of decoding it.
    """

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[np.uint64]:
        """The key, whatever is asked for; Philox asks for two 64-bit words."""
        return self.key


def stable_id(text: str) -> int:
    """64-bit id of a name, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def git_commit(root: Path) -> str:
    """Commit of the checkout, with '-dirty' for local changes; 'unknown' outside a repository."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Host, platform and the versions that decide results."""
    packages = (
        *("torch", "torchvision", "timm", "ray", "mlflow", "numpy", "pillow", "pyarrow"),
        *("simplejpeg", "cykooz.resizer"),
    )
    facts = {"host": socket.gethostname(), "python": platform.python_version()}
    facts["platform"] = platform.platform()
    for package in packages:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "absent"
    return facts
