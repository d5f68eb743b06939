"""Seeding what a training step draws: dropout, drop path, mixup, erasing, sampled regions.

Surprising: the global generators of torch, numpy and Python are seeded anew for every micro-batch,
from (seed, step, micro-batch). So their state need not be saved, and it does not matter which
worker a micro-batch falls to.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_draws(seed: int, step: int, micro_batch: int) -> None:
    """Seed all global generators for one micro-batch of one step."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(4, np.uint32).tolist()
    torch.manual_seed(words[0] << 32 | words[1])  # of all devices
    np.random.seed(words[2])
    random.seed(words[3])
