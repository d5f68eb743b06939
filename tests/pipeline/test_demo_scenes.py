"""Composed scenes: exact annotations, occlusion, and nothing shared between train and val."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline import demo_scenes
from pipeline.demo_digits import Digits, load_digits
from pipeline.demo_scenes import Scene, SceneSettings, compose_scene, write_digit_scenes
from tests.pipeline.preparing import contents

SETTINGS = SceneSettings(num_train=12, num_val=6, num_digits=(2, 5))
RED, BLUE = (200, 30, 30), (30, 30, 200)


def write_photos(folder: Path) -> Path:
    """One plain photograph a split: red for train, blue for val."""
    for split, colour in (("train", RED), ("val", BLUE)):
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (120, 100), colour).save(folder / split / "plain.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def written(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", photos, SETTINGS)


def compose(seed: int, digits: Digits, settings: SceneSettings) -> Scene:
    background = Image.new("RGB", (100, 100), (128, 128, 128))
    return compose_scene([background], digits, np.random.default_rng(seed), settings)


def annotations_by_image(coco: COCO) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    return [(image, coco.imgToAnns[image["id"]]) for image in coco.dataset["images"]]


@pytest.mark.parametrize("split, num_scenes", [("train", 12), ("val", 6)])
def test_boxes_and_run_lengths_are_those_of_the_index_mask(
    written: Path, split: str, num_scenes: int
):
    folder = written / split
    coco = COCO(folder / "instances.json")
    assert len(coco.dataset["images"]) == num_scenes
    for image, objects in annotations_by_image(coco):
        with Image.open(folder / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (160, 160)
        ids = np.asarray(Image.open(folder / "masks" / f"{Path(image['file_name']).stem}.png"))
        covered = np.zeros_like(ids)
        assert objects, "every scene has a digit"
        for annotation in objects:
            mask = coco.annToMask(annotation).astype(bool)
            assert (ids[mask] == annotation["category_id"]).all()
            assert not covered[mask].any(), "objects do not overlap"
            covered[mask] = 1
            rows, columns = np.nonzero(mask)
            size = [columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()]
            assert annotation["bbox"] == [columns.min(), rows.min(), *size]
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
        assert (covered.astype(bool) == (ids > 0)).all()


def test_categories_are_the_ten_digits_one_below_their_index(written: Path):
    categories = json.loads((written / "val" / "instances.json").read_text())["categories"]
    assert categories == [{"id": d + 1, "name": str(d)} for d in range(10)]


def test_one_class_leaves_everything_but_the_labels_as_it_is(
    written: Path, photos: Path, tmp_path: Path
):
    settings = dataclasses.replace(SETTINGS, one_class=True)
    of_one_class = write_digit_scenes(tmp_path / "scenes", photos, settings) / "val"
    ten, one = (COCO(f / "instances.json").dataset for f in (written / "val", of_one_class))
    assert one["categories"] == [{"id": 1, "name": "digit"}]
    assert {a["category_id"] for a in one["annotations"]} == {1}
    assert len({a["category_id"] for a in ten["annotations"]}) > 1
    for kind in ("bbox", "segmentation"):
        assert [a[kind] for a in one["annotations"]] == [a[kind] for a in ten["annotations"]]
    for path in (written / "val" / "masks").iterdir():
        ids, is_digit = (
            np.asarray(Image.open(f / path.name)) for f in (path.parent, of_one_class / "masks")
        )
        assert np.array_equal(is_digit, ids > 0)
        images = (f / "images" / f"{path.stem}.jpg" for f in (written / "val", of_one_class))
        assert len({image.read_bytes() for image in images}) == 1


def test_a_digit_is_painted_where_its_mask_is_and_nowhere_else():
    digits, settings = load_digits(), SceneSettings(num_digits=(1, 1))
    for seed in range(8):
        scene = compose(seed, digits, settings)
        changed = np.abs(scene.image.astype(int) - 128).max(axis=2)
        (mask,) = scene.masks
        # Ink is at least half opaque and 62 levels or more from the grey under it.
        assert changed[mask].min() >= 30
        box = np.argwhere(mask)
        far = np.ones_like(mask)
        # Soft edges reach beyond the mask, at most by a pixel of the 8 x 8 digit: 64 / 8.
        far[max(0, box[:, 0].min() - 8) : box[:, 0].max() + 9] = False
        assert not changed[far].any()


def test_a_digit_hides_what_lies_under_it_but_never_most_of_it():
    one = Digits(load_digits().images[:1], np.array([0]), np.array([False]))
    settings = SceneSettings(image_size=64, num_digits=(6, 6), digit_size=(32, 32))
    whole = compose(0, one, SceneSettings(image_size=64, num_digits=(1, 1), digit_size=(32, 32)))
    area = whole.masks[0].sum()
    areas = [mask.sum() for seed in range(10) for mask in compose(seed, one, settings).masks]
    assert min(areas) < area, "six of them in a small scene must overlap"
    assert min(areas) >= 0.6 * area and max(areas) == area


def test_train_and_val_share_neither_photograph_nor_digit(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = load_digits()
    marked = real._replace(labels=np.where(real.is_held_out, 7, 3))
    monkeypatch.setattr(demo_scenes, "load_digits", lambda source: marked)
    folder = write_digit_scenes(tmp_path / "scenes", photos, SETTINGS)
    for split, colour, digit in (("train", RED, 3), ("val", BLUE, 7)):
        coco = COCO(folder / split / "instances.json")
        assert {a["category_id"] for a in coco.dataset["annotations"]} == {digit + 1}
        for path in (folder / split / "images").iterdir():
            pixels = np.asarray(Image.open(path)).reshape(-1, 3)
            # The median is background; JPEG moves a plain colour by a level or two.
            assert np.abs(np.median(pixels, axis=0) - colour).max() <= 3


def test_scenes_are_a_function_of_the_seed(written: Path, photos: Path, tmp_path: Path):
    again = write_digit_scenes(tmp_path / "again", photos, SETTINGS)
    assert contents(again) == contents(written)
    digits = load_digits()
    first, second = (compose(seed, digits, SETTINGS) for seed in (0, 1))
    assert not np.array_equal(first.index_mask, second.index_mask)


def test_more_scenes_leave_the_first_ones_as_they_are(written: Path, photos: Path, tmp_path: Path):
    more = SceneSettings(num_train=14, num_val=6, num_digits=(2, 5))
    folder = write_digit_scenes(tmp_path / "more", photos, more)
    old, new = contents(written / "train" / "images"), contents(folder / "train" / "images")
    assert len(new) == 14 and {name: new[name] for name in old} == old


def test_the_number_and_the_size_of_digits_stay_in_their_ranges():
    digits = load_digits()
    settings = SceneSettings(image_size=160, num_digits=(1, 3), digit_size=(24, 32))
    scenes = [compose(seed, digits, settings) for seed in range(40)]
    assert {len(scene.masks) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        for mask in scene.masks:
            assert (np.ptp(np.argwhere(mask), axis=0) + 1).max() <= 32


@pytest.mark.parametrize(
    "values, message",
    [
        ({"digit_size": (24, 200)}, "larger than image_size=160"),
        ({"num_digits": (0, 2)}, r"num_digits=\(0, 2\) must satisfy"),
        ({"digit_size": (30, 20)}, r"digit_size=\(30, 20\) must satisfy"),
        ({"num_val": 0}, "num_val=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SceneSettings(**values)


def test_absent_photographs_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no photograph in .*train; write_demo_photos"):
        write_digit_scenes(tmp_path / "scenes", tmp_path / "nowhere", SETTINGS)
