"""mIoU, mean and pixel accuracy against scikit-learn, chance figures, and shared samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from torch import Tensor

from pipeline.downstream.mean_iou import SegmentationScores
from tests.pipeline.downstream.splitting import merged_keepers


def names(num_classes: int) -> list[str]:
    return [f"class {k}" for k in range(num_classes)]


def scored(predicted: Tensor, target: Tensor, num_classes: int) -> SegmentationScores:
    scores = SegmentationScores(names(num_classes))
    scores.add(predicted, target)
    return scores


def random_maps(seed: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """A target with a tenth ignored, and a prediction right at about half of its pixels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, num_classes, (13, 17), generator=generator)
    noise = torch.randint(0, num_classes, (13, 17), generator=generator)
    is_right = torch.rand(13, 17, generator=generator) < 0.5
    predicted = torch.where(is_right, target, noise)
    target[torch.rand(13, 17, generator=generator) < 0.1] = 255
    return predicted, target


@pytest.mark.parametrize("num_classes", [1, 2, 7, 255])
def test_a_perfect_predictor_scores_exactly_100(num_classes: int):
    _, target = random_maps(0, num_classes)
    scores = scored(torch.where(target == 255, 0, target), target, num_classes)
    assert scores.result() == {"val/miou": 100.0, "val/macc": 100.0, "val/pixel_acc": 100.0}
    assert set(scores.per_class().values()) == {100.0}


def test_a_constant_predictor_scores_chance():
    target = torch.arange(4).repeat_interleave(10).view(4, 10)
    # IoU 1/4 of the one class, 0 of the three others.
    expected = {"val/miou": 100 / 16, "val/macc": 25.0, "val/pixel_acc": 25.0}
    assert scored(torch.zeros_like(target), target, 4).result() == expected


@pytest.mark.parametrize("num_classes", [2, 9])
def test_figures_agree_with_scikit_learn(num_classes: int):
    scores = SegmentationScores(names(num_classes))
    maps = [random_maps(seed, num_classes) for seed in range(5)]
    for predicted, target in maps:
        scores.add(predicted, target)
    pairs = [(p[t != 255].numpy(), t[t != 255].numpy()) for p, t in maps]
    predicted, target = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    result = scores.result()
    iou = 100 * jaccard_score(target, predicted, average=None)
    np.testing.assert_allclose(list(scores.per_class().values()), iou, rtol=1e-12)
    assert result["val/miou"] == pytest.approx(iou.mean(), rel=1e-12)
    macc = 100 * balanced_accuracy_score(target, predicted)
    assert result["val/macc"] == pytest.approx(macc, rel=1e-12)
    accuracy = 100 * accuracy_score(target, predicted)
    assert result["val/pixel_acc"] == pytest.approx(accuracy, rel=1e-12)


def test_classes_count_in_the_means_as_in_mmsegmentation():
    # Classes 0 and 1 are in the truth, 2 is only predicted, 3 is nowhere.
    scores = scored(torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1]]), 4)
    assert scores.per_class() == {"class 0": 100.0, "class 1": 50.0, "class 2": 0.0}
    assert scores.result() == {"val/miou": 50.0, "val/macc": 75.0, "val/pixel_acc": 75.0}


def test_predictions_at_ignored_pixels_count_nowhere():
    target = torch.tensor([[0, 1, 255, 255]], dtype=torch.uint8)
    scores = scored(torch.tensor([[0, 1, 2, 0]]), target, 3)
    assert scores.result()["val/miou"] == 100.0
    assert "class 2" not in scores.per_class()
    assert scored(torch.zeros(2, 2).long(), torch.full((2, 2), 255), 3).result() == {}


def test_labels_outside_the_classes_are_refused():
    scores = SegmentationScores(names(3))
    inside, outside = torch.tensor([[0, 1]]), torch.tensor([[0, 3]])
    with pytest.raises(ValueError, match=r"target label 3 is outside the classes"):
        scores.add(inside, outside)
    with pytest.raises(ValueError, match=r"predicted label 3 is outside the classes"):
        scores.add(outside, inside)
    assert scores.result() == {}, "what was refused must not count"
    with pytest.raises(ValueError, match="256 classes, but label 255 is for ignored pixels"):
        SegmentationScores(names(256))


def test_a_state_stays_what_it_was_when_more_is_added():
    scores = scored(torch.tensor([[0]]), torch.tensor([[0]]), 2)
    state = scores.state()
    scores.add(torch.tensor([[1]]), torch.tensor([[0]]))
    assert int(state["confusion"].sum()) == 1


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 12),
    num_workers=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_sharing_samples_between_workers_changes_no_bit(
    num_samples: int, num_workers: int, seed: int
):
    maps = [random_maps(seed + i, 5) for i in range(num_samples)]

    def add(keeper: SegmentationScores, batch: list[tuple[Tensor, Tensor]]) -> None:
        predicted, target = (torch.stack(each) for each in zip(*batch, strict=True))
        keeper.add(predicted, target)

    alone = SegmentationScores(names(5))
    for predicted, target in maps:
        alone.add(predicted, target)
    for keeper in merged_keepers(
        lambda: SegmentationScores(names(5)), add, maps, num_workers, seed
    ):
        assert keeper.result() == alone.result()
        assert keeper.per_class() == alone.per_class()
