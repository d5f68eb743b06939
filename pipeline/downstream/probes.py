"""Probes of frozen features: a weighted nearest-neighbour vote and logistic regression.

Neither trains the encoder, so both say what pre-training alone has put into its features. No random
number is drawn: the same features give the same figure. Surprising: features are standardised for
the linear probe, as masked pre-training needs (arXiv:2111.06377, A.1), but only normalised to
length one for the neighbours.
"""

# N training samples, M samples to predict, D features, K classes

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.downstream.scores import check_labels

_logger = logging.getLogger(__name__)

_MAX_ELEMENTS = 2**25
"""Of one intermediate matrix: 128 MiB of float32."""
L2_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weight penalties the linear probe chooses from: of the mean loss, so scikit-learn's 1 / (C N)."""
_MAX_ITERATIONS = 1000  # as the linear probes of CLIP, arXiv:2103.00020, A.3


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Weighted vote of the k nearest training samples (arXiv:1805.01978, section 3.4).

    A neighbour of cosine similarity s votes for its class with exp(s / temperature); the votes of
    a sample are divided by their sum. With fewer than k training samples all of them vote.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers in 0 ... K-1; a class may have no sample.
        features: (M, D).
        num_classes: K.
        k: how many neighbours vote.
        temperature: the smaller, the more the nearest count.

    Returns:
        (M, K) float32, each row summing to one.

    Raises:
        ValueError: no training samples, labels outside the classes, or features that are not
            finite.
    """
    _check_features(train_features, train_labels, "training")
    check_labels(train_labels, 0, num_classes - 1, "training")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k={k} and temperature={temperature} must be positive; use 20 and 0.07")
    if not features.isfinite().all():
        raise ValueError(_not_finite("validation"))
    k = min(k, len(train_features))
    train = F.normalize(train_features.float(), dim=1)
    labels = train_labels.long().to(train.device)
    votes = torch.zeros(len(features), num_classes, device=train.device)
    rows_per_chunk = max(1, _MAX_ELEMENTS // len(train))
    for chunk, part in zip(
        features.split(rows_per_chunk), votes.split(rows_per_chunk), strict=True
    ):
        similarity = F.normalize(chunk.float().to(train.device), dim=1) @ train.T  # (m, N)
        nearest, neighbours = similarity.topk(k, dim=1)
        weights = torch.softmax(nearest / temperature, dim=1)  # (m, k)
        rows = torch.arange(len(chunk), device=train.device)
        # One neighbour at a time: adding all at once is not deterministic on CUDA.
        for i in range(k):
            part[rows, labels[neighbours[:, i]]] += weights[:, i]
    return votes


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
) -> float:
    """Accuracy in percent of logistic regression on standardised features.

    The protocol of CLIP (arXiv:2103.00020, A.3): L-BFGS to convergence, the weight penalty chosen
    on a part of the training samples, never on the validation samples. That part is the 2nd, 7th,
    12th, ... sample of each class; among penalties of equal accuracy the strongest is taken; then
    all training samples are fitted.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers of any range.
        val_features: (M, D), M > 0.
        val_labels: (M,); a class without training samples is never predicted.

    Raises:
        ValueError: no training or no validation samples, or features that are not finite.
    """
    _check_features(train_features, train_labels, "training")
    _check_features(val_features, val_labels, "validation")
    device = train_features.device
    classes, labels = train_labels.to(device).unique(return_inverse=True)
    x, val_x = _standardize(train_features.float(), val_features.float().to(device))
    l2 = _choose_l2(x, labels, len(classes))
    weight, bias = _fit_path(x, labels, len(classes), l2)[l2]
    predicted = classes[_predict(val_x, weight, bias)]
    return 100 * int((predicted == val_labels.to(device)).sum()) / len(val_labels)


def _check_features(features: Tensor, labels: Tensor, what: str) -> None:
    assert features.ndim == 2 and labels.shape == features.shape[:1], (
        f"{what} features {tuple(features.shape)} with labels {tuple(labels.shape)}"
    )
    if len(features) == 0:
        raise ValueError(f"a probe needs {what} samples; there are none")
    if not features.isfinite().all():
        raise ValueError(_not_finite(what))


def _not_finite(what: str) -> str:
    return f"{what} features are not finite; the encoder has diverged, take an earlier checkpoint"


def _standardize(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and deviation 1 over the training samples; features without variation become 0."""
    mean, std = train.mean(0), train.std(0, correction=0)
    has_variation = std > 1e-6 * mean.abs().clamp_min(1e-6)  # more than rounding of equal values
    scale = torch.where(has_variation, 1 / std, 0)
    return (train - mean) * scale, (val - mean) * scale


def _choose_l2(x: Tensor, labels: Tensor, num_classes: int) -> float:
    """The strongest of the penalties with the best accuracy on held-out training samples."""
    is_held_out = _position_in_class(labels) % 5 == 1
    fits = _fit_path(x[~is_held_out], labels[~is_held_out], num_classes, L2_STRENGTHS[-1])
    held_out_x, held_out_labels = x[is_held_out], labels[is_held_out]
    hits = {
        l2: int((_predict(held_out_x, weight, bias) == held_out_labels).sum())
        for l2, (weight, bias) in fits.items()
    }
    best = max(hits, key=lambda l2: (hits[l2], l2))
    _logger.info(
        "linear probe: L2 %g; hits among %d held-out training samples: %s",
        best,
        len(held_out_x),
        hits,
    )
    return best


def _position_in_class(labels: Tensor) -> Tensor:
    """(N,): how many earlier samples have the same label."""
    order = labels.argsort(stable=True)
    first = labels[order].unique_consecutive(return_counts=True)[1].cumsum(0).roll(1)
    first[0] = 0
    position = torch.empty_like(order)
    position[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]
    return position


def _fit_path(
    x: Tensor, labels: Tensor, num_classes: int, weakest: float
) -> dict[float, tuple[Tensor, Tensor]]:
    """Weights (D, K) and bias (K,) of every penalty down to `weakest`.

    The loss is convex, so the start does not matter; each fit starts from the stronger one before
    it, which takes fewer iterations in all.
    """
    weight = torch.zeros(x.shape[1], num_classes, device=x.device)
    bias = torch.zeros(num_classes, device=x.device)
    fits = {}
    for l2 in L2_STRENGTHS:
        if l2 < weakest:
            break
        weight, bias = _fit(x, labels, weight, bias, l2)
        fits[l2] = (weight, bias)
    return fits


def _fit(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, l2: float
) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2 from the given start."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        max_eval=2 * _MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, _MAX_ELEMENTS // len(bias))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = l2 / 2 * weight.square().sum()
        loss.backward()
        total = loss.detach()
        for part, part_labels in zip(x.split(rows), labels.split(rows), strict=True):
            loss = F.cross_entropy(part @ weight + bias, part_labels, reduction="sum") / len(x)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _predict(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = max(1, _MAX_ELEMENTS // len(bias))
    return torch.cat([(part @ weight + bias).argmax(1) for part in x.split(rows)])
