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


def teacher_momentum(step: int, *, start: float, num_steps: int) -> float:
    """From `start` to 1 on a cosine (Grill et al., arXiv:2006.07733, section 3.3)."""
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
