"""What all score keepers share: labels are checked, classes of one name are kept apart."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.downstream.accuracy import ClassificationScores
from pipeline.downstream.coco_ap import CocoScores
from pipeline.downstream.mean_iou import SegmentationScores
from pipeline.downstream.scores import Scores, by_class, check_labels, count_pairs


def keepers() -> list[Scores]:
    classes = ["a", "b"]
    return [
        ClassificationScores(classes),
        SegmentationScores(classes),
        CocoScores(classes, with_masks=True),
    ]


@pytest.mark.parametrize("index", range(3))
def test_of_no_samples_every_figure_is_left_out(index: int):
    keeper = keepers()[index]
    assert keeper.result() == {}
    keeper.merge([keepers()[index].state() for _ in range(3)])
    assert keeper.result() == {}


@pytest.mark.parametrize("label", [-1, 5, 255])
def test_a_label_outside_the_classes_is_named_with_the_rule(label: int):
    rule = rf"target label {label} is outside the classes: labels of 5 classes are 0 \.\.\. 4"
    with pytest.raises(ValueError, match=rule):
        check_labels(torch.tensor([[0, 4], [label, 1]]), 0, 4, "target")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type_up_to_both_ends_of_the_range_pass(dtype: torch.dtype):
    check_labels(torch.tensor([0, 4], dtype=dtype), 0, 4, "target")
    check_labels(torch.tensor([]), 0, 4, "target")


def test_pairs_are_counted_with_the_truth_in_rows():
    true, predicted = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 0, 0])
    expected = torch.tensor([[1, 1, 0], [0, 0, 0], [2, 0, 1]])
    assert torch.equal(count_pairs(true, predicted, 3), expected)
    small = count_pairs(true.to(torch.uint8), predicted.to(torch.uint8), 3)
    assert torch.equal(small, expected)
    many = torch.tensor([254], dtype=torch.uint8)
    assert count_pairs(many, many, 255)[254, 254] == 1, "uint8 labels overflow"


def test_classes_of_one_name_are_kept_apart_and_undefined_ones_left_out():
    values = [1.0, 2.0, math.nan, 4.0]
    expected = {"crane (0)": 1.0, "dog": 2.0, "crane (3)": 4.0}
    assert by_class(["crane", "dog", "cat", "crane"], values) == expected
