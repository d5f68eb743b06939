"""Schedules as pure functions of the step: there is no scheduler object to save or restore."""

from __future__ import annotations

import math


def warmup_cosine(
    step: float, *, peak: float, final: float, warmup_steps: float, num_steps: float
) -> float:
    """Linear from 0 to `peak` over the warm-up, then a cosine to `final`.

    The official per-iteration schedule (itpn_pixel/util/lr_sched.py), in steps instead of epochs.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1e-12)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def warmup_step(
    step: float,
    *,
    peak: float,
    warmup_steps: float,
    num_steps: float,
    milestones: tuple[float, ...],
) -> float:
    """Linear from 0 to `peak` over the warm-up; a tenth from each milestone on.

    Args:
        step: of the run, from 0.
        peak: rate after the warm-up.
        warmup_steps: length of the warm-up.
        num_steps: length of the run.
        milestones: shares of the run, as 9 and 11 of 12 epochs (det/configs/itpn).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * math.prod(0.1 for milestone in milestones if step >= milestone * num_steps)


def warmup_poly(
    step: float, *, peak: float, final: float, warmup_steps: float, num_steps: float
) -> float:
    """A line from `peak` at step 0 to `final`, risen up to over the warm-up.

    The warm-up multiplies the line (mmcv's PolyLrUpdaterHook with power 1, seg/configs/itpn).
    """
    line = final + (peak - final) * (1 - min(step / num_steps, 1.0))
    return line * min(1.0, step / warmup_steps) if warmup_steps > 0 else line


def teacher_momentum(step: int, *, start: float, num_steps: int) -> float:
    """From `start` to 1 on a cosine (Grill et al., arXiv:2006.07733, section 3.3)."""
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
