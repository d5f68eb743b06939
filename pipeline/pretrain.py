"""The pre-training loop: read it top to bottom.

It knows no Ray, no MLflow and no paths: batches come from an iterator, metrics go to a callback,
states to a `Checkpointer`. Surprising: the loss is never taken off the device between log steps,
but every step is asked whether it is finite, because one that is not must not update the weights.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.hivit import STRIDES
from models.pretraining import PretrainingModel
from models.teacher import EMATeacher
from models.tokens import split_tokens
from pipeline.checkpoint import Checkpointer
from pipeline.config import PretrainConfig
from pipeline.metrics import Meter, peak_memory_gib
from pipeline.nonfinite import NonFiniteGuard, NonFiniteLossError, non_finite_message
from pipeline.optim import set_lr
from pipeline.pictures import reconstruction_picture
from pipeline.pretrain_evaluation import PretrainEvaluation
from pipeline.quarantine import BadSample, check_bad_fraction
from pipeline.schedules import teacher_momentum, warmup_cosine
from pipeline.train_state import TrainState, Worker, max_over_workers, share_quarantine

Batch = dict[str, NDArray[Any]]
_PICTURE_ROWS = 8


@dataclass(frozen=True)
class Hooks:
    """What the loop calls outwards. Called on every worker unless said otherwise."""

    on_start: Callable[[int], None] = lambda step: None
    """Once, with the step the run starts at."""
    on_metrics: Callable[[int, dict[str, float]], bool] = lambda step, metrics: False
    """At log steps, worker 0 only; returns True to ask for a clean stop."""
    wants_checkpoint: Callable[[int], bool] = lambda step: False
    """At log steps; returns True to ask for a checkpoint now."""
    on_quarantine: Callable[[list[BadSample]], None] = lambda samples: None
    """When there are new bad samples, with all of them; worker 0 only."""
    on_picture: Callable[[int, bytes], None] = lambda step, png: None
    """At picture steps, worker 0 only."""
    on_checkpoint: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    """After a checkpoint was handed to the checkpointer, with the latest metrics."""
    on_non_finite: Callable[[dict[str, Any]], None] = lambda dump: None
    """Before NonFiniteLossError, worker 0 only, with a state that replays the steps."""


def pretrain(
    config: PretrainConfig,
    *,
    num_samples: int,
    batches_from: Callable[[int], Iterable[Batch]],
    evaluation_batch: Batch,
    checkpointer: Checkpointer,
    worker: Worker = Worker(),
    hooks: Hooks = Hooks(),
) -> dict[str, Any]:
    """Pre-train until the last step, or until a stop is asked for.

    Restore order: 1 the run's own newest valid checkpoint, 2 scratch.

    Args:
        config: the run.
        num_samples: size of the training set.
        batches_from: gives this worker's micro-batches from a step on, in order.
        evaluation_batch: this worker's share of the held-out crops.
        checkpointer: written by worker 0, read by all.
        worker: this process.
        hooks: callbacks.

    Returns:
        Summary: steps, is_stopped, bad_samples (their paths), skipped_steps, images_per_s,
        data_wait_frac and the latest metrics. The last checkpoint is written, or has failed (see
        `Checkpointer.finished`).

    Raises:
        NonFiniteLossError: more than optim.max_skipped_steps in a row; names step and last loss.
        TooManyBadSamplesError: at a log step.
    """
    run, num_steps = config.run, config.num_steps(num_samples)
    state = TrainState.build(config, worker.device)
    state.restore(checkpointer, worker)
    hooks.on_start(state.step)
    model = _wrap(state.model, worker)
    batches = iter(batches_from(state.step))
    num_micros = len(config.micro_batches_of(worker.rank, worker.world_size))
    guard, meter = NonFiniteGuard(worker), Meter(config.data.global_batch_size)
    latest: dict[str, float] = {}
    new_bad: list[BadSample] = []
    is_stopped = False

    while state.step < num_steps and not is_stopped:
        schedules = schedules_at(state.step, num_steps, config)
        set_lr(state.optimizer, schedules["optim/lr"])

        losses = torch.zeros(2 + len(STRIDES), device=worker.device)  # total, mim, mfm by stride
        num_bad = 0
        for micro in range(num_micros):
            with meter.waiting():
                batch = next(batches)
            guard.add_batch(batch)
            bad = [BadSample(*json.loads(text)) for text in batch["bad"] if text]
            new_bad += bad
            num_bad += len(bad)
            images, mask = to_device(batch, config, worker.device)
            weight = sample_weights(batch, worker.device) if bad else None
            with _no_sync_unless(micro == num_micros - 1, model):
                losses += forward_backward(
                    model, state.teacher, images, mask, config, weight, worker.world_size
                )

        clip = config.optim.clip_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        is_skipped = not guard.admits(state, losses, grad_norm)
        if not is_skipped:
            state.optimizer.step()
            if state.teacher:
                momentum = schedules["optim/teacher_momentum"]
                state.teacher.update(state.model.encoder.backbone, momentum)
        elif state.skipped_in_a_row > config.optim.max_skipped_steps:
            dump = guard.dump(state)
            if worker.is_rank_zero:
                hooks.on_non_finite(dump)
            raise NonFiniteLossError(non_finite_message(state, losses, grad_norm, latest))
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        meter.step_done()

        is_final = state.step == num_steps
        is_logging = is_final or is_skipped or state.step % run.log_every_steps == 0
        is_evaluating = is_final or state.step % run.evaluate_every_steps == 0
        is_saving = is_final or state.step % run.checkpoint_every_steps == 0
        record: dict[str, float] = {}
        # Whenever a record may end the run, or a checkpoint is due.
        if is_logging or is_evaluating or is_saving:
            if share_quarantine(state, new_bad, worker) and worker.is_rank_zero:
                hooks.on_quarantine(list(state.quarantine.values()))
            new_bad = []
        if is_logging:
            record |= loss_metrics(
                losses, num_bad, config.data.global_batch_size, has_mfm=state.teacher is not None
            )
            record |= {"train/grad_norm": float(grad_norm), **schedules}
            record = {key: value for key, value in record.items() if math.isfinite(value)}
            record["train/skipped_steps"] = float(state.skipped_steps)
            record["train/epoch"] = state.step * config.data.global_batch_size / num_samples
            record["data/bad_samples"] = float(len(state.quarantine))
            record |= {**meter.metrics(), **peak_memory_gib(worker.device)}
        with meter.paused():
            if is_evaluating:
                record |= evaluate(state, evaluation_batch, config, worker.device)
            if record:
                latest |= record
                wants_stop = worker.is_rank_zero and hooks.on_metrics(state.step, record)
                wants_save = hooks.wants_checkpoint(state.step)
                wish = max_over_workers(2 * wants_stop + wants_save, worker)
                is_stopped = wish >= 2 and not is_final
                is_saving |= wish > 0
                check_bad_fraction(
                    state.quarantine.values(),
                    num_samples,
                    config.data.max_bad_fraction,
                    "data.max_bad_fraction",
                )
            if worker.is_rank_zero and (is_final or state.step % run.picture_every_steps == 0):
                hooks.on_picture(state.step, draw_picture(state, evaluation_batch, config))
            if is_saving:
                if worker.is_rank_zero:
                    samples_seen = state.step * config.data.global_batch_size
                    cursor = {"samples_seen": samples_seen, "epoch": samples_seen // num_samples}
                    encoder = state.model.encoder.state_dict()
                    checkpointer.save(state.step, state.state_dict() | cursor, encoder)
                hooks.on_checkpoint(state.step, latest)
    checkpointer.wait()
    if not latest:  # killed after the last checkpoint and before the summary: nothing left to train
        latest |= evaluate(state, evaluation_batch, config, worker.device)
    return {
        "steps": state.step,
        "is_stopped": is_stopped,
        "bad_samples": sorted(state.quarantine),
        "skipped_steps": state.skipped_steps,
        **meter.totals(),
        "metrics": latest,
    }


def forward_backward(
    model: nn.Module,
    teacher: EMATeacher | None,
    images: Tensor,
    mask: Tensor,
    config: PretrainConfig,
    weight: Tensor | None = None,
    world_size: int = 1,
) -> Tensor:
    """Add the gradients of one micro-batch; returns its share of the step's losses, detached.

    Shares are such that the mean over all workers is the mean over the global batch, also where
    some workers have one micro-batch more than others.

    Args:
        model: the student, possibly wrapped for data parallelism.
        teacher: None without MFM.
        images: (B, C, H, W), normalised.
        mask: (B, N) bool, True = masked.
        config: the run.
        weight: (B,) factors of the images' losses; None for ones.

    Returns:
        (2 + stages,) total, MIM and MFM losses divided by the accumulation steps.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        features = None
        if teacher is not None:
            _, ids_masked = split_tokens(mask, config.num_visible)
            features = teacher(images, ids_masked)
        losses = model(images, mask, features, config.num_visible, weight)
    share = world_size / config.num_micro_batches
    (losses.total * share).backward()
    mfm = [losses.mfm.get(stride, torch.zeros_like(losses.mim)) for stride in STRIDES]
    return torch.stack([losses.total, losses.mim, *mfm]).detach() * share


def schedules_at(step: int, num_steps: int, config: PretrainConfig) -> dict[str, float]:
    """Learning rate and teacher momentum of a step, under their metric names."""
    lr = warmup_cosine(
        step,
        peak=config.lr,
        final=config.optim.min_lr,
        warmup_steps=config.optim.warmup_ratio * num_steps,
        num_steps=num_steps,
    )
    schedules = {"optim/lr": lr}
    if config.objective.mfm_weight > 0:
        start = config.objective.teacher_momentum
        schedules["optim/teacher_momentum"] = teacher_momentum(
            step, start=start, num_steps=num_steps
        )
    return schedules


def to_device(batch: Batch, config: PretrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 HWC crops and masks of a batch -> normalised float images (B, C, H, W), mask (B, N)."""
    pixels = torch.from_numpy(batch["image"]).to(device, non_blocking=True)
    mask = torch.from_numpy(batch["mask"]).to(device, non_blocking=True)
    mean = torch.tensor(config.data.mean, device=device) * 255
    std = torch.tensor(config.data.std, device=device) * 255
    images = (pixels.float() - mean) / std  # (B, H, W, C)
    return images.permute(0, 3, 1, 2).contiguous(), mask


def sample_weights(batch: Batch, device: torch.device) -> Tensor:
    """(B,) 1 for good samples, 0 for bad ones."""
    return torch.from_numpy(batch["bad"] == "").float().to(device)


def evaluate(
    state: TrainState, batch: Batch, config: PretrainConfig, device: torch.device
) -> dict[str, float]:
    """Losses on the held-out crops against trivial predictors, over all workers; float32."""
    state.model.eval()
    evaluation = PretrainEvaluation(state.model, state.teacher, config.data.std)
    size = config.batch_size_per_worker
    for first in range(0, len(batch["image"]), size):
        part = {key: values[first : first + size] for key, values in batch.items()}
        evaluation.add(*to_device(part, config, device))
    state.model.train()
    return evaluation.result()


def draw_picture(state: TrainState, batch: Batch, config: PretrainConfig) -> bytes:
    """PNG of reconstructions of the first held-out crops."""
    device = next(state.model.parameters()).device
    part = {key: values[:_PICTURE_ROWS] for key, values in batch.items()}
    images, mask = to_device(part, config, device)
    state.model.eval()
    png = reconstruction_picture(
        state.model, state.teacher, images, mask, mean=config.data.mean, std=config.data.std
    )
    state.model.train()
    return png


def loss_metrics(
    losses: Tensor, num_bad: int, global_batch_size: int, *, has_mfm: bool
) -> dict[str, float]:
    """train/loss* of a step: means over the good samples of all workers. All must call it.

    Args:
        losses: (2 + stages,) of this worker, where bad samples count as 0.
        num_bad: bad samples of this worker.
        global_batch_size: samples of the step.
        has_mfm: whether there are feature losses.
    """
    sums = torch.cat([losses, losses.new_tensor([num_bad])])
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums[:-1] /= dist.get_world_size()
    *means, bad = sums.tolist()
    total, mim, *mfm = (
        mean * global_batch_size / max(1, global_batch_size - bad) for mean in means
    )
    metrics = {"train/loss": total, "train/loss_mim": mim}
    if has_mfm:
        metrics |= {f"train/loss_mfm{s}": value for s, value in zip(STRIDES, mfm, strict=True)}
    return metrics


def _wrap(model: PretrainingModel, worker: Worker) -> nn.Module:
    if worker.world_size == 1:
        return model
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def _no_sync_unless(is_last: bool, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
