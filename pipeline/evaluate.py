"""Evaluation of a downstream model: exact over the whole validation set, for any worker count.

Each worker scores its own samples, every sample once; what the scores need is gathered, and every
worker computes the result of all of it. Surprising: bad validation samples are left out and
counted, so a result says over how many samples it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipeline.data import Batch
from pipeline.downstream.scores import Scores
from pipeline.downstream.task import DownstreamTask
from pipeline.quarantine import BadSample, bad_samples, check_bad_fraction
from pipeline.train_state import Worker, gather_from_workers


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
        Metrics over all workers, val/num_samples and val/bad_samples among them, and the scores
        they are from.

    Raises:
        TooManyBadSamplesError: more than data.max_bad_fraction of the samples are bad.
    """
    scores = task.new_scores()
    bad: list[BadSample] = []
    num_samples = 0
    was_training = model.training
    model.eval()
    on_gpu = worker.device.type == "cuda"
    with torch.no_grad(), torch.autocast(worker.device.type, torch.bfloat16, enabled=on_gpu):
        for batch in batches:
            task.score(model, batch, worker.device, scores)
            bad += bad_samples(batch)
            num_samples += len(batch["row"])
    model.train(was_training)
    parts = gather_from_workers((scores.state(), bad, num_samples), worker)
    scores.merge([state for state, _, _ in parts])
    all_bad = [sample for _, part, _ in parts for sample in part]
    total = sum(count for _, _, count in parts)
    check_bad_fraction(all_bad, total, task.config.data.max_bad_fraction, "data.max_bad_fraction")
    if total == len(all_bad):
        raise ValueError(f"data.val_path='{task.config.data.val_path}' has no sample to evaluate")
    metrics = scores.result()
    metrics["val/num_samples"] = float(total - len(all_bad))
    metrics["val/bad_samples"] = float(len(all_bad))
    return metrics, scores
