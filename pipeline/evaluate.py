"""Evaluation of a downstream model: exact over the whole validation set, for any worker count.

Each worker scores its own samples, every sample once; what the scores need is gathered, and every
worker computes the result of all of it. Surprising: bad validation samples are left out and
counted, so a result says over how many samples it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.data import Batch
from pipeline.downstream.scores import Scores
from pipeline.downstream.task import DownstreamTask
from pipeline.quarantine import BadSample, bad_samples, check_bad_fraction
from pipeline.train_state import Worker, gather_from_workers


class Share(NamedTuple):
    """What one worker found on its share of a validation set."""

    scores: dict[str, Any]
    """`Scores.state`."""
    bad: list[BadSample]
    num_samples: int
    """Bad ones among them."""


def evaluate_task(
    task: DownstreamTask,
    model: nn.Module,
    batches: Iterable[Batch],
    worker: Worker = Worker(),
) -> tuple[dict[str, float], Scores]:
    """Score a model on a validation set. All workers must call it.

    Args:
        task: what is scored.
        model: not wrapped; its mode is put back afterwards.
        batches: this worker's share, every sample of the set on one worker.
        worker: this process.

    Returns:
        As `combine`.

    Raises:
        TooManyBadSamplesError: more than data.max_bad_fraction of the samples are bad.
        ValueError: there is nothing to evaluate.
    """
    share = score_share(task, model, batches, worker.device)
    return combine(task, gather_from_workers(share, worker))


def score_share(
    task: DownstreamTask, model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> Share:
    """Score a model on one worker's share."""
    scores = task.new_scores()
    bad: list[BadSample] = []
    num_samples = 0
    was_training = model.training
    model.eval()
    on_gpu = device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        for batch in batches:
            task.score(model, batch, device, scores)
            bad += bad_samples(batch)
            num_samples += len(batch["row"])
    model.train(was_training)
    return Share(scores.state(), bad, num_samples)


def combine(task: DownstreamTask, shares: list[Share]) -> tuple[dict[str, float], Scores]:
    """Metrics over all shares, val/num_samples and val/bad_samples among them, and their scores.

    Raises:
        TooManyBadSamplesError: more than data.max_bad_fraction of the samples are bad.
        ValueError: there is nothing to evaluate.
    """
    scores = task.new_scores()
    scores.merge([share.scores for share in shares])
    bad = [sample for share in shares for sample in share.bad]
    total = sum(share.num_samples for share in shares)
    check_bad_fraction(bad, total, task.config.data.max_bad_fraction, "data.max_bad_fraction")
    if total == len(bad):
        raise ValueError(f"{total} validation samples, {len(bad)} of them bad: none to evaluate")
    counts = {"val/num_samples": float(total - len(bad)), "val/bad_samples": float(len(bad))}
    return {**scores.result(), **counts}, scores
