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

from pipeline.checkpoint import STATE_FILE, load_state
from pipeline.config import PretrainConfig, config_from_dict
from pipeline.data import Batch, Draws, SampleFactory, micro_batches, sample_stream
from pipeline.pretrain import forward_backward, to_device
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
    """Samples whose own loss is not finite; empty when the weights or the gradient are at fault."""


def replay(dump: Path) -> list[ReplayedStep]:
    """Compute the steps of a dump again, in this process.

    Args:
        dump: folder under `<run>/nonfinite/`.

    Raises:
        ValueError: this is no dump, or the data set is not the one of the run.
    """
    config_file = dump.resolve().parent.parent / "config.json"
    if not (dump / STATE_FILE).is_file() or not config_file.is_file():
        raise ValueError(
            f"'{dump}' is no dump of a run; give a folder such as RUN/nonfinite/step_00000012"
        )
    config = config_from_dict(PretrainConfig, json.loads(config_file.read_text()))
    device = torch.device("cuda" if config.scaling.use_gpu and torch.cuda.is_available() else "cpu")
    dumped = load_state(dump)
    state = TrainState.build(config, device)
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
    device = next(state.model.parameters()).device
    total, bad = 0.0, []
    for draws in micros:
        batch = factory.batch(draws)
        images, mask = to_device(batch, config, device)
        loss = float(forward_backward(state.model, state.teacher, images, mask, config)[0])
        total += loss
        if not math.isfinite(loss):
            bad += _bad_samples(config, state, factory, batch)
    grad_norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), math.inf))
    state.optimizer.zero_grad(set_to_none=True)
    step = recorded[0]["step"]
    return ReplayedStep(step, total, grad_norm, recorded[0]["grad_norm"], bad)


def _bad_samples(
    config: PretrainConfig, state: TrainState, factory: SampleFactory, batch: Batch
) -> list[str]:
    """Where the samples are whose loss alone is not finite."""
    device = next(state.model.parameters()).device
    bad = []
    for i, row in enumerate(batch["row"].tolist()):
        alone = {key: values[i : i + 1] for key, values in batch.items()}
        images, mask = to_device(alone, config, device)
        loss = float(forward_backward(state.model, state.teacher, images, mask, config)[0])
        if not math.isfinite(loss):
            bad.append(factory.reader.location(row))
    return bad


def replay_report(steps: list[ReplayedStep]) -> str:
    """One line a step, and what to look at."""
    lines = []
    for step in steps:
        lines.append(
            f"step {step.step + 1}: loss {step.loss:.6g}, gradient norm {step.grad_norm:.6g} "
            f"(the run had {step.recorded_grad_norm:.6g})"
        )
        lines += [f"  loss not finite for {path}" for path in step.bad_samples]
    if not any(step.bad_samples for step in steps):
        lines.append("no single sample is at fault: look at the weights and the learning rate")
    return "\n".join(lines)
