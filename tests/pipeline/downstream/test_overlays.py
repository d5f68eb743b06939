"""Predictions on images: which are drawn, where, in which colours."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from pipeline.downstream.overlays import (
    IGNORED_COLOUR,
    MOST_DRAWN,
    class_colours,
    colour_map,
    overlay_detection,
    overlay_segmentation,
    predicted_objects,
    true_objects,
)
from tests.pipeline.downstream.detections import SIZE, prediction_of, target_of

CLASSES = ["cat", "dog", "cup"]
BOX = [30.0, 40.0, 90.0, 100.0]
NO_MASKS = torch.zeros(1, 1, *SIZE)


def grey_image() -> np.ndarray:
    return np.full((*SIZE, 3), 200, np.uint8)


def test_a_class_has_its_colour_whatever_the_number_of_classes():
    np.testing.assert_array_equal(class_colours(200)[:7], class_colours(7))
    assert len(np.unique(class_colours(255), axis=0)) == 255
    distance = np.abs(class_colours(255).astype(int) - IGNORED_COLOUR).max(1)
    assert distance.min() > 20, "a class looks as if ignored"
    assert class_colours(0).shape == (0, 3)


def test_a_box_is_drawn_at_its_edges_in_its_class_colour():
    drawn = overlay_detection(grey_image(), prediction_of([BOX], [2], masks=NO_MASKS), CLASSES)
    colour = class_colours(2)[1]
    assert drawn.dtype == np.uint8 and drawn.shape == (*SIZE, 3)
    for x, y in ((30, 70), (90, 70), (60, 40), (60, 100)):
        np.testing.assert_array_equal(drawn[y, x], colour, err_msg=f"({x}, {y})")
    assert (drawn[45:95, 35:85] == 200).all(), "the inside stays"
    assert (drawn[105:] == 200).all() and (drawn[:, 130:] == 200).all(), "the outside stays"
    assert (drawn[30:38, 31:60] != 200).any(), "the name is above the box"


def test_a_mask_is_half_transparent_and_only_where_it_is_likelier_than_not():
    masks = torch.zeros(1, 1, *SIZE)
    masks[0, 0, 50:90, 40:80] = 0.51
    masks[0, 0, 50:90, 60:80] = 0.49
    drawn = overlay_detection(grey_image(), prediction_of([BOX], [2], masks=masks), CLASSES)
    assert (drawn[55:85, 62:78] == 200).all()
    inside = drawn[55:85, 42:58].reshape(-1, 3)
    low = np.minimum(class_colours(2)[1], 200)
    high = np.maximum(class_colours(2)[1], 200)
    assert ((low < inside) & (inside < high)).all()


def test_the_best_of_overlapping_predictions_is_on_top():
    found = prediction_of([BOX, BOX], [1, 2], [0.9, 0.5], masks=torch.zeros(2, 1, *SIZE))
    drawn = overlay_detection(grey_image(), found, CLASSES)
    np.testing.assert_array_equal(drawn[70, 30], class_colours(1)[0])


def test_of_many_predictions_the_best_are_drawn():
    scores = [0.5 + number / 100 for number in range(30)]
    found = prediction_of([BOX] * 30, scores=scores[::-1], masks=torch.zeros(30, 1, *SIZE))
    texts = predicted_objects(found, CLASSES, min_score=0.3).texts
    percents = [int(text.split()[-2]) for text in texts]
    assert percents == [round(100 * score) for score in scores[-MOST_DRAWN:]]


def test_what_is_unlikely_or_not_finite_is_not_drawn():
    nan = float("nan")
    found = prediction_of([BOX, [nan, 0, 5, 5], BOX], scores=[0.29, 0.9, nan], masks=NO_MASKS)
    assert (overlay_detection(grey_image(), found, CLASSES) == 200).all()
    drawn = overlay_detection(grey_image(), found, CLASSES, min_score=0.2)
    assert (drawn != 200).any()


def test_an_image_without_predictions_is_returned_as_a_copy():
    image = grey_image()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = overlay_detection(image, prediction_of([]), CLASSES)
    np.testing.assert_array_equal(drawn, image)
    drawn[:] = 0
    assert (image == 200).all()


def test_boxes_beyond_the_image_and_without_area_are_drawn_without_error():
    image = grey_image()
    boxes = [[-50.0, -50.0, 20.0, 20.0], [150, 110, 400, 400], [50, 50, 50, 50], [9, 9, 5, 5]]
    found = prediction_of(boxes, masks=torch.zeros(4, 1, *SIZE))
    assert overlay_detection(image, found, ["a name wider than the whole image " * 3]).shape == (
        *SIZE,
        3,
    )
    tiny = prediction_of([[0.0, 0.0, 1.0, 1.0]], masks=torch.ones(1, 1, 1, 1))
    assert overlay_detection(image[:1, :1], tiny, CLASSES).shape == (1, 1, 3)
    assert (image == 200).all(), "the caller's image stays"


def test_objects_without_masks_and_crowds_are_told():
    target = target_of([BOX, BOX], [1, 3], [False, True])
    target["masks"][1] = None
    objects = true_objects(target, SIZE, CLASSES)
    assert objects.texts == ["cat", "cup (crowd)"]
    assert objects.masks is not None
    assert objects.masks.sum((1, 2)).tolist() == [60 * 60, 0]
    assert true_objects(target_of([BOX], with_masks=False), SIZE, CLASSES).masks is None
    assert true_objects(target_of([]), SIZE, CLASSES).texts == []


def test_labels_get_their_colours_and_what_is_no_class_grey():
    labels = torch.tensor([[0, 1, 255], [2, 3, 0]], dtype=torch.uint8)
    colours = colour_map(labels, 3)
    np.testing.assert_array_equal(colours[0, :2], class_colours(2))
    np.testing.assert_array_equal(colours[1, 0], class_colours(3)[2])
    for pixel in (colours[0, 2], colours[1, 1]):
        np.testing.assert_array_equal(pixel, IGNORED_COLOUR)
    np.testing.assert_array_equal(colour_map(labels.numpy(), 3), colours)


def test_a_segmentation_overlay_keeps_the_image_visible():
    labels = torch.zeros(SIZE, dtype=torch.int64)
    black = overlay_segmentation(np.zeros((*SIZE, 3), np.uint8), labels, CLASSES)
    white = overlay_segmentation(np.full((*SIZE, 3), 255, np.uint8), labels, CLASSES)
    assert white.dtype == np.uint8 and white.shape == (*SIZE, 3)
    assert (white.astype(int) - black > 60).all()
    labels[60:] = 1
    assert (overlay_segmentation(grey_image(), labels, CLASSES)[0] != white[0]).any()
