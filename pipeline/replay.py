"""Looks into a dump of steps that were not finite: computes them again and names the samples.

The dump (`<run>/nonfinite/step_XXXXXXXX`, see `nonfinite.py`) holds the state before the first of
the steps and what each of them was fed. Surprising: no pixels are stored. Crops and masks are
functions of (seed, epoch, sample id), so the data set and the config give them again.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.checkpoint import STATE_FILE, load_state, problem_of
from pipeline.config_values import config_from_dict
from pipeline.data import Batch, Draws, SampleFactory, micro_batches, sample_stream
from pipeline.onednn_products import use_onednn
from pipeline.pretrain import forward_backward, sample_weights, to_device
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_weights import read_pretrain_weights
from pipeline.sources import build_index
from pipeline.train_state import TrainState


class ReplayedStep(NamedTuple):
    """One step of the streak, computed again."""

    step: int
    loss: float
    grad_norm: float
    recorded_grad_norm: float
    """What the run had; not a number or infinite."""
    bad_samples: list[str]
    """Samples whose own loss or gradient is not finite; empty when only all together are."""


def replay(dump: Path) -> list[ReplayedStep]:
    """Compute the steps of a dump again, in this process.

    Args:
        dump: folder under `<run>/nonfinite/`.

    Raises:
        ValueError: this is no dump, or a damaged one, or the data set is not the one of the run.
    """
    config_file = dump.resolve().parent.parent / "config.json"
    if not (dump / STATE_FILE).is_file() or not config_file.is_file():
        raise ValueError(
            f"'{dump}' is no dump of a run; give a folder such as RUN/nonfinite/step_00000012"
        )
    if (problem := problem_of(dump)) is not None:
        raise ValueError(f"'{dump}' is damaged: {problem}")
    dumped = load_state(dump)
    if "streak" not in dumped:
        raise ValueError(
            f"'{dump}' is a checkpoint, not a dump; give a folder such as "
            "RUN/nonfinite/step_00000012"
        )
    try:
        config = config_from_dict(PretrainConfig, json.loads(config_file.read_text()))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    if config.data.synthetic:
        raise ValueError(f"the run of '{dump}' was fed random pixels, there is no sample to name")
    device = torch.device("cuda" if config.scaling.use_gpu and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        use_onednn()  # as the run did
    state = TrainState.build(config, device, read_pretrain_weights(config))
    state.load_state_dict(dumped)
    index = build_index(config.data.path, max_bad_fraction=1.0)
    factory = SampleFactory.build(config, index)
    stream = sample_stream(config, index)
    steps = sorted({part["step"] for part in dumped["streak"]})
    return [
        _replay_step(
            config,
            state,
            factory,
            micro_batches(stream, config, step),
            [part for part in dumped["streak"] if part["step"] == step],
        )
        for step in steps
    ]


def _replay_step(
    config: PretrainConfig,
    state: TrainState,
    factory: SampleFactory,
    micros: list[Draws],
    recorded: list[dict[str, Any]],
) -> ReplayedStep:
    fed = [micro["row"] for part in recorded for micro in part["micro_batches"] if "row" in micro]
    if fed and fed != [draws.rows.tolist() for draws in micros]:
        raise ValueError(
            f"step {recorded[0]['step']} was fed other samples than data.path="
            f"'{config.data.path}' gives now; replay with the data set of the run"
        )
    losses = [_loss(config, state, factory.batch(draws)) for draws in micros]
    grad_norm = _take_grad_norm(state)
    suspects = [d for d, loss in zip(micros, losses, strict=True) if not math.isfinite(loss)]
    if not suspects and not math.isfinite(grad_norm):
        suspects = micros
    bad = [place for draws in suspects for place in _bad_samples(config, state, factory, draws)]
    step = recorded[0]["step"]
    return ReplayedStep(step, sum(losses), grad_norm, recorded[0]["grad_norm"], bad)


def _bad_samples(
    config: PretrainConfig, state: TrainState, factory: SampleFactory, draws: Draws
) -> list[str]:
    """Where the samples are whose share of the loss or of the gradient is not finite."""
    batch, bad = factory.batch(draws), []
    for i, row in enumerate(draws.rows.tolist()):
        alone = {key: values[i : i + 1] for key, values in batch.items()}
        loss = _loss(config, state, alone, share=1 / len(draws.rows))
        if not math.isfinite(loss + _take_grad_norm(state)):
            bad.append(factory.reader.location(row))
    return bad


def _loss(config: PretrainConfig, state: TrainState, batch: Batch, share: float = 1.0) -> float:
    """Total loss of a micro-batch as the run computed it, times `share`; adds its gradients."""
    device = next(state.model.parameters()).device
    images, mask = to_device(batch, config, device)
    weight = None
    if share < 1 or (batch["bad"] != "").any():
        weight = sample_weights(batch, device) * share
    return float(forward_backward(state.model, state.teacher, images, mask, config, weight)[0])


def _take_grad_norm(state: TrainState) -> float:
    """Norm of the gradients, which are cleared."""
    grad_norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), math.inf))
    state.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def replay_report(steps: list[ReplayedStep]) -> str:
    """One line a step, and what to look at."""
    lines = []
    for step in steps:
        lines.append(
            f"step {step.step + 1}: loss {step.loss:.6g}, gradient norm {step.grad_norm:.6g} "
            f"(the run had {step.recorded_grad_norm:.6g})"
        )
        lines += [f"  not finite because of {path}" for path in step.bad_samples]
    if not any(step.bad_samples for step in steps):
        lines.append("no single sample is at fault: look at the weights and the learning rate")
    return "\n".join(lines)
