"""The fine-tuning loop, for all three tasks: read it top to bottom.

As the pre-training loop it knows no Ray, no MLflow and no paths. Surprising: everything a step
draws (drop path, mixup, sampled regions) is seeded by (seed, step, micro-batch), so a run that was
killed draws it again, and a run with fewer workers draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.between_steps import BetweenSteps, Hooks, Step
from pipeline.checkpoint import Checkpointer
from pipeline.data import Batch
from pipeline.downstream.scores import Scores
from pipeline.downstream.task import DownstreamTask
from pipeline.draws import seed_draws
from pipeline.evaluate import evaluate_task
from pipeline.finetune_config import FinetuneConfig
from pipeline.init_weights import InitialWeights, load_initial_weights
from pipeline.nonfinite import NonFiniteGuard, NonFiniteLossError, non_finite_message
from pipeline.optim import Task as LayerDecayTask
from pipeline.optim import build_optimizer, layer_decay_groups, set_lr
from pipeline.parallel import (
    average_batch_norms,
    no_sync_unless,
    parallel,
    with_shared_batch_norms,
)
from pipeline.quarantine import bad_samples
from pipeline.schedules import warmup_cosine, warmup_poly, warmup_step
from pipeline.train_state import TrainState, Worker

_LAYER_DECAY_TASKS: dict[str, LayerDecayTask] = {
    "classify": "classification",
    "detect": "detection",
    "segment": "segmentation",
}


def finetune(
    config: FinetuneConfig,
    task: DownstreamTask,
    weights: InitialWeights,
    *,
    num_samples: int,
    batches_from: Callable[[int], Iterable[Batch]],
    validation: Iterable[Batch],
    checkpointer: Checkpointer,
    worker: Worker = Worker(),
    hooks: Hooks = Hooks(),
) -> dict[str, Any]:
    """Fine-tune until the last step, or until a stop is asked for.

    Restore order: 1 the run's own newest valid checkpoint, 2 the initial weights.

    Args:
        config: the run.
        task: what is trained, with the classes of the data.
        weights: what the model starts from.
        num_samples: size of the training set.
        batches_from: gives this worker's micro-batches from a step on, in order.
        validation: this worker's share of the validation set; iterated at every evaluation.
        checkpointer: written by worker 0, read by all.
        worker: this process.
        hooks: callbacks.

    Returns:
        Summary: steps, is_stopped, bad_samples (their paths), skipped_steps, images_per_s,
        data_wait_frac and the latest metrics. The last checkpoint is written, or has failed (see
        `Checkpointer.finished`).

    Raises:
        NonFiniteLossError: more than optim.max_skipped_steps in a row; names step and last loss.
        TooManyBadSamplesError: at a log step or an evaluation.
        ValueError: the initial weights do not fit.
    """
    num_steps = config.num_steps(num_samples)
    state = build_state(config, task, weights, worker)
    state.restore(checkpointer, worker)
    hooks.on_start(state.step)
    validator = _Validator(task, validation, worker)
    between = BetweenSteps(
        config,
        num_samples,
        task.loss_names,
        checkpointer,
        worker,
        hooks,
        evaluate=validator.evaluate,
        draw=validator.draw,
        export=lambda state: evaluated_model(state).state_dict(),
    )
    state.model.train()
    model = parallel(state.model, worker)
    batches = iter(batches_from(state.step))
    micros = config.micro_batches_of(worker.rank, worker.world_size)
    share = worker.world_size / config.num_micro_batches
    guard = NonFiniteGuard(worker)
    is_stopped = between.is_at_pause(state)

    while state.step < num_steps and not is_stopped:
        lr = lr_at(state.step, num_steps, config)
        set_lr(state.optimizer, lr)

        losses = torch.zeros(len(task.loss_names), device=worker.device)
        num_bad = 0
        for micro in micros:
            with between.meter.waiting():
                batch = next(batches)
            bad = bad_samples(batch)
            between.new_bad += bad
            num_bad += len(bad)
            seed_draws(config.run.seed, state.step, micro)
            on_gpu = worker.device.type == "cuda"
            with no_sync_unless(micro == micros[-1], model):
                with torch.autocast(worker.device.type, torch.bfloat16, enabled=on_gpu):
                    parts = task.losses(model, batch, worker.device)
                (parts[0] * share).backward()
            losses += parts.detach() * share

        clip = config.optim.clip_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        is_skipped = not guard.admits(state, losses, grad_norm)
        if not is_skipped:
            state.optimizer.step()
            average_batch_norms(state.model, worker)
            if state.ema is not None:
                state.ema.update(state.model)
        elif state.skipped_in_a_row > config.optim.max_skipped_steps:
            raise NonFiniteLossError(non_finite_message(state, losses, grad_norm, between.latest))
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        step = Step(losses, num_bad, grad_norm, {"optim/lr": lr}, is_skipped)
        is_stopped = between.after(state, step)
    return between.summary(state, is_stopped=is_stopped)


def build_state(
    config: FinetuneConfig, task: DownstreamTask, weights: InitialWeights, worker: Worker
) -> TrainState:
    """Model with its initial weights, optimiser with layer-wise learning rates, moving average.

    Raises:
        ValueError: the initial weights do not fit the model.
    """
    torch.manual_seed(config.run.seed)
    model = task.build()
    load_initial_weights(model, weights)
    model = with_shared_batch_norms(model.to(worker.device), worker)
    optim = config.optim
    groups = layer_decay_groups(
        model,
        task=_LAYER_DECAY_TASKS[config.task],
        layer_decay=optim.layer_decay,
        weight_decay=optim.weight_decay,
        official_quirks=optim.official_quirks,
    )
    optimizer = build_optimizer(
        model, lr=config.lr, weight_decay=optim.weight_decay, betas=optim.betas, groups=groups
    )
    ema = ModelEmaV3(model, decay=optim.ema_decay) if optim.ema_decay else None
    return TrainState(model, None, optimizer, ema=ema)


def evaluated_model(state: TrainState) -> nn.Module:
    """The moving average of the weights where there is one, else the model."""
    model: nn.Module = state.model if state.ema is None else state.ema.module
    return model


def lr_at(step: int, num_steps: int, config: FinetuneConfig) -> float:
    """Learning rate of a step, of the groups with factor 1."""
    optim, peak = config.optim, config.lr
    warmup = optim.warmup_ratio * num_steps if optim.warmup_steps is None else optim.warmup_steps
    span = {"warmup_steps": min(warmup, num_steps), "num_steps": num_steps}
    if optim.schedule == "step":
        return warmup_step(step, peak=peak, milestones=optim.lr_milestones, **span)
    if optim.schedule == "poly":
        return warmup_poly(step, peak=peak, final=optim.min_lr, **span)
    return warmup_cosine(step, peak=peak, final=optim.min_lr, **span)


class _Validator:
    """Evaluates a state, and keeps what the pictures need: scores and a few samples."""

    def __init__(self, task: DownstreamTask, validation: Iterable[Batch], worker: Worker) -> None:
        self.task = task
        self.validation = validation
        self.worker = worker
        self._scores: Scores = task.new_scores()
        self._shown: Batch | None = None

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Metrics over the whole validation set."""
        metrics, self._scores = evaluate_task(
            self.task, evaluated_model(state), self._remembering(), self.worker
        )
        return metrics

    def draw(self, state: TrainState) -> dict[str, bytes]:
        """Predictions for the first validation samples, and a picture of the newest scores."""
        if self._shown is None:  # a picture before the first evaluation
            self._shown = next(iter(self.validation))
        model = evaluated_model(state)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            device = self.worker.device
            pictures = self.task.pictures(model, self._shown, device, self._scores)
        model.train(was_training)
        return pictures

    def _remembering(self) -> Iterable[Batch]:
        for batch in self.validation:
            if self._shown is None:
                self._shown = batch
            yield batch
