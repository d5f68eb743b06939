"""Predicting whole data sets: the same as asking the model, in order, and readable by anyone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.batch_inference import open_images
from pipeline.decoding import decode_image
from pipeline.downstream.finetuned import load_finetuned
from pipeline.finetune_config import Task
from pipeline.inference_actor import InferenceActor
from pipeline.predict import PredictConfig, Predictor, overlay_rows, predict
from pipeline.prediction_rows import above, drawn, prediction_row
from pipeline.quarantine import TooManyBadSamplesError, read_quarantine
from tests.pipeline.downstream.tiny_tasks import CLASSES
from tests.pipeline.inference_runs import (
    SIZES,
    finetuned_run,
    finished,
    image_folder,
    read_rows,
)
from tests.pipeline.samples import encode, noise_image, write_parquet, write_prepared

TASKS: tuple[Task, ...] = ("classify", "detect", "segment")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("predict") / "images")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: finetuned_run(root / name, name) for name in TASKS}


def config(run: Path, images: Path, out: Path, **settings: Any) -> PredictConfig:
    return PredictConfig(
        run=str(run), images=str(images), out=str(out), **{"min_score": 0.0, **settings}
    )


def good_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.png"))


def asked_directly(run: Path, paths: list[Path]) -> list[dict[str, Any]]:
    """The model's own answers, one image at a time."""
    finetuned = load_finetuned(run)
    images = [np.ascontiguousarray(decode_image(path.read_bytes())) for path in paths]
    cpu = torch.device("cpu")
    return [finetuned.task.predict(finetuned.model, [image], cpu)[0] for image in images]


def assert_same(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """A row of a table holds a prediction."""
    for key in ("scores", "score", "boxes"):
        if key in expected:
            # Batches of other sizes sum in another order.
            np.testing.assert_allclose(row[key], expected[key], rtol=1e-4, atol=1e-4)
    if "label" in expected:
        assert row["label"] == expected["label"]
        assert row["class_name"] == CLASSES[expected["label"]]
    if "labels" in expected:
        assert row["labels"] == expected["labels"].tolist()
        assert row["class_names"] == [CLASSES[label] for label in row["labels"]]
        sizes = [mask["size"] for mask in row["masks"]]
        assert sizes == [[row["height"], row["width"]]] * len(row["labels"])
        assert [mask["counts"] for mask in row["masks"]] == expected["masks"]
    if "mask" in expected:
        np.testing.assert_array_equal(png_ids(row["mask"]), expected["mask"])


def png_ids(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("name", TASKS)
def test_predictions_are_those_of_the_model_in_the_order_of_the_images(
    name: Task, runs: dict[str, Path], folder: Path, tmp_path: Path
):
    inferred = predict(
        config(runs[name], folder, tmp_path / "out", batch_size=3, overlays=0), with_ray=False
    )
    rows, paths = read_rows(tmp_path / "out"), good_paths(folder)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert inferred.num_rows == len(rows) == len(SIZES)
    for row, expected in zip(rows, asked_directly(runs[name], paths), strict=True):
        assert_same(row, expected)
    sizes = {Path(row["path"]).stem: (row["width"], row["height"]) for row in rows}
    turned = {i: size[::-1] if i == 1 else size for i, size in enumerate(SIZES)}
    assert sizes == {str(i): size for i, size in turned.items()}, "EXIF rotation is applied"


@pytest.mark.parametrize("name", TASKS)
def test_the_batch_size_changes_nothing(
    name: Task, runs: dict[str, Path], folder: Path, tmp_path: Path
):
    for size in (1, 100):
        out = tmp_path / str(size)
        predict(config(runs[name], folder, out, batch_size=size, overlays=0), with_ray=False)
    rows, others = read_rows(tmp_path / "1"), read_rows(tmp_path / "100")
    for row, other in zip(rows, others, strict=True):
        for key in ("scores", "boxes"):
            np.testing.assert_allclose(row.pop(key, 0), other.pop(key, 0), rtol=1e-4, atol=1e-4)
        assert row.pop("score", 0.0) == pytest.approx(other.pop("score", 0.0), abs=1e-4)
        assert row == other


def test_a_bad_image_in_the_middle_is_listed_and_the_others_are_predicted(
    runs: dict[str, Path], folder: Path, tmp_path: Path
):
    inferred = predict(config(runs["classify"], folder, tmp_path / "out"), with_ray=False)
    (bad,) = read_quarantine(str(tmp_path / "out/_quarantine.parquet"))
    assert bad.path == str(folder / "3_bad.jpg") and bad.error == "UnidentifiedImageError"
    assert inferred.bad == [bad] and "3_bad.jpg" in inferred.report()
    facts = finished(tmp_path / "out")
    assert (facts["num_rows"], facts["num_bad"]) == (len(SIZES), 1)
    assert facts["classes"] == list(CLASSES) and facts["task"] == "classify"


def test_too_many_bad_images_end_the_job_with_what_there_is_and_unfinished(
    runs: dict[str, Path], tmp_path: Path
):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        content = b"broken" if i in (2, 4) else encode(noise_image(i))
        (images / f"{i}.png").write_bytes(content)
    wanted = config(runs["classify"], images, tmp_path / "out", batch_size=1)
    with pytest.raises(TooManyBadSamplesError, match="2 of 6 samples are bad") as caught:
        predict(wanted, with_ray=False)
    assert "counts as unfinished" in str(caught.value)
    assert [row["path"][-5:] for row in read_rows(tmp_path / "out")] == ["0.png", "1.png", "3.png"]
    assert len(read_quarantine(str(tmp_path / "out/_quarantine.parquet"))) == 2
    assert not (tmp_path / "out/_finished.json").exists()

    for i in (2, 4):
        (images / f"{i}.png").write_bytes(encode(noise_image(i)))
    assert predict(wanted, with_ray=False).num_rows == 6
    assert not (tmp_path / "out/_quarantine.parquet").exists(), "the old one is gone"


def test_a_finished_output_is_refused_and_stays_as_it_is(
    runs: dict[str, Path], folder: Path, tmp_path: Path
):
    wanted = config(runs["classify"], folder, tmp_path / "out", overlays=0)
    predict(wanted, with_ray=False)
    before = read_rows(tmp_path / "out")
    with pytest.raises(ValueError, match="never overwritten"):
        predict(wanted, with_ray=False)
    assert read_rows(tmp_path / "out") == before


def test_an_output_among_the_images_is_refused(runs: dict[str, Path], folder: Path):
    with pytest.raises(ValueError, match="lies among the images"):
        predict(config(runs["classify"], folder, folder / "out"), with_ray=False)


def test_one_file_parquet_and_a_prepared_set_are_predicted_alike(
    runs: dict[str, Path], tmp_path: Path
):
    images = [encode(noise_image(i)) for i in range(3)]
    (tmp_path / "one.png").write_bytes(images[0])
    write_parquet(tmp_path / "parquet/x.parquet", list(images), as_struct=True)
    write_prepared(tmp_path / "prepared", images, rows_per_shard=2)
    rows = {}
    for name in ("one.png", "parquet", "prepared"):
        out = tmp_path / f"out-{name}"
        predict(config(runs["classify"], tmp_path / name, out, batch_size=1), with_ray=False)
        rows[name] = read_rows(out)
    assert [len(found) for found in rows.values()] == [1, 3, 3]
    scores = [[row["scores"] for row in found] for found in rows.values()]
    assert scores[0] == scores[1][:1] and scores[1] == scores[2]
    assert [row["name"] for row in rows["prepared"]] == ["sample-0", "sample-1", "sample-2"]
    assert "name" not in rows["parquet"][0]
    assert rows["prepared"][2]["path"].endswith("shard-00001.parquet:0:0")


def test_a_column_that_does_not_exist_is_named_at_once(runs: dict[str, Path], tmp_path: Path):
    write_parquet(tmp_path / "images/x.parquet", [encode(noise_image(0))])
    wanted = config(runs["classify"], tmp_path / "images", tmp_path / "out", image_column="jpg")
    with pytest.raises(ValueError, match=r"image_column='jpg' is not in .* columns are .*image"):
        predict(wanted, with_ray=False)
    assert not (tmp_path / "out").exists()


def test_storage_that_fails_is_no_bad_image(
    runs: dict[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = config(runs["classify"], folder, tmp_path / "out")
    actor = InferenceActor(Predictor(load_finetuned(runs["classify"])), open_images(wanted), wanted)

    def fail(row: int) -> None:
        raise OSError("the network is gone")

    monkeypatch.setattr(actor.reader, "read", fail)
    (table,) = actor({"first": np.array([0]), "last": np.array([3])})
    assert table["_failure"].to_pylist() == ["OSError: the network is gone"]
    assert table["_bad"].null_count == 1


def test_masks_of_a_row_decode_with_pycocotools_to_what_the_picture_shows():
    image = np.full((60, 80, 3), 40, np.uint8)
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 12:50, 10:40] = masks[1, 5:30, 45:75] = True
    counts = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))["counts"] for m in masks]
    prediction = {
        "boxes": np.array([(10, 12, 40, 50), (45, 5, 75, 30)], np.float32),
        "labels": np.array([0, 1]),
        "scores": np.array([0.9, 0.2], np.float32),
        "masks": counts,
    }
    row = prediction_row(prediction, (60, 80), CLASSES)
    decoded = [coco_mask.decode(mask).astype(bool) for mask in row["masks"]]
    np.testing.assert_array_equal(decoded, masks)

    picture = drawn(image, prediction, CLASSES)
    changed, union = (picture != image).any(2), decoded[0] | decoded[1]
    frames = np.zeros_like(union)
    for x0, y0, x1, y1 in prediction["boxes"].astype(int):
        frames[y0 : y1 + 1, [x0, x1]] = frames[[y0, y1], x0 : x1 + 1] = True
    np.testing.assert_array_equal(changed[20:], (union | frames)[20:])  # names are above row 20

    sure = above(prediction, 0.5)
    assert len(sure["labels"]) == len(sure["masks"]) == 1
    assert not (drawn(image, sure, CLASSES) != image).any(2)[20:, 45:].any()


def test_pictures_are_drawn_of_rows_all_over_the_data_set(
    runs: dict[str, Path], folder: Path, tmp_path: Path
):
    for name in TASKS:
        out = tmp_path / name
        wanted = config(runs[name], folder, out, overlays=3, overlay_min_score=0.0)
        assert predict(wanted, with_ray=False).num_pictures == 2, "one of the three rows is bad"
        pictures = sorted(path.name for path in (out / "_overlays").iterdir())
        assert pictures == ["000000_0.png.jpg", "000007_6.png.jpg"]
        with Image.open(out / "_overlays/000000_0.png.jpg") as file:
            assert file.size == SIZES[0]
    assert overlay_rows(9, 3) == {0, 4, 8}
    assert overlay_rows(3, 10) == overlay_rows(3, -1) == range(3)
    assert overlay_rows(5, 0) == frozenset() and overlay_rows(5, 1) == {0}


def test_objects_below_the_least_score_are_left_out(
    runs: dict[str, Path], folder: Path, tmp_path: Path
):
    all_scores = [
        score for p in asked_directly(runs["detect"], good_paths(folder)) for score in p["scores"]
    ]
    limit = float(np.median(all_scores))
    predict(config(runs["detect"], folder, tmp_path / "out", min_score=limit), with_ray=False)
    kept = [score for row in read_rows(tmp_path / "out") for score in row["scores"]]
    # The limit itself may fall on either side: batches round differently.
    assert 0 < len(kept) < len(all_scores) and min(kept) >= limit


def test_settings_that_cannot_be_meant_are_refused(folder: Path, tmp_path: Path):
    for settings, message in (
        ({"overlays": -2}, "overlays=-2"),
        ({"min_score": 1.5}, "min_score=1.5"),
        ({"num_actors": 0}, "num_actors=0"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, folder, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="out is empty"):
        PredictConfig(run="run", images="images", out="")


def test_a_detector_does_not_remember_the_first_image_it_saw(runs: dict[str, Path]):
    images = [np.asarray(noise_image(i, size)) for i, size in enumerate([(90, 31), (64, 64)])]
    cpu = torch.device("cpu")
    fresh, used = (load_finetuned(runs["detect"]) for _ in range(2))
    used.task.predict(used.model, images[:1], cpu)
    first, second = (f.task.predict(f.model, images[1:], cpu)[0] for f in (fresh, used))
    np.testing.assert_array_equal(first["scores"], second["scores"])


@pytest.mark.ray
@pytest.mark.slow
def test_two_actors_give_the_rows_of_the_model_in_order(
    ray_cluster: str, runs: dict[str, Path], folder: Path, tmp_path: Path
):
    wanted = config(
        runs["detect"], folder, tmp_path / "out", num_actors=2, batch_size=2, overlays=-1
    )
    inferred = predict(wanted)
    rows, paths = read_rows(tmp_path / "out"), good_paths(folder)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row, expected in zip(rows, asked_directly(runs["detect"], paths), strict=True):
        assert_same(row, expected)
    assert len(inferred.bad) == 1 and inferred.num_pictures == len(SIZES)

    with pytest.raises(ValueError, match=r"takes 1 CPU, .* room for 8 of 9"):
        predict(config(runs["detect"], folder, tmp_path / "other", num_actors=9))
