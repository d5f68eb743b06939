"""Pictures of predictions: layout, colours of right and wrong, cases without anything to draw."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.downstream.overlays import IGNORED_COLOUR, class_colours
from pipeline.downstream.prediction_pictures import (
    classification_picture,
    confusion_picture,
    detection_picture,
    segmentation_picture,
)
from pipeline.picture_grid import GAP, HEADER
from tests.pipeline.downstream.detections import SIZE, prediction_of, target_of

GREEN, RED = (0, 110, 40), (190, 0, 0)
CELL = 30


def read(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def has_colour(pixels: np.ndarray, colour: tuple[int, ...]) -> bool:
    return bool((pixels == np.array(colour)).all(-1).any())


def names(num_classes: int) -> list[str]:
    return [f"class {k}" for k in range(num_classes)]


def matrix_cells(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Colours near a corner of each cell: (rows, columns, 3); the matrix ends at the 10th pixel
    from the lower and, where it is wider than the title, from the right edge."""
    left, top = picture.shape[1] - 10 - columns * CELL, picture.shape[0] - 10 - rows * CELL
    return picture[top + 3 :: CELL, left + 3 :: CELL][:rows, :columns].astype(int)


def test_the_confusion_picture_is_blue_where_right_and_red_where_wrong():
    counts = torch.diag(torch.full((20,), 30))
    counts[4, 7] = 30
    counts[9] = 0
    cells = matrix_cells(read(confusion_picture(counts, names(20))), 20, 20)
    red, blue = cells[..., 0], cells[..., 2]
    is_right, is_wrong = blue > red + 30, red > blue + 30
    expected = np.eye(20, dtype=bool)
    expected[9, 9] = False
    np.testing.assert_array_equal(is_right, expected)
    assert np.argwhere(is_wrong).tolist() == [[4, 7]]
    assert (cells[9] == 255).all(), "a class without samples has an empty row"


def test_of_many_classes_those_with_most_errors_are_shown_and_the_rest_in_one_column():
    counts = torch.diag(torch.full((1000,), 50))
    bad = torch.arange(5, 1000, 35)[:28]
    counts[bad, bad] = 25
    counts[bad, 999] = 25  # which has no errors itself and is not shown
    cells = matrix_cells(read(confusion_picture(counts, names(1000))), 30, 31)
    is_wrong = cells[..., 0] > cells[..., 2] + 30
    assert is_wrong[:, -1].tolist() == [False] * 2 + [True] * 28  # classes 0 and 1 fill up
    assert not is_wrong[:, :-1].any()


@pytest.mark.parametrize("num_classes", [1, 2, 30, 31])
def test_a_confusion_picture_of_nothing_can_be_drawn(num_classes: int):
    empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    assert read(confusion_picture(empty, ["w" * 500] * num_classes)).shape[0] < 1300


def test_right_names_are_green_and_wrong_ones_red_above_the_true_one():
    images = np.full((3, 32, 32, 3), 90, np.uint8)
    drawn = classification_picture(
        images, [("cat", 0.9), ("dog", 0.4), ("cat", float("nan"))], ["cat", "cat", "cat"],
        num_columns=2, tile_px=64,
    )  # fmt: skip
    picture = read(drawn)
    row, column = 64 + 36 + GAP, 64 + GAP
    assert picture.shape == (2 * row + GAP, 2 * column + GAP, 3)
    captions = [
        picture[GAP + y + 64 : GAP + y + 100, GAP + x : GAP + x + 64]
        for y, x in ((0, 0), (0, column), (row, 0))
    ]
    assert [has_colour(c, GREEN) for c in captions] == [True, False, True]
    assert [has_colour(c, RED) for c in captions] == [False, True, False]
    assert [has_colour(c[18:], (0, 0, 0)) for c in captions] == [False, True, False]
    assert (picture[GAP : GAP + 64, GAP : GAP + 64] == 90).all()
    tensors = classification_picture(torch.from_numpy(images[:1]), [("cat", 0.9)], ["cat"])
    assert read(tensors).shape == (160 + 36 + 2 * GAP, 160 + 2 * GAP, 3)


def test_names_are_cut_off_to_the_width_of_a_tile():
    long = "a name much wider than the image it stands under " * 2
    images = np.zeros((2, 8, 8, 3), np.uint8)
    short = read(classification_picture(images, [("x", 1.0)] * 2, ["x"] * 2))
    assert read(classification_picture(images, [(long, 1.0)] * 2, ["x"] * 2)).shape == short.shape


def test_truth_is_left_and_prediction_right_at_the_image_s_scale():
    images = [np.full((*SIZE, 3), 200, np.uint8), np.full((60, 40, 3), 200, np.uint8)]
    truth, found = [10.0, 20.0, 50.0, 60.0], [80.0, 50.0, 140.0, 110.0]
    masks = torch.zeros(1, 1, *SIZE)
    small = prediction_of([], masks=torch.zeros(0, 1, 60, 40))
    picture = read(
        detection_picture(
            images,
            [prediction_of([found], [2], masks=masks), small],
            [target_of([truth], [1], with_masks=False), target_of([])],
            ["cat", "dog"],
            tile_px=320,
        )
    )
    assert picture.shape == (HEADER + 240 + 320 + 3 * GAP, 2 * 320 + 3 * GAP, 3)
    tiles = [picture[HEADER + GAP :, x : x + 320][:240] for x in (GAP, 2 * GAP + 320)]
    cat, dog = (tuple(colour) for colour in class_colours(2))
    assert [has_colour(t, cat) for t in tiles] == [True, False]
    assert [has_colour(t, dog) for t in tiles] == [False, True]
    assert tuple(tiles[0][80, 20]) == cat and tuple(tiles[1][160, 160]) == dog
    assert (picture[HEADER + 2 * GAP + 240 : -GAP, GAP : GAP + 213] == 200).all()


def test_masks_of_truth_and_prediction_are_scaled_with_the_image():
    box = [20.0, 20.0, 80.0, 80.0]
    image = np.full((*SIZE, 3), 200, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        png = detection_picture(
            [image], [prediction_of([box])], [target_of([box])], ["cat"], tile_px=320
        )
    tiles = [read(png)[HEADER + GAP :, x : x + 320] for x in (GAP, 2 * GAP + 320)]
    for tile in tiles:
        assert (tile[60:150, 60:150] != 200).any(-1).all(), "the mask fills its box"
        assert (tile[180:238, 180:318] == 200).all()
    np.testing.assert_array_equal(tiles[0][60:150, 60:150], tiles[1][60:150, 60:150])


def test_segmentation_shows_input_truth_prediction_and_the_names_of_the_colours():
    image = np.full((50, 100, 3), 90, np.uint8)
    target = torch.zeros(50, 100, dtype=torch.uint8)
    target[:, 50:] = 255
    predicted = torch.ones(50, 100, dtype=torch.int64)
    png = segmentation_picture([image], [predicted], [target], ["sky", "road", "car"], tile_px=200)
    picture = read(png)
    sky, road, car = (tuple(colour) for colour in class_colours(3))
    tops = slice(HEADER + GAP, HEADER + GAP + 100)
    tiles = [picture[tops, GAP + i * (200 + GAP) :][:, :200] for i in range(3)]
    assert (tiles[0] == 90).all()
    assert (tiles[1][:, :100] == sky).all() and (tiles[1][:, 100:] == IGNORED_COLOUR).all()
    assert (tiles[2] == road).all()
    legend = picture[HEADER + 2 * GAP + 100 :]
    assert has_colour(legend, sky) and has_colour(legend, road)
    assert has_colour(legend, IGNORED_COLOUR) and not has_colour(legend, car)


def test_a_legend_of_very_many_classes_stays_short():
    labels = torch.arange(150).repeat(40, 1)
    image = np.zeros((40, 150, 3), np.uint8)
    picture = read(segmentation_picture([image], [labels], [labels], names(150)))
    assert picture.shape[0] < 300
