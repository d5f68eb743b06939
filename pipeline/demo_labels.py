"""The labelled data of the fine-tuning demo: three prepared sets, for the three downstream tasks.

Classification: handwritten digits, few of them labelled. Detection and segmentation: the same
scenes of digits on crops of the demo photographs, once as COCO, once as image + mask pairs.
Surprising: they go through what `jobs/prepare_data.py` runs, but without Ray, which would take
longer to start than all of them take to write.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from pyarrow import fs

from pipeline.demo_data import write_demo_photos
from pipeline.demo_digits import write_digits
from pipeline.demo_scenes import SceneSettings, write_digit_scenes
from pipeline.prepare.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.shards import Manifest

DemoTask = Literal["digits", "scenes-detect", "scenes-segment"]
SPLITS = ("train", "val")
DEMO_SCENES = SceneSettings(num_val=40, one_class=True, num_digits=(3, 6), digit_size=(32, 64))
"""Finding digits can be learnt in a minute, telling them apart in a scene cannot."""


def prepare_demo_labels(
    folder: str | Path,
    *,
    labels_per_class: int = 20,
    scenes: SceneSettings | None = None,
    seed: int = 0,
) -> dict[DemoTask, Path]:
    """Write the demo's labelled sets below `folder`; the folder of each, with train/ and val/.

    `folder` also gets the photographs (`write_demo_photos`) and, under sources/, the images that
    the sets are made of. Does nothing where all that is there already.

    Args:
        folder: the demo's data, for example runs/demo-data.
        labels_per_class: labelled digits of each class; 597 are held out.
        scenes: None for DEMO_SCENES.
        seed: chooses the labelled digits.

    Raises:
        ModuleNotFoundError: the demo extra is not installed.
        ValueError: the sets are there with other settings.
    """
    folder = Path(folder)
    scenes = scenes or DEMO_SCENES
    write_demo_photos(folder)
    digits = write_digits(
        folder / "sources" / "digits", labels_per_class=labels_per_class, seed=seed
    )
    composed = write_digit_scenes(folder / "sources" / "scenes", folder, scenes)
    sets: dict[DemoTask, Path] = {
        task: folder / task for task in ("digits", "scenes-detect", "scenes-segment")
    }
    for split in SPLITS:
        part = composed / split
        for config in (
            PrepareConfig(out=str(sets["digits"]), split_name=split, source=str(digits / split)),
            PrepareConfig(
                out=str(sets["scenes-detect"]),
                split_name=split,
                source=str(part / "instances.json"),
                images=str(part / "images"),
            ),
            PrepareConfig(
                out=str(sets["scenes-segment"]),
                split_name=split,
                images=str(part / "images"),
                masks=str(part / "masks"),
            ),
        ):
            prepare(config, with_ray=False)
        _name_classes(sets["scenes-segment"] / split, ("background", *scenes.class_names))
    return sets


def _name_classes(folder: Path, names: tuple[str, ...]) -> None:
    """Give the ids of index masks names; a preparation only knows how many there are."""
    filesystem = fs.LocalFileSystem()
    manifest = Manifest.read(filesystem, str(folder))
    assert manifest is not None, f"{folder} was prepared without a manifest"
    if tuple(manifest.classes) != names:
        dataclasses.replace(manifest, classes=list(names)).write(filesystem, str(folder))
