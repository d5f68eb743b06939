"""Top-1, top-5 and loss against scikit-learn, chance figures, ties, NaN, and shared samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from torch import Tensor

from pipeline.downstream.accuracy import ClassificationScores
from tests.pipeline.downstream.splitting import merged_keepers


def names(num_classes: int) -> list[str]:
    return [f"class {k}" for k in range(num_classes)]


def scored(logits: Tensor, labels: Tensor) -> ClassificationScores:
    scores = ClassificationScores(names(logits.shape[1]))
    scores.add(logits, labels)
    return scores


@pytest.mark.parametrize("num_classes", [1, 2, 6, 1000])
def test_a_perfect_predictor_scores_exactly_100(num_classes: int):
    labels = torch.arange(num_classes).repeat(3)
    logits = 200.0 * torch.nn.functional.one_hot(labels, num_classes)
    scores = scored(logits, labels)
    result = scores.result()
    assert result.pop("val/loss") < 1e-80
    assert set(result.values()) == {100.0}
    assert ("val/top5" in result) == (num_classes > 5)
    assert set(scores.per_class().values()) == {100.0}
    assert torch.equal(scores.confusion, 3 * torch.eye(num_classes, dtype=torch.int64))


def test_a_constant_predictor_scores_chance():
    labels = torch.arange(40).repeat(2)
    result = scored(torch.full((80, 40), 0.7), labels).result()
    assert result["val/top1"] == 100 / 40 and result["val/top5"] == 500 / 40
    assert result["val/loss"] == pytest.approx(math.log(40), rel=1e-12)  # float64


@pytest.mark.parametrize("num_classes", [3, 6, 50])
def test_figures_agree_with_scikit_learn(num_classes: int):
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(300, num_classes, generator=generator)
    labels = torch.randint(0, num_classes, (300,), generator=generator)
    logits[torch.arange(300), labels] += 1.0
    scores = ClassificationScores(names(num_classes))
    for start in (0, 7, 150):
        end = {0: 7, 7: 150, 150: 300}[start]
        scores.add(logits[start:end], labels[start:end])
    result = scores.result()
    each = np.arange(num_classes)
    truth, given_logits = labels.numpy(), logits.double().numpy()
    top1 = top_k_accuracy_score(truth, given_logits, k=1, labels=each)
    assert result["val/top1"] == pytest.approx(100 * top1, rel=1e-12)
    if num_classes > 5:
        top5 = top_k_accuracy_score(truth, given_logits, k=5, labels=each)
        assert result["val/top5"] == pytest.approx(100 * top5, rel=1e-12)
    loss = log_loss(truth, logits.double().softmax(1).numpy(), labels=each)
    assert result["val/loss"] == pytest.approx(loss, rel=1e-9)  # through probabilities
    confusion = confusion_matrix(truth, given_logits.argmax(1), labels=each)
    np.testing.assert_array_equal(scores.confusion.numpy(), confusion)
    has_samples = confusion.sum(1) > 0
    recall = 100 * confusion.diagonal()[has_samples] / confusion.sum(1)[has_samples]
    np.testing.assert_allclose(list(scores.per_class().values()), recall, rtol=1e-12)


def test_bfloat16_logits_are_scored_as_the_numbers_they_are():
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(64) % 10
    assert scored(logits, labels).result() == scored(logits.double(), labels).result()


def test_a_model_that_diverged_scores_no_more_than_a_constant_one():
    labels = torch.arange(40)
    result = scored(torch.full((40, 40), math.nan), labels).result()
    assert result["val/top1"] == 100 / 40 and result["val/top5"] == 500 / 40
    assert math.isnan(result["val/loss"])
    logits = torch.zeros(1, 10)
    logits[0, 3] = math.nan
    assert scored(logits, torch.tensor([3])).result()["val/top5"] == 0, "NaN ranks last"


def test_infinite_logits_give_an_infinite_loss_and_no_error():
    logits = torch.zeros(2, 6)
    logits[0, 2] = -math.inf
    assert scored(logits, torch.tensor([2, 2])).result()["val/loss"] == math.inf


def test_a_class_without_samples_has_no_accuracy():
    scores = scored(torch.eye(3)[[0, 2]], torch.tensor([0, 2]))
    assert scores.per_class() == {"class 0": 100.0, "class 2": 100.0}


def test_labels_and_logits_that_do_not_fit_the_classes_are_refused():
    scores = ClassificationScores(names(3))
    with pytest.raises(ValueError, match=r"target label 3 is outside the classes"):
        scores.add(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"shape \(2, 4\), not \(2, 3\); give the model num_cl"):
        scores.add(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert scores.result() == {}, "what was refused must not count"


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 40),
    num_workers=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_sharing_samples_between_workers_changes_no_bit(
    num_samples: int, num_workers: int, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    # A wide range of losses, in which any other order of a plain sum would show.
    logits = torch.randn(num_samples, 7, generator=generator) * 10 ** torch.linspace(
        -3, 3, num_samples
    ).view(-1, 1)
    labels = torch.randint(0, 7, (num_samples,), generator=generator)

    def add(keeper: ClassificationScores, batch: list[int]) -> None:
        keeper.add(logits[batch], labels[batch])

    alone = scored(logits, labels)
    for keeper in merged_keepers(
        lambda: ClassificationScores(names(7)), add, list(range(num_samples)), num_workers, seed
    ):
        assert keeper.result() == alone.result()
        assert torch.equal(keeper.confusion, alone.confusion)
