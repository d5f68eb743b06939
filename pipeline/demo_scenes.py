"""Scenes composed of handwritten digits on crops of the demo photographs, exactly annotated.

Train and val share nothing: val has the right quarters of the photographs and the held-out digits.
Surprising: boxes and masks are those of the *visible* part of a digit; a later one hides what lies
under it, and one that would hide too much of another is put elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.demo_digits import DIGIT_NAMES, Digits, load_digits, write_once

_CROP_SIDES = (64, 96)  # pixels; 96 is the narrowest strip that demo_data holds out
_LEAST_VISIBLE = 0.6  # of a digit that others lie on
_TRIES = 20
_INK = 0.5  # opacity from which a pixel belongs to a digit
_GAIN = 1.2  # of opacity: scans of pencil strokes are not all black
_LIGHT, _DARK = (190, 256), (0, 66)


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSettings:
    """How many scenes there are and what is in one."""

    image_size: int = 160
    """Side of a scene in pixels."""
    num_train: int = 200
    """Scenes for training."""
    num_val: int = 60
    """Held-out scenes."""
    num_digits: tuple[int, int] = (1, 4)
    """Fewest and most digits of a scene; where there is no room, fewer than drawn."""
    digit_size: tuple[int, int] = (24, 64)
    """Smallest and largest side of a digit in pixels."""
    one_class: bool = False
    """Annotate every digit as "digit": the annotations no longer say which."""
    seed: int = 0
    """Scene i of a split is a function of (seed, split, i)."""

    def __post_init__(self) -> None:
        for key in ("num_digits", "digit_size"):
            low, high = getattr(self, key)
            if not 1 <= low <= high:
                raise ValueError(f"{key}={(low, high)} must satisfy 1 <= fewest <= most")
        if self.digit_size[1] > self.image_size:
            raise ValueError(
                f"digit_size={self.digit_size} is larger than image_size={self.image_size}; lower "
                "the one or raise the other"
            )
        for key in ("num_train", "num_val"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the objects; index masks have the background before them."""
        return ("digit",) if self.one_class else DIGIT_NAMES


class Scene(NamedTuple):
    """One image and its annotations."""

    image: NDArray[np.uint8]
    """(S, S, 3) RGB."""
    labels: list[int]
    """Class of each object in the order they were laid: the digit, or 0 if all are one class."""
    masks: list[NDArray[np.bool_]]
    """(S, S) visible pixels of each object; no two overlap."""

    @property
    def index_mask(self) -> NDArray[np.uint8]:
        """(S, S) 0 on the background, label + 1 on an object."""
        ids = np.zeros(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            ids[mask] = label + 1
        return ids


def write_digit_scenes(
    folder: str | Path, photos: str | Path, settings: SceneSettings | None = None
) -> Path:
    """Write scenes as COCO and as image + mask pairs; returns the folder.

    `train/` and `val/` each hold `images/00000.jpg`, `masks/00000.png` (index masks) and
    `instances.json` (boxes and compressed run lengths). Does nothing where the same was written
    before.

    Args:
        folder: to write; new, or written by the same call.
        photos: what `write_demo_photos` wrote.
        settings: None for the defaults.

    Raises:
        FileNotFoundError: no photographs in `photos`.
        ValueError: a folder with something else in it.
    """
    settings = settings or SceneSettings()

    def write(folder: Path) -> None:
        digits = load_digits("sklearn")
        for split, num_scenes in (("train", settings.num_train), ("val", settings.num_val)):
            backgrounds = _read_photos(Path(photos) / split)
            part = digits.part(is_held_out=split == "val")
            scenes = [
                compose_scene(
                    backgrounds,
                    part,
                    np.random.default_rng([settings.seed, split == "val", i]),
                    settings,
                )
                for i in range(num_scenes)
            ]
            _write_split(folder / split, scenes, settings.class_names)

    return write_once(Path(folder), {"what": "scenes", **dataclasses.asdict(settings)}, write)


def compose_scene(
    backgrounds: list[Image.Image],
    digits: Digits,
    generator: np.random.Generator,
    settings: SceneSettings,
) -> Scene:
    """A random crop of one of the photographs with digits laid on it, one after another."""
    size = settings.image_size
    scene = Scene(_background(backgrounds, generator, size), [], [])
    areas: list[int] = []
    for _ in range(generator.integers(settings.num_digits[0], settings.num_digits[1] + 1)):
        number = generator.integers(len(digits.images))
        side = int(generator.integers(settings.digit_size[0], settings.digit_size[1] + 1))
        opacity = _opacity(digits.images[number], side)
        place = _find_place(scene, areas, opacity >= _INK, generator)
        if place is None:
            continue
        ink = np.zeros((size, size), np.float32)
        ink[place[0] : place[0] + side, place[1] : place[1] + side] = opacity
        visible = ink >= _INK
        _paint(scene.image, ink, _colour(scene.image[visible], generator))
        for mask in scene.masks:
            mask &= ~visible
        scene.labels.append(0 if settings.one_class else int(digits.labels[number]))
        scene.masks.append(visible)
        areas.append(int(visible.sum()))
    return scene


def _background(
    photos: list[Image.Image], generator: np.random.Generator, size: int
) -> NDArray[np.uint8]:
    """A square crop, (size, size, 3). Crops have the same range of sides in both splits."""
    photo = photos[generator.integers(len(photos))]
    side = int(generator.integers(_CROP_SIDES[0], min(*photo.size, _CROP_SIDES[1]) + 1))
    left = int(generator.integers(photo.width - side + 1))
    upper = int(generator.integers(photo.height - side + 1))
    crop = photo.crop((left, upper, left + side, upper + side))
    return np.array(crop.resize((size, size), Image.Resampling.BICUBIC))


def _opacity(digit: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """(side, side) in [0, 1]; strokes opaque, their edges soft."""
    large = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(large, np.float32) / 255 * _GAIN, 0, 1)


def _find_place(
    scene: Scene, areas: list[int], shape: NDArray[np.bool_], generator: np.random.Generator
) -> tuple[int, int] | None:
    """Row and column at which enough of every other digit stays visible; None after some tries."""
    side, room = len(shape), len(scene.image) - len(shape) + 1
    for _ in range(_TRIES):
        row, column = generator.integers(room, size=2).tolist()
        window = (slice(row, row + side), slice(column, column + side))
        left = [mask.sum() - (mask[window] & shape).sum() for mask in scene.masks]
        if all(n >= _LEAST_VISIBLE * area for n, area in zip(left, areas, strict=True)):
            return row, column
    return None


def _colour(under: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.int64]:
    """(3,) grey or coloured, light where the pixels under it (N, 3) are dark and dark on light."""
    levels = _LIGHT if under.mean() < 128 else _DARK
    is_grey = generator.random() < 0.5
    return np.broadcast_to(generator.integers(*levels, size=1 if is_grey else 3), 3)


def _paint(image: NDArray[np.uint8], ink: NDArray[np.float32], colour: NDArray[np.int64]) -> None:
    """Mix a colour (3,) into an image (S, S, 3) with opacity ink (S, S), in place."""
    mixed = image * (1 - ink[..., None]) + colour * ink[..., None]
    image[...] = np.round(mixed).astype(np.uint8)


def _read_photos(folder: Path) -> list[Image.Image]:
    photos = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]
    if not photos:
        raise FileNotFoundError(
            f"no photograph in {folder}; write_demo_photos('{folder.parent}') puts them there"
        )
    return photos


def _write_split(folder: Path, scenes: list[Scene], names: tuple[str, ...]) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(folder / "images" / f"{i:05d}.jpg", quality=95)
        Image.fromarray(scene.index_mask).save(folder / "masks" / f"{i:05d}.png")
    (folder / "instances.json").write_text(json.dumps(coco_annotations(scenes, names)))


def coco_annotations(scenes: list[Scene], names: tuple[str, ...]) -> dict[str, Any]:
    """Content of a COCO file; scene i is the image i + 1, the label c the category c + 1."""
    annotations: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label + 1,
                    "bbox": coco_mask.toBbox(runs).tolist(),
                    "area": int(coco_mask.area(runs)),
                    "iscrowd": 0,
                    "segmentation": {**runs, "counts": runs["counts"].decode()},
                }
            )
    images = [
        {"id": i + 1, "file_name": f"{i:05d}.jpg", "width": side, "height": side}
        for i, side in enumerate(len(scene.image) for scene in scenes)
    ]
    categories = [{"id": c + 1, "name": name} for c, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}
