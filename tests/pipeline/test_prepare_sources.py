"""Folders, class folders and pairs: what is taken for what, and what is wrong in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.prepare.job import prepare
from pipeline.prepare.record_sources import detect_kind, open_source
from pipeline.prepare.settings import PrepareConfig
from pipeline.quarantine import read_quarantine
from tests.pipeline.preparing import image_bytes, no_ray, prepare_rows, read_manifest
from tests.pipeline.samples import encode, noise_image, write_images

pytestmark = pytest.mark.usefixtures(no_ray.__name__)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jpg", "b.png"], "folder"),
        (["a.jpg", "sub/b.png"], "folder"),
        (["one/a.jpg", "one/b.jpg"], "folder"),
        (["x/y/a.jpg", "x/z/b.jpg"], "folder"),
        (["cat/a.jpg", "dog/b.jpg", "README.md"], "class-folders"),
        (["images/training/a.jpg", "annotations/training/a.png"], "pairs"),
        (["images/a.jpg", "annotations/a.png"], "pairs"),
        (["0.tar", "1.tar", "index.txt"], "webdataset"),
        (["data/train-0.parquet", "README.md"], "parquet"),
    ],
)
def test_kinds_are_told_apart_by_names(names: list[str], kind: str):
    assert detect_kind("root", [(name, 1) for name in sorted(names)]) == kind


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a.jpg", "val/b.jpg"], r"named like splits \(train, val\)"),
        (["train/cat/a.jpg", "test/cat/b.jpg"], "named like splits"),
        (["cat/a.jpg", "dog/b.jpg", "loose.jpg"], r"'loose\.jpg' beside them"),
        (["a.jpg", "b.parquet"], r"ambiguous.*b\.parquet.*a\.jpg.*--kind"),
        (["a.tar", "b.parquet"], "ambiguous"),
    ],
)
def test_what_can_be_read_in_two_ways_is_not_guessed(names: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        detect_kind("root", [(name, 1) for name in sorted(names)])


def test_class_folders_are_numbered_by_name_and_empty_ones_count(tmp_path: Path):
    write_images(tmp_path / "in", ["zebra/1.png", "ant/1.png", "ant/deep/2.png", "mole/3.png"])
    (tmp_path / "in" / "bee").mkdir()
    (tmp_path / "in" / ".git").mkdir()
    rows = prepare_rows(tmp_path / "in", tmp_path / "out", kind="class-folders")
    assert read_manifest(tmp_path / "out/train").classes == ["ant", "bee", "mole", "zebra"]
    labels = {row["name"]: row["label"] for row in rows}
    assert labels == {"ant/1.png": 0, "ant/deep/2.png": 0, "mole/3.png": 2, "zebra/1.png": 3}


def test_an_image_beside_class_folders_is_named(tmp_path: Path):
    write_images(tmp_path / "in", ["cat/1.png", "dog/1.png", "loose.png"])
    with pytest.raises(ValueError, match=r"loose\.png.* --kind folder"):
        prepare_rows(tmp_path / "in", tmp_path / "out", kind="class-folders")
    rows = prepare_rows(tmp_path / "in", tmp_path / "out", kind="folder")
    assert {row["label"] for row in rows} == {None}
    assert read_manifest(tmp_path / "out/train").classes == []


def test_splits_prepared_by_two_calls_must_agree_on_their_classes(tmp_path: Path):
    write_images(tmp_path / "train", ["cat/1.png", "dog/1.png", "eel/1.png"])
    write_images(tmp_path / "val", ["cat/1.png", "eel/1.png"])
    prepare_rows(tmp_path / "train", tmp_path / "out")
    with pytest.raises(ValueError, match=r"only in one: dog"):
        prepare_rows(tmp_path / "val", tmp_path / "out", split_name="val")
    (tmp_path / "val/dog").mkdir()
    rows = prepare_rows(tmp_path / "val", tmp_path / "out", split_name="val")
    assert {row["name"]: row["label"] for row in rows}["eel/1.png"] == 2


def test_the_kind_the_count_and_the_classes_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_images(tmp_path / "in", ["cat/1.png", "dog/1.png"])
    (tmp_path / "in/notes.txt").write_text("")
    with caplog.at_level("INFO", logger="pipeline"):
        prepare_rows(tmp_path / "in", tmp_path / "out")
    assert "class-folders with 2 images, 2 classes: cat, dog" in caplog.text
    assert "--kind folder" in caplog.text and "1 .txt" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "does not exist"), ("empty", "holds no image among 0 files"), ("a.zip", "no known")],
)
def test_sources_with_nothing_in_them_are_refused(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_rows(tmp_path / name, tmp_path / "out")


def test_a_uri_is_read_and_written_like_a_path(tmp_path: Path):
    write_images(tmp_path / "in", ["cat/1.png", "dog/1.png"])
    config = PrepareConfig(source=f"file://{tmp_path}/in", out=f"file://{tmp_path}/out")
    prepare(config)
    assert read_manifest(tmp_path / "out/train").num_samples == 2
    assert prepare(config).was_finished


def mask_png(ids: np.ndarray, mode: str = "L") -> bytes:
    image = Image.fromarray(ids)
    if mode == "P":
        image = Image.fromarray(ids, "P")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return encode(image.convert(mode) if mode in ("RGB", "1") else image)


def write_pairs(root: Path, folder: str, masks: dict[str, bytes]) -> None:
    for seed, (name, mask) in enumerate(masks.items()):
        image = root / "images" / folder / f"{name}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(image_bytes(seed, (40, 32), "JPEG"))
        path = root / "annotations" / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if mask:
            path.write_bytes(mask)


IDS = np.random.default_rng(0).integers(0, 7, (32, 40), dtype=np.uint8)


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_ade_layout_gives_the_split_asked_for_with_mask_bytes_as_they_are(tmp_path: Path):
    palette = mask_png(IDS, "P")
    write_pairs(tmp_path / "ade", "training", {"a": mask_png(IDS), "b": palette})
    write_pairs(tmp_path / "ade", "validation", {"c": mask_png(IDS + np.uint8(250))})
    rows = prepare_rows(tmp_path / "ade", tmp_path / "out")
    masks = {row["name"]: row["mask"] for row in rows}
    assert masks == {"a.jpg": mask_png(IDS), "b.jpg": palette}
    assert (decoded(masks["b.jpg"]) == IDS).all(), "palette indices are the ids, not colours"
    assert read_manifest(tmp_path / "out/train").classes == [str(i) for i in range(7)]
    (row,) = prepare_rows(tmp_path / "ade", tmp_path / "out", split_name="val")
    assert row["name"] == "c.jpg"
    classes = read_manifest(tmp_path / "out/val").classes
    assert len(classes) == 255, "255 is no class but 'ignore'"


def test_a_split_the_layout_does_not_have_is_refused(tmp_path: Path):
    write_pairs(tmp_path / "ade", "training", {"a": mask_png(IDS)})
    with pytest.raises(ValueError, match=r"no folder for split_name='val', only training"):
        prepare_rows(tmp_path / "ade", tmp_path / "out", split_name="val")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (b"", "no mask for this image"),
        (mask_png(IDS[:16]), "mask has 40x16 pixels, the image 40x32"),
        (mask_png(np.ascontiguousarray(IDS.T)), "mask has 32x40 pixels, the image 40x32"),
        (mask_png(IDS, "RGB"), "colour PNG"),
        (mask_png(IDS)[:60], "no whole PNG"),
        (image_bytes(0, (40, 32), "JPEG"), "no whole PNG"),
    ],
)
def test_a_bad_mask_sets_its_image_aside(tmp_path: Path, mask: bytes, message: str):
    write_pairs(tmp_path, "x", {"good": mask_png(IDS), "bad": mask})
    config = PrepareConfig(
        images=f"{tmp_path}/images/x", masks=f"{tmp_path}/annotations/x", out=f"{tmp_path}/out"
    )
    prepare(config)
    (sample,) = read_quarantine(f"{tmp_path}/out/train/_quarantine.parquet")
    assert sample.path.endswith("x/bad.jpg") and message in sample.message


def test_black_and_white_masks_become_ids_0_and_1(tmp_path: Path):
    write_pairs(tmp_path, "x", {"a": mask_png((IDS > 3).astype(np.uint8) * 255, "1")})
    (row,) = prepare_rows(
        "", tmp_path / "out", images=f"{tmp_path}/images/x", masks=f"{tmp_path}/annotations/x"
    )
    assert (decoded(row["mask"]) == (IDS > 3)).all() and decoded(row["mask"]).dtype == np.uint8


def test_shrinking_takes_the_mask_along_without_new_ids(tmp_path: Path):
    coarse = np.kron(np.array([[1, 9], [200, 255]], dtype=np.uint8), np.ones((50, 60), np.uint8))
    (tmp_path / "i").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "i/a.png").write_bytes(image_bytes(0, (120, 100)))
    (tmp_path / "m/a.png").write_bytes(mask_png(coarse))
    (row,) = prepare_rows(
        "",
        tmp_path / "out",
        images=f"{tmp_path}/i",
        masks=f"{tmp_path}/m",
        short_side=50,
    )
    assert (row["width"], row["height"]) == (60, 50)
    assert (decoded(row["mask"]) == coarse[::2, ::2]).all()
    with Image.open(io.BytesIO(row["image"])) as image:
        assert (image.format, image.size) == ("JPEG", (60, 50))


def test_small_images_are_neither_enlarged_nor_encoded_again(tmp_path: Path):
    write_images(tmp_path / "in", ["a.png"])
    (row,) = prepare_rows(tmp_path / "in", tmp_path / "out", short_side=64)
    assert row["image"] == (tmp_path / "in/a.png").read_bytes()


@pytest.mark.parametrize("verify", [True, False])
def test_width_and_height_are_those_after_exif_rotation(tmp_path: Path, verify: bool):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    encoded = encode(noise_image(0, (40, 32)), "JPEG", exif=exif)
    (tmp_path / "in/a.jpg").write_bytes(encoded)
    (row,) = prepare_rows(tmp_path / "in", tmp_path / "out", verify=verify)
    assert (row["width"], row["height"]) == (32, 40)
    assert row["image"] == encoded
    (row,) = prepare_rows(tmp_path / "in", tmp_path / "small", verify=verify, short_side=16)
    with Image.open(io.BytesIO(row["image"])) as image:
        assert image.size == (row["width"], row["height"]) == (16, 20)
        assert image.getexif().get(0x0112) is None, "rotated once, not twice"


def test_without_verify_a_truncated_image_passes_and_with_it_does_not(tmp_path: Path):
    write_images(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "in/a.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:400])
    assert len(prepare_rows(tmp_path / "in", tmp_path / "fast", verify=False)) == 2
    assert len(prepare_rows(tmp_path / "in", tmp_path / "out")) == 1


def test_masks_without_an_image_are_said(tmp_path: Path):
    write_pairs(tmp_path, "x", {"a": mask_png(IDS), "b": mask_png(IDS)})
    (tmp_path / "images/x/b.jpg").unlink()
    settings: dict[str, Any] = {"images": f"{tmp_path}/images/x", "out": "o"}
    source = open_source(PrepareConfig(masks=f"{tmp_path}/annotations/x", **settings))
    assert any("1 masks have no image, such as b.png" in note for note in source.notes)
    with pytest.raises(ValueError, match="folder of their own"):
        open_source(PrepareConfig(masks=f"{tmp_path}/images/x", **settings))
