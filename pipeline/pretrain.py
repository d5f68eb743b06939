"""The pre-training loop: read it top to bottom.

It knows no Ray, no MLflow and no paths: batches come from an iterator, metrics go to a callback,
states to a `Checkpointer`. Surprising: the loss is never taken off the device between log steps,
but every step is asked whether it is finite, because one that is not must not update the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.between_steps import BetweenSteps, Hooks, Step
from pipeline.checkpoint import Checkpointer
from pipeline.compilation import compile_training
from pipeline.draws import seed_draws
from pipeline.nonfinite import NonFiniteGuard, NonFiniteLossError, non_finite_message
from pipeline.objectives import objective_of
from pipeline.optim import set_lr
from pipeline.parallel import no_sync_unless, parallel
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_weights import PretrainWeights
from pipeline.quarantine import bad_samples
from pipeline.schedules import teacher_momentum, warmup_cosine
from pipeline.sharding import Whole, gathered, shard
from pipeline.teachers import EMA
from pipeline.train_state import TrainState, Worker

Batch = dict[str, NDArray[Any]]
PICTURES = "reconstructions"
_PICTURE_ROWS = 8


def pretrain(
    config: PretrainConfig,
    *,
    num_samples: int,
    batches_from: Callable[[int], Iterable[Batch]],
    evaluation_batch: Batch,
    weights: PretrainWeights = PretrainWeights(),
    probe: Callable[[nn.Module], dict[str, float]] = lambda encoder: {},
    checkpointer: Checkpointer,
    worker: Worker = Worker(),
    hooks: Hooks = Hooks(),
) -> dict[str, Any]:
    """Pre-train until the last step, or until a stop is asked for.

    Restore order: 1 the run's own newest valid checkpoint, 2 the initial weights, 3 scratch.

    Args:
        config: the run.
        num_samples: size of the training set.
        batches_from: gives this worker's micro-batches from a step on, in order.
        evaluation_batch: this worker's share of the held-out crops.
        weights: what the student starts from, and those of a frozen teacher.
        probe: further metrics of the encoder at evaluations; all workers call it.
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
    num_steps = config.num_steps(num_samples)
    state = TrainState.build(config, worker.device, weights)
    names = objective_of(config).loss_names
    state.restore(checkpointer, worker)
    scaling = config.scaling
    state.model.encoder.backbone.set_grad_checkpointing(scaling.grad_checkpointing)
    if scaling.compile:
        compile_training(state.model, state.average)
    is_split = scaling.sharding == "full" and worker.world_size > 1
    whole: Whole = shard(state) if is_split else lambda state: state
    hooks.on_start(state.step)
    between = BetweenSteps(
        config,
        num_samples,
        names,
        checkpointer,
        worker,
        hooks,
        evaluate=lambda state: (
            evaluate(state, evaluation_batch, config, worker.device) | probe(state.model.encoder)
        ),
        draw=lambda state: {PICTURES: draw_picture(state, evaluation_batch, config)},
        export=lambda state: state.model.encoder.state_dict(),
        whole=whole,
    )
    is_accumulating = config.num_micro_batches > worker.world_size
    model = parallel(state.model, worker, static_graph=not is_accumulating)
    batches = iter(batches_from(state.step))
    micros = config.micro_batches_of(worker.rank, worker.world_size)
    guard = NonFiniteGuard(worker)
    is_stopped = between.is_at_pause(state)

    while state.step < num_steps and not is_stopped:
        schedules = schedules_at(state.step, num_steps, config)
        set_lr(state.optimizer, schedules["optim/lr"])

        losses = torch.zeros(len(names), device=worker.device)
        num_bad = 0
        for micro in micros:
            with between.meter.waiting():
                batch = next(batches)
            guard.add_batch(batch)
            bad = bad_samples(batch)
            between.new_bad += bad
            num_bad += len(bad)
            images, mask = to_device(batch, config, worker.device)
            weight = sample_weights(batch, worker.device) if bad else None
            seed_draws(config.run.seed, state.step, micro)
            with no_sync_unless(micro == micros[-1], model):
                losses += forward_backward(
                    model, state.teacher, images, mask, config, weight, worker.world_size
                )

        clip = config.optim.clip_grad_norm or math.inf
        grad_norm = gathered(nn.utils.clip_grad_norm_(state.model.parameters(), clip))
        is_skipped = not guard.admits(state, losses, grad_norm)
        if not is_skipped:
            state.optimizer.step()
            if state.average:
                momentum = schedules["optim/teacher_momentum"]
                state.average.update(state.model.encoder.backbone, momentum)
        elif state.skipped_in_a_row > config.optim.max_skipped_steps:
            dump = guard.dump(state)
            if worker.is_rank_zero:
                hooks.on_non_finite(dump)
            raise NonFiniteLossError(non_finite_message(state, losses, grad_norm, between.latest))
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        step = Step(losses, num_bad, grad_norm, schedules, is_skipped)
        is_stopped = between.after(state, step)
    return between.summary(state, is_stopped=is_stopped)


def forward_backward(
    model: nn.Module,
    teacher: Any,
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
        teacher: None where no features are predicted.
        images: (B, C, H, W), normalised.
        mask: (B, N) bool, True = masked.
        config: the run.
        weight: (B,) factors of the images' losses; None for ones.

    Returns:
        (L,) losses in the order of the objective's names, divided by the accumulation steps.
    """
    is_bf16 = {"gpu": images.is_cuda, "always": True, "never": False}[config.scaling.bf16]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=is_bf16):
        losses = objective_of(config).losses(model, teacher, images, mask, weight)
    share = world_size / config.num_micro_batches
    (losses[0] * share).backward()
    return losses.detach() * share


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
    if config.has_teacher and config.objective.teacher == EMA:
        start = config.objective.teacher_momentum
        schedules["optim/teacher_momentum"] = teacher_momentum(
            step, start=start, num_steps=num_steps
        )
    return schedules


def to_device(batch: Batch, config: PretrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 HWC crops and masks of a batch -> normalised float images (B, C, H, W), mask (B, N)."""
    pixels = torch.from_numpy(batch["image"]).to(device, non_blocking=True)  # (B, H, W, C)
    mask = torch.from_numpy(batch["mask"]).to(device, non_blocking=True)
    mean, std = (
        (torch.tensor(values, device=device) * 255).view(-1, 1, 1)
        for values in (config.data.mean, config.data.std)
    )
    # One pass orders and converts; floats in the order of the pixels would be passed over 4 times.
    images = pixels.permute(0, 3, 1, 2).to(torch.float, memory_format=torch.contiguous_format)
    return images.sub_(mean).div_(std), mask


def sample_weights(batch: Batch, device: torch.device) -> Tensor:
    """(B,) 1 for good samples, 0 for bad ones."""
    return torch.from_numpy(batch["bad"] == "").float().to(device)


def evaluate(
    state: TrainState, batch: Batch, config: PretrainConfig, device: torch.device
) -> dict[str, float]:
    """Losses on the held-out crops against trivial predictors, over all workers; float32."""
    state.model.eval()
    evaluation = objective_of(config).evaluation(state.model, state.teacher)
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
    png = objective_of(config).picture(state.model, state.teacher, images, mask)
    state.model.train()
    return png
