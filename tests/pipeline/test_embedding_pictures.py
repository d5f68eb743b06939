"""Pictures of features: colours of hand-made maps, and what a run of the job shows."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.embed import EmbedConfig, Embedder, embed, load_embedder
from pipeline.embedding_pictures import (
    evenly_spread,
    index_rows,
    neighbours_picture,
    pca_picture,
    principal_colours,
)
from pipeline.picture_grid import GAP, HEADER
from pipeline.reading import SampleReader
from pipeline.retrieval import Neighbours, VectorFiles, nearest
from pipeline.sources import build_index
from tests.pipeline.inference_runs import SIZES, image_folder, pretrained_run, read_rows

GREY = 128
SIDE = 192  # tiles of crops of 64 pixels
CAPTION = 20
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("embed") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("runs") / "pretrained")[0]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run: Path, folder: Path) -> Path:
    """What the job writes."""
    out = tmp_path_factory.mktemp("job") / "out"
    embed(config(run, folder, out), with_ray=False)
    return out


def config(run: Path, images: Path, out: Path, **settings: Any) -> EmbedConfig:
    return EmbedConfig(run=str(run), images=str(images), out=str(out), **settings)


def two_regions(*halves: str, dim: int = 5, size: int = 4) -> NDArray[np.float32]:
    """Maps (B, 4, 4, 5) with one vector in half of the positions and another in the rest."""
    one, other = np.random.default_rng(0).standard_normal((2, dim))
    is_one = np.zeros((len(halves), size, size, 1), bool)
    for image, half in zip(is_one, halves, strict=True):
        image[: size // 2] |= half == "upper"
        image[:, : size // 2] |= half == "left"
    return np.where(is_one, one, other).astype(np.float32)


def pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)))


def cut(picture: NDArray[np.uint8], row: int, column: int, height: int = SIDE) -> NDArray[np.uint8]:
    """A tile of a picture whose rows are that high."""
    top, left = HEADER + GAP + row * (height + GAP), GAP + column * (SIDE + GAP)
    return picture[top : top + SIDE, left : left + SIDE]


def test_two_regions_have_two_colours_the_same_in_both_images():
    colours = principal_colours(two_regions("upper", "left"))
    assert (colours.shape, colours.dtype) == ((2, 4, 4, 3), np.uint8)
    one, other = colours[0, 0, 0], colours[0, 3, 3]
    assert {int(one[0]), int(other[0])} == {0, 255}, "the component that varies is red"
    assert one[1:].tolist() == other[1:].tolist() == [GREY, GREY], "the others do not vary"
    assert (colours[0, :2] == one).all() and (colours[0, 2:] == other).all()
    assert (colours[1, :, :2] == one).all() and (colours[1, :, 2:] == other).all()


def test_colours_are_the_components_in_their_order_and_sign():
    """Axis-aligned features, so the components are known: 9 of red, 4 of green, 1 of blue."""
    ramp = np.linspace(-1, 1, 9)
    maps = np.zeros((1, 1, 27, 6), np.float32)
    for place, (axis, size) in enumerate([(4, 9), (1, 4), (2, 1)]):
        maps[0, 0, 9 * place : 9 * (place + 1), axis] = size * ramp
    colours = principal_colours(maps)[0, 0].astype(int)
    for place in range(3):
        part = colours[9 * place : 9 * (place + 1), place]
        low, high = np.percentile(maps[..., (4, 1, 2)[place]], [2, 98])
        values = maps[0, 0, 9 * place : 9 * (place + 1), (4, 1, 2)[place]]
        expected = np.clip((values - low) / (high - low), 0, 1) * 255
        np.testing.assert_allclose(part, expected, atol=0.51, err_msg=f"component {place}")
    assert (colours[:9, 1:] == colours[0, 1:]).all()
    for negative in (-maps, maps[:, :, ::-1]):  # the sign is of the component, not of the features
        flipped = principal_colours(np.ascontiguousarray(negative))[0, 0].astype(int)
        mirrored = 255 - colours if negative[0, 0, 0, 4] == 9 else colours[::-1]
        np.testing.assert_allclose(flipped, mirrored, atol=1)


def test_a_few_outliers_do_not_take_the_contrast_of_the_rest():
    maps = two_regions("upper", "left", size=16)
    calm = principal_colours(maps)
    maps[0, 0, :4] *= 3  # 4 of 512 positions, less than 2 %
    loud = principal_colours(maps)
    assert np.ptp(loud[1, :, :, 0].astype(int)) == np.ptp(calm[1, :, :, 0].astype(int)) == 255


@pytest.mark.parametrize("value", [0.0, 5.1, -3e4, np.nan, np.inf])
def test_features_that_do_not_vary_are_grey(value: float):
    maps = np.full((2, 4, 4, 7), value, np.float32)
    assert (principal_colours(maps) == GREY).all()
    assert (principal_colours(maps, cells=2) == GREY).all()
    noise = 1e-7 * np.random.default_rng(0).standard_normal(maps.shape)
    if np.isfinite(value) and value:
        noisy = (maps * (1 + noise)).astype(np.float32)
        assert (principal_colours(noisy) == GREY).all(), "rounding is no feature"


def test_what_is_not_finite_leaves_the_colours_of_the_rest():
    maps = two_regions("upper", "left", size=16)
    expected = principal_colours(maps)
    maps[0, 0, 0] = np.nan
    found = principal_colours(maps)
    np.testing.assert_array_equal(found[1, ..., 0], expected[1, ..., 0])


@pytest.mark.parametrize("dim", [1, 2])
def test_fewer_than_three_features_leave_the_other_colours_grey(dim: int):
    colours = principal_colours(two_regions("upper", dim=dim))
    assert (colours[..., 1:] == GREY).all() and np.ptp(colours[..., 0].astype(int)) == 255


def test_the_place_within_a_token_does_not_show():
    maps = two_regions("upper", "left", size=8)
    lattice = np.random.default_rng(1).standard_normal((2, 2, 5)).astype(np.float32)
    np.testing.assert_array_equal(
        principal_colours(maps + 10 * np.tile(lattice, (4, 4, 1)), cells=2), principal_colours(maps)
    )


def test_tiles_are_the_crops_and_squares_of_one_colour_a_position():
    crops = [np.full((64, 64, 3), value, np.uint8) for value in (10, 200)]
    maps = {"coarse": two_regions("upper", "left"), "fine": two_regions("left", "left", size=16)}
    picture = pixels(pca_picture(crops, maps))
    assert picture.shape == (HEADER + GAP + 2 * (SIDE + GAP), GAP + 3 * (SIDE + GAP), 3)
    for row in range(2):
        assert (cut(picture, row, 0) == crops[row][0, 0]).all()
        for column, (name, features) in enumerate(maps.items(), start=1):
            square = SIDE // features.shape[1]
            colours = principal_colours(features, cells=features.shape[1] // 4)[row]
            expected = colours.repeat(square, 0).repeat(square, 1)
            np.testing.assert_array_equal(cut(picture, row, column), expected, err_msg=name)


def test_neighbours_stand_beside_their_image_with_the_similarity_below():
    crops = {place: np.full((64, 64, 3), 20 * place, np.uint8) for place in (0, 1, 3)}
    found = Neighbours(np.array([[3, 2]]), np.array([[0.5, 0.25]], np.float32))
    picture = pixels(neighbours_picture([1], found, crops))
    assert picture.shape == (HEADER + GAP + SIDE + CAPTION + GAP, GAP + 3 * (SIDE + GAP), 3)
    tiles = [cut(picture, 0, column, SIDE + CAPTION) for column in range(3)]
    assert [int(tile.mean()) for tile in tiles] == [20, 60, 255], "an image that is gone is white"
    captions = picture[-CAPTION - GAP : -GAP]
    lefts = [GAP + column * (SIDE + GAP) for column in range(3)]
    inked = [bool((captions[:, left : left + SIDE] < 128).any()) for left in lefts]
    assert inked == [False, True, True]


@pytest.mark.parametrize(
    ("num_rows", "rows"), [(1, [0]), (3, [0, 1, 2]), (8, [*range(8)]), (15, [*range(0, 15, 2)])]
)
def test_queries_are_spread_evenly(num_rows: int, rows: list[int]):
    assert evenly_spread(num_rows, 8) == rows


def test_images_are_found_by_their_paths_past_the_bad_ones(out: Path, folder: Path):
    reader = SampleReader(build_index(str(folder)))
    rows = index_rows(reader, VectorFiles(str(out), "stage16"), range(len(SIZES)), num_bad=1)
    assert rows == {0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5, 7: 6}
    assert [reader.location(row) for row in rows] == [row["path"] for row in read_rows(out)]
    assert reader.location(4).endswith("3_bad.jpg")


def crops_and_embedder(run: Path, folder: Path, out: Path) -> tuple[list[Any], Embedder]:
    embedder = load_embedder(config(run, folder, out))
    reader = SampleReader(build_index(str(folder)))
    by_path = {reader.location(row): row for row in range(len(reader))}
    rows = [by_path[row["path"]] for row in read_rows(out)]
    return [embedder.load(reader.read(row)) for row in rows], embedder


def test_the_job_shows_the_first_images_and_all_levels(run: Path, folder: Path, out: Path):
    crops, embedder = crops_and_embedder(run, folder, out)
    maps = embedder.maps(crops)
    assert list(maps) == ["pyramid16", "pyramid8", "pyramid4", "stage16"]
    assert [m.shape for m in maps.values()] == [
        *[(7, cells, cells, 16) for cells in (4, 8, 16)],
        (7, 4, 4, 32),
    ]
    for name, values in embedder.vectors(crops).items():
        if name in maps:  # the mean of a map is the vector of the Parquet files
            np.testing.assert_allclose(maps[name].mean((1, 2)), values, rtol=1e-4, atol=1e-5)
    picture = pixels((out / "_pca.png").read_bytes())
    np.testing.assert_array_equal(picture, pixels(pca_picture(crops, maps)))
    for row, crop in enumerate(crops):
        np.testing.assert_array_equal(cut(picture, row, 0)[::3, ::3], crop)


@pytest.mark.parametrize("column", ["stage16", "pyramid4"])
def test_the_job_shows_the_nearest_images_by_the_column_asked_for(
    column: Any, run: Path, folder: Path, out: Path, tmp_path: Path
):
    wanted = config(run, folder, tmp_path / "out", retrieve_by=column, num_neighbours=3)
    inferred = embed(wanted, with_ray=False)
    assert f"at a glance: {wanted.out}/_neighbours.png" in inferred.report()
    crops, _ = crops_and_embedder(run, folder, out)
    vectors = np.array([row[column] for row in read_rows(tmp_path / "out")], np.float32)
    found = nearest(vectors, vectors, 3)
    picture = pixels((tmp_path / "out/_neighbours.png").read_bytes())
    for row, near in enumerate(found.rows):
        for place, image in enumerate([row, *near]):
            tile = cut(picture, row, place, SIDE + CAPTION)
            np.testing.assert_array_equal(tile[::3, ::3], crops[image])


def test_pictures_are_the_same_bytes_every_time(run: Path, folder: Path, out: Path, tmp_path: Path):
    embed(config(run, folder, tmp_path / "again"), with_ray=False)
    for name in ("_pca.png", "_neighbours.png"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_no_pictures_where_none_are_wanted_and_few_where_few_are(
    run: Path, folder: Path, tmp_path: Path
):
    off = config(run, folder, tmp_path / "off", num_pictures=0, num_neighbours=0)
    assert "at a glance" not in embed(off, with_ray=False).report()
    assert not list((tmp_path / "off").glob("*.png"))
    embed(config(run, folder, tmp_path / "two", num_pictures=2), with_ray=False)
    height = HEADER + GAP + 2 * (SIDE + GAP)
    assert pixels((tmp_path / "two/_pca.png").read_bytes()).shape[0] == height
    shutil.copy(folder / "0.png", tmp_path / "alone.png")
    alone = config(run, tmp_path / "alone.png", tmp_path / "one")
    assert embed(alone, with_ray=False).summaries == ("_pca.png",), "one image has no neighbour"


def test_settings_a_picture_has_no_room_for_are_refused(run: Path, folder: Path, tmp_path: Path):
    wanted = config(run, folder, tmp_path)
    for key, value, most in (("num_pictures", 65, 64), ("num_neighbours", -1, 20)):
        message = rf"{key}={value} is not between 0 and {most}.*use 0 for no picture"
        with pytest.raises(ValueError, match=message):
            replace(wanted, **{key: value})
    with pytest.raises(ValueError, match=r"stage32.*stage16"):
        replace(wanted, retrieve_by="stage32")  # type: ignore[arg-type]


def test_a_picture_that_fails_costs_no_row(
    run: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(Embedder, "maps", fail)
    embed(config(run, folder, tmp_path / "out"), with_ray=False)
    assert "pictures left out: OutOfMemoryError: tried to allocate 80 GiB" in caplog.text
    assert pq.read_table(tmp_path / "out").num_rows == len(SIZES)
    assert (tmp_path / "out/_finished.json").exists()


def test_pictures_of_an_unfinished_job_are_done_anew(
    run: Path, folder: Path, out: Path, tmp_path: Path
):
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/_finished.json").rename(tmp_path / "out/_unfinished.json")
    embed(config(run, folder, tmp_path / "out", num_neighbours=0), with_ray=False)
    assert (tmp_path / "out/_pca.png").exists()
    assert not (tmp_path / "out/_neighbours.png").exists()
