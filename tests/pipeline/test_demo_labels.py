"""The demo's three labelled sets, as fine-tuning finds them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.demo_labels import DEMO_SCENES, prepare_demo_labels
from pipeline.demo_scenes import SceneSettings
from pipeline.sources import build_index
from tests.pipeline.preparing import read_manifest, read_rows

SCENES = SceneSettings(num_train=10, num_val=5, image_size=96, digit_size=(24, 48))
DIGITS = [str(d) for d in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo-data")
    was_running = ray.is_initialized()
    sets = prepare_demo_labels(folder, labels_per_class=2, scenes=SCENES)
    assert sets == {t: folder / t for t in ("digits", "scenes-detect", "scenes-segment")}
    assert ray.is_initialized() == was_running, "no Ray is started for it"
    return folder


@pytest.mark.parametrize(
    "task, counts, annotations, classes",
    [
        ("digits", (20, 597), ["label"], DIGITS),
        ("scenes-detect", (10, 5), ["boxes", "box_masks"], DIGITS),
        ("scenes-segment", (10, 5), ["mask"], ["background", *DIGITS]),
    ],
)
def test_each_set_opens_with_its_counts_annotations_and_classes(
    folder: Path, task: str, counts: tuple[int, int], annotations: list[str], classes: list[str]
):
    for split, count in zip(("train", "val"), counts, strict=True):
        manifest = read_manifest(folder / task / split)
        assert (manifest.num_samples, manifest.annotations) == (count, annotations)
        assert manifest.classes == classes and manifest.preparation["num_bad"] == 0
        index = build_index(str(folder / task / split))
        assert index.num_samples == count and list(index.classes) == classes


def test_the_demo_itself_asks_for_digits_of_one_class(tmp_path: Path):
    scenes = dataclasses.replace(DEMO_SCENES, num_train=2, num_val=1)
    prepare_demo_labels(tmp_path, labels_per_class=1, scenes=scenes)
    assert read_manifest(tmp_path / "scenes-detect" / "train").classes == ["digit"]
    assert read_manifest(tmp_path / "scenes-segment" / "val").classes == ["background", "digit"]
    rows = read_rows(tmp_path / "scenes-segment" / "train")
    assert {*np.unique(np.asarray(Image.open(io.BytesIO(rows[0]["mask"]))))} == {0, 1}


def test_labels_are_the_digits_of_the_folders(folder: Path):
    rows = read_rows(folder / "digits" / "train")
    assert all(str(row["label"]) == row["name"].split("/")[0] for row in rows)
    assert sorted(row["label"] for row in rows) == sorted([*range(10), *range(10)])


def test_boxes_and_masks_of_both_scene_sets_agree_pixel_by_pixel(folder: Path):
    ids = {
        row["name"]: np.asarray(Image.open(io.BytesIO(row["mask"])))
        for row in read_rows(folder / "scenes-segment" / "val")
    }
    rows = read_rows(folder / "scenes-detect" / "val")
    assert {row["name"] for row in rows} == set(ids) and len(rows) == 5
    for row in rows:
        from_boxes = np.zeros((96, 96), np.uint8)
        for label, runs, box in zip(row["box_labels"], row["box_masks"], row["boxes"], strict=True):
            mask = coco_mask.decode({"size": [96, 96], "counts": runs}).astype(bool)
            from_boxes[mask] = label + 1  # 0 is the background
            columns = np.flatnonzero(mask.any(axis=0))
            assert (box[0], box[2]) == (columns[0], columns[-1] + 1)
        assert np.array_equal(from_boxes, ids[row["name"]])


def test_a_second_call_writes_nothing(folder: Path):
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    prepare_demo_labels(folder, labels_per_class=2, scenes=SCENES)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == times


def test_a_call_that_was_cut_off_is_completed(folder: Path):
    manifest = folder / "scenes-segment" / "val" / "_manifest.json"
    whole = manifest.read_bytes()
    (folder / "scenes-segment" / "val" / "shard-00000.parquet").unlink()
    manifest.unlink()
    prepare_demo_labels(folder, labels_per_class=2, scenes=SCENES)
    assert manifest.read_bytes() == whole


def test_other_settings_in_the_same_folder_are_refused(folder: Path):
    with pytest.raises(ValueError, match="'labels_per_class': 2"):
        prepare_demo_labels(folder, labels_per_class=3, scenes=SCENES)
