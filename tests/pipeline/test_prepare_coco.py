"""COCO files against pycocotools, and the rule for each thing that can be wrong in one."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.prepare.coco import Annotations, parse_annotations, scale_annotations
from pipeline.prepare.job import prepare
from pipeline.prepare.report import prepare_report
from pipeline.prepare.run_lengths import decode_runs, resize_nearest
from pipeline.prepare.settings import PrepareConfig
from pipeline.quarantine import read_quarantine
from tests.pipeline.preparing import no_ray, prepare_rows, read_manifest
from tests.pipeline.samples import encode, noise_image

pytestmark = pytest.mark.usefixtures(no_ray.__name__)
WIDTH, HEIGHT = 60, 40
CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "ant"}, {"id": 7, "name": "bee"}]
SQUARE = [10.0, 10, 30, 10, 30, 25, 10, 25]


def box(**values: Any) -> dict[str, Any]:
    defaults = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 15], "iscrowd": 0}
    return defaults | values


def write_coco(folder: Path, annotations: list[dict[str, Any]] | None, **values: Any) -> Path:
    """Three images, numbered 1 to 3; returns the annotation file."""
    (folder / "images").mkdir(parents=True)
    images = []
    for i in (1, 2, 3):
        (folder / f"images/{i}.png").write_bytes(encode(noise_image(i, (WIDTH, HEIGHT))))
        images.append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
    data: dict[str, Any] = {"images": images, "categories": CATEGORIES, "info": {}}
    if annotations is not None:
        data["annotations"] = annotations
    path = folder / "instances.json"
    path.write_text(json.dumps(data | values))
    return path


def prepare_coco(path: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    rows = prepare_rows(path, path.parent / "out", images=str(path.parent / "images"), **settings)
    return {row["name"]: row for row in rows}


def counts_of(path: Path) -> dict[str, int]:
    counts: dict[str, int] = read_manifest(path.parent / "out/train").preparation["counts"]
    return counts


def random_annotations(num: int) -> list[dict[str, Any]]:
    """Polygons (one or two parts), run lengths as lists, and compressed ones."""
    generator = np.random.default_rng(0)
    annotations = []
    for i in range(num):
        corners = generator.uniform(0, [WIDTH, HEIGHT], (2, 5, 2))
        segmentation: Any = [part.ravel().round(2).tolist() for part in corners[: 1 + i % 2]]
        if i % 3 == 2:
            pixels = np.asfortranarray(generator.random((HEIGHT, WIDTH)) < 0.3, dtype=np.uint8)
            compressed = coco_mask.encode(pixels)["counts"].decode()
            runs: Any = compressed if i % 2 else decode_runs(compressed.encode())
            segmentation = {"size": [HEIGHT, WIDTH], "counts": runs}
        low, high = corners.min((0, 1)), corners.max((0, 1))
        bbox = [*low.tolist(), *(high - low).tolist()]
        values = {"segmentation": segmentation, "bbox": bbox, "iscrowd": int(i % 3 == 2)}
        values |= {"category_id": (3, 7, 90)[i % 3], "image_id": 1 + i % 2, "area": 1.0}
        annotations.append(box(id=i + 1, **values))
    return annotations


def test_boxes_masks_and_classes_agree_with_pycocotools(tmp_path: Path):
    path = write_coco(tmp_path, random_annotations(24))
    rows = prepare_coco(path)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    names = {category["id"]: category["name"] for category in CATEGORIES}
    classes = read_manifest(tmp_path / "out/train").classes
    assert classes == ["ant", "bee", "zebra"], "in the order of ids 3, 7, 90"
    num_masks = 0
    for image_id in coco.getImgIds():
        row = rows[f"{image_id}.png"]
        expected = coco.loadAnns(coco.getAnnIds(image_id))
        assert len(expected) == len(row["boxes"]) == len(row["box_masks"])
        assert row["image"] == (path.parent / f"images/{image_id}.png").read_bytes()
        for i, annotation in enumerate(expected):
            x, y, w, h = annotation["bbox"]
            assert row["boxes"][i] == pytest.approx([x, y, x + w, y + h], abs=1e-4)  # float32
            assert classes[row["box_labels"][i]] == names[annotation["category_id"]]
            assert row["box_is_crowd"][i] == bool(annotation["iscrowd"])
            stored = {"size": [HEIGHT, WIDTH], "counts": row["box_masks"][i]}
            assert coco_mask.area(stored) == coco_mask.area(coco.annToRLE(annotation))
            assert (coco_mask.decode(stored) == coco.annToMask(annotation)).all()
            num_masks += 1
    assert num_masks == 24
    assert read_manifest(tmp_path / "out/train").annotations == ["boxes", "box_masks"]


def test_an_image_without_annotations_is_kept_with_no_boxes(tmp_path: Path):
    rows = prepare_coco(write_coco(tmp_path, [box(segmentation=[SQUARE])]))
    assert rows["3.png"]["boxes"] == rows["3.png"]["box_labels"] == rows["3.png"]["box_masks"] == []


def test_a_file_without_annotations_gives_null_boxes_and_one_without_masks_null_masks(
    tmp_path: Path,
):
    rows = prepare_coco(write_coco(tmp_path / "images-only", None))
    assert {row["boxes"] for row in rows.values()} == {None}
    assert read_manifest(tmp_path / "images-only/out/train").annotations == []
    rows = prepare_coco(write_coco(tmp_path / "boxes-only", [box()]))
    assert rows["1.png"]["boxes"] == [[10, 10, 30, 25]] and rows["1.png"]["box_masks"] is None


@pytest.mark.parametrize(
    ("bbox", "kept", "counted"),
    [
        ([-5, -5, 20, 15], [0, 0, 15, 10], "boxes_clipped"),
        ([50, 30, 20, 20], [50, 30, 60, 40], "boxes_clipped"),
        ([60, 10, 5, 5], None, "boxes_dropped_outside"),
        ([10, 45, 5, 5], None, "boxes_dropped_outside"),
        ([-9, 0, 9, 5], None, "boxes_dropped_outside"),
        ([10, 10, 0, 5], None, "boxes_dropped_empty"),
        ([10, 10, 5, -1], None, "boxes_dropped_empty"),
        ([10, 10, float("nan"), 5], None, "boxes_dropped_malformed"),
        ([10, 10, 5], None, "boxes_dropped_malformed"),
        (None, None, "boxes_dropped_malformed"),
    ],
)
def test_boxes_are_clipped_or_dropped_and_counted(
    tmp_path: Path, bbox: Any, kept: list[float] | None, counted: str
):
    path = write_coco(tmp_path, [box(bbox=bbox, segmentation=[SQUARE]), box(id=2, image_id=2)])
    row = prepare_coco(path)["1.png"]
    assert row["boxes"] == ([kept] if kept else [])
    assert len(row["box_masks"]) == len(row["box_labels"]) == len(row["boxes"])
    assert counts_of(path) == {counted: 1}


@pytest.mark.parametrize(
    ("segmentation", "has_mask", "counted"),
    [
        ([SQUARE, [1, 2, 3, 4]], True, {"polygons_dropped": 1}),
        ([[1, 2, 3, 4]], False, {"polygons_dropped": 1, "masks_dropped": 1}),
        ([[1, 2, 3, 4, 5, 6, 7]], False, {"polygons_dropped": 1, "masks_dropped": 1}),
        ([[1e9, 2, 3, 4, 5, 6]], False, {"polygons_dropped": 1, "masks_dropped": 1}),
        ([[1, "x", 3, 4, 5, 6]], False, {"polygons_dropped": 1, "masks_dropped": 1}),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, False, {"masks_dropped": 1}),
        ({"size": [HEIGHT, WIDTH], "counts": [2405, -5]}, False, {"masks_dropped": 1}),
        ({"size": [WIDTH, HEIGHT], "counts": [2400]}, False, {"masks_dropped": 1}),
        ({"size": [HEIGHT, WIDTH], "counts": "o0"}, False, {"masks_dropped": 1}),
        ({"size": [HEIGHT, WIDTH], "counts": "~~~"}, False, {"masks_dropped": 1}),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, False, {"masks_dropped": 1}),
        ([], False, {}),
    ],
)
def test_a_mask_that_makes_no_sense_is_dropped_and_its_box_kept(
    tmp_path: Path, segmentation: Any, has_mask: bool, counted: dict[str, int]
):
    good = box(id=2, image_id=2, segmentation=[SQUARE])
    path = write_coco(tmp_path, [box(segmentation=segmentation), good])
    row = prepare_coco(path)["1.png"]
    assert row["boxes"] == [[10, 10, 30, 25]]
    (mask,) = row["box_masks"]
    assert counts_of(path) == counted
    if not has_mask:
        assert mask is None
    else:
        assert coco_mask.area({"size": [HEIGHT, WIDTH], "counts": mask}) == 20 * 15


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (box(image_id=77), "annotation 1 has image_id=77, which is not among the 3"),
        (box(category_id=4), "annotation 1 has category_id=4, which is not among the 3"),
        (box(segments_info=[]), "panoptic"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, annotation: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        prepare_coco(write_coco(tmp_path, [annotation]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": []}, "lists no images"),
        ({"images": [{"id": 1}]}, "no COCO file"),
        ({"images": [{"id": 1, "file_name": "1.png"}] * 2}, "image id 1 is given twice"),
        ({"categories": CATEGORIES * 2}, "category id 90 is given twice"),
        (
            {"images": [{"id": i, "file_name": "1.png"} for i in (1, 2)]},
            "two samples have the same id",
        ),
    ],
)
def test_other_broken_files_are_refused(tmp_path: Path, values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        prepare_coco(write_coco(tmp_path, [], **values))


def test_a_file_that_is_no_json_or_comes_without_images_is_refused(tmp_path: Path):
    path = write_coco(tmp_path, [])
    with pytest.raises(ValueError, match="--images DIR"):
        prepare_rows(path, tmp_path / "out")
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"instances\.json is no COCO file"):
        prepare_coco(path)


def test_an_image_that_is_listed_but_missing_is_set_aside(tmp_path: Path):
    path = write_coco(tmp_path, [box()])
    (tmp_path / "images/2.png").unlink()
    (tmp_path / "images/unlisted.png").write_bytes(b"")
    assert sorted(prepare_coco(path)) == ["1.png", "3.png"]
    (bad,) = read_quarantine(f"{tmp_path}/out/train/_quarantine.parquet")
    assert bad.path == f"{tmp_path}/images/2.png" and bad.error == "FileNotFoundError"


@pytest.mark.parametrize(
    ("size", "orientation", "message"),
    [
        ((WIDTH, HEIGHT), 6, "for 60x40 pixels, the image has 40x60 (rotated by its EXIF tag)"),
        ((WIDTH, 50), 1, "for 60x40 pixels, the image has 60x50"),
        ((HEIGHT, WIDTH), 6, None),  # the file has the size of the rotated image: fine
    ],
)
def test_annotations_of_another_frame_set_the_image_aside(
    tmp_path: Path, size: tuple[int, int], orientation: int, message: str | None
):
    path = write_coco(tmp_path, [box()])
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images/1.png").write_bytes(encode(noise_image(1, size), "JPEG", exif=exif))
    rows = prepare_coco(path)
    bad = read_quarantine(f"{tmp_path}/out/train/_quarantine.parquet")
    assert len(rows) == (2 if message else 3)
    assert [message in sample.message for sample in bad] == ([True] if message else [])


def test_shrinking_takes_boxes_and_masks_along(tmp_path: Path):
    path = write_coco(tmp_path, [box(segmentation=[SQUARE]), box(id=2, image_id=2)])
    row = prepare_coco(path, short_side=20)["1.png"]
    assert (row["width"], row["height"]) == (30, 20)
    assert row["boxes"] == [[5, 5, 15, 12.5]]
    mask = coco_mask.decode({"size": [20, 30], "counts": row["box_masks"][0]})
    whole = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([SQUARE], HEIGHT, WIDTH)))
    assert (mask == resize_nearest(whole, (30, 20))).all()
    assert mask.sum() == pytest.approx(300 / 4, rel=0.1)


def test_a_shrunk_box_keeps_its_place_where_the_sides_round_differently():
    found = Annotations([[0.0, 0, 61, 40], [6.1, 4, 30.5, 10]], [0, 0], None, [False] * 2)
    scaled = scale_annotations(found, (61, 40), (30, 20))
    assert scaled.boxes == [pytest.approx([0, 0, 30, 20]), pytest.approx([3, 2, 15, 5])]
    assert scaled.masks is None


def test_what_was_dropped_is_in_the_report(tmp_path: Path):
    path = write_coco(tmp_path, [box(bbox=[0, 0, 0, 0]), box(id=2, bbox=[-1, 0, 5, 5])])
    config = PrepareConfig(
        source=str(path), images=str(tmp_path / "images"), out=str(tmp_path / "out")
    )
    report = prepare_report(config, prepare(config))
    assert "boxes dropped empty: 1" in report and "boxes clipped: 1" in report


def test_annotations_without_a_size_are_taken_for_the_images_own():
    text = json.dumps({"size": [None, None], "boxes": [[0, [1, 1, 2, 2], False, None]]})
    found = parse_annotations(text[:-1] + ', "has_masks": true}', 10, 10, Counter())
    assert found.boxes == [[1, 1, 3, 3]] and found.masks == [None]
