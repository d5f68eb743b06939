"""Probes against scikit-learn, chance figures, and classes nobody trained on."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pipeline.downstream import probes
from pipeline.downstream.accuracy import ClassificationScores
from pipeline.downstream.probes import knn_predict, linear_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Features (count, 64) and labels of 8x8 pictures of digits, the first of 1797."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels[:count]).float(), torch.from_numpy(labels[:count])


def clusters(num_classes: int, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Well separated classes in 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat(per_class)
    centres = 5 * torch.eye(16)[:num_classes]
    return centres[labels] + torch.randn(len(labels), 16, generator=generator) / 5, labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (200, 0.02)])
def test_votes_agree_with_scikit_learn(k: int, temperature: float):
    features, labels = digits(700)
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(features[:500].double().numpy(), labels[:500])
    expected = reference.predict_proba(features[500:].double().numpy())
    votes = knn_predict(
        features[:500], labels[:500], features[500:], num_classes=10, k=k, temperature=temperature
    )
    # A similarity is exact to 2e-7 in float32; the exponent magnifies it by 1 / temperature.
    np.testing.assert_allclose(votes.numpy(), expected, atol=5e-7 / temperature)


def test_chunks_do_not_change_votes(monkeypatch: pytest.MonkeyPatch):
    features, labels = digits(300)
    whole = knn_predict(features[:200], labels[:200], features[200:], num_classes=10)
    monkeypatch.setattr(probes, "_MAX_ELEMENTS", 1000)  # chunks of five samples
    chunked = knn_predict(features[:200], labels[:200], features[200:], num_classes=10)
    # Products of other shapes are summed in another order: 2e-7 of a similarity, times 1 / 0.07.
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    monkeypatch.setattr(probes, "_MAX_ELEMENTS", 1)  # less than one sample: one at a time
    single = knn_predict(features[:200], labels[:200], features[200:], num_classes=10)
    torch.testing.assert_close(single, whole, atol=1e-5, rtol=0)


def test_separated_classes_are_told_apart_without_an_error():
    features, labels = clusters(5, 20)
    others, true = clusters(5, 8, seed=1)
    votes = knn_predict(features, labels, others, num_classes=5)
    assert torch.equal(votes.argmax(1), true)
    torch.testing.assert_close(votes.sum(1), torch.ones(40))
    scores = ClassificationScores(list("abcde"))
    scores.add(votes, true)
    assert scores.result()["val/top1"] == 100.0
    assert linear_probe(features, labels, others, true) == 100.0


def test_features_without_information_score_chance():
    labels = torch.arange(5).repeat(12)
    features = torch.ones(60, 8)
    votes = knn_predict(features, labels, features, num_classes=5, k=60)
    torch.testing.assert_close(votes, torch.full((60, 5), 0.2))
    assert linear_probe(features, labels, features, labels) == 20.0
    uneven = torch.tensor([0] * 10 + [1] * 30)
    assert linear_probe(torch.ones(40, 8), uneven, features, labels) == 20.0  # always class 1


def test_with_fewer_than_k_training_samples_all_of_them_vote():
    features, labels = clusters(2, 2)
    votes = knn_predict(features, labels, features, num_classes=2, k=1000)
    assert torch.equal(votes, knn_predict(features, labels, features, num_classes=2, k=4))
    assert bool((votes > 0).all()), "samples of the other class vote, too"


def test_a_class_absent_from_training_is_never_predicted():
    features, labels = clusters(4, 10)
    is_known = labels != 2
    votes = knn_predict(features[is_known], labels[is_known], features, num_classes=4)
    assert bool((votes[:, 2] == 0).all()) and votes.shape == (40, 4)
    assert linear_probe(features[is_known], labels[is_known], features, labels) == 75.0
    one = labels == 3
    assert linear_probe(features[one], labels[one], features, labels) == 25.0
    assert linear_probe(features[:4], labels[:4], features, labels) > 25.0  # one of each class


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_linear_probe_agrees_with_scikit_learn(monkeypatch: pytest.MonkeyPatch, l2: float):
    features, labels = digits(1000)
    monkeypatch.setattr(probes, "L2_STRENGTHS", (l2,))
    reference = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / (l2 * 600), tol=1e-8, max_iter=10000)
    ).fit(features[:600].double().numpy(), labels[:600])
    expected = 100 * reference.score(features[600:].double().numpy(), labels[600:])
    probed = linear_probe(features[:600], labels[:600], features[600:], labels[600:])
    assert 85 < expected < 98
    assert probed == pytest.approx(expected, abs=1e-9)


def noisy(seed: int) -> tuple[Tensor, Tensor]:
    """Two classes: one telling feature among 60 of pure noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat(60)
    features = torch.randn(120, 61, generator=generator)
    features[:, 0] += 3.0 * labels
    return features, labels


def test_the_penalty_is_chosen_where_it_helps(monkeypatch: pytest.MonkeyPatch):
    strengths = probes.L2_STRENGTHS
    (x, y), (val_x, val_y) = noisy(0), noisy(1)
    chosen = linear_probe(x, y, val_x, val_y)
    monkeypatch.setattr(probes, "L2_STRENGTHS", strengths[-1:])
    assert chosen > linear_probe(x, y, val_x, val_y) + 3, "the weakest is too weak for noise"
    monkeypatch.setattr(probes, "L2_STRENGTHS", strengths)
    features, labels = digits(900)
    chosen = linear_probe(features[:600], labels[:600], features[600:], labels[600:])
    monkeypatch.setattr(probes, "L2_STRENGTHS", strengths[:1])
    strongest = linear_probe(features[:600], labels[:600], features[600:], labels[600:])
    assert chosen > strongest + 1, "the strongest is too strong for digits"


@pytest.mark.parametrize("per_class", [1, 10])
def test_among_penalties_of_equal_accuracy_the_strongest_is_taken(
    caplog: pytest.LogCaptureFixture, per_class: int
):
    features, labels = clusters(5, per_class)  # with one sample a class none is held out
    with caplog.at_level(logging.INFO):
        linear_probe(features, labels, features, labels)
    held_out = {1: 0, 10: 10}[per_class]
    assert f"L2 1; hits among {held_out} held-out training samples" in caplog.text
    assert f"1e-05: {held_out}}}" in caplog.text, "the penalties differ: the test proves nothing"


def test_the_probe_learns_nothing_from_the_validation_samples():
    x, y = noisy(0)
    val_x, val_y = noisy(1)
    right = linear_probe(x, y, val_x, val_y)
    assert linear_probe(x, y, val_x, 1 - val_y) == pytest.approx(100 - right, abs=1e-9)
    halves = [linear_probe(x, y, val_x[i::2], val_y[i::2]) for i in (0, 1)]
    assert sum(halves) / 2 == pytest.approx(right, abs=1e-9)


def test_the_probe_is_the_same_every_time_and_for_any_scale_of_a_feature():
    x, y = noisy(0)
    val_x, val_y = noisy(1)
    right = linear_probe(x, y, val_x, val_y)
    assert linear_probe(x, y, val_x, val_y) == right
    scale, shift = 2.0 ** torch.arange(-30, 31), 4.0
    assert linear_probe((x + shift) * scale, y, (val_x + shift) * scale, val_y) == right


def test_a_feature_that_varies_only_in_validation_breaks_nothing():
    features, labels = clusters(3, 10)
    others = features.clone()
    features[:, 15], others[:, 15] = 1.0, 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear_probe(features, labels, others, labels) == 100.0


def test_what_no_probe_can_use_is_refused():
    features, labels = clusters(3, 4)
    with pytest.raises(ValueError, match="needs training samples; there are none"):
        knn_predict(features[:0], labels[:0], features, num_classes=3)
    with pytest.raises(ValueError, match="needs validation samples; there are none"):
        linear_probe(features, labels, features[:0], labels[:0])
    with pytest.raises(ValueError, match="training label 2 is outside the classes"):
        knn_predict(features, labels, features, num_classes=2)
    with pytest.raises(ValueError, match="k=0 and temperature"):
        knn_predict(features, labels, features, num_classes=3, k=0)
    broken = features.clone()
    broken[3, 3] = float("nan")
    with pytest.raises(ValueError, match="validation features are not finite; the encoder has"):
        knn_predict(features, labels, broken, num_classes=3)
    with pytest.raises(ValueError, match="training features are not finite"):
        linear_probe(broken, labels, features, labels)
