"""Samples shared by any number of workers in any order must give one worker's result."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

Sample = TypeVar("Sample")


def merged_keepers(
    make: Callable[[], Any],
    add: Callable[[Any, list[Sample]], None],
    samples: list[Sample],
    num_workers: int,
    seed: int,
) -> list[Any]:
    """Every worker's keeper after the evaluation loop: shuffled, shared unevenly, gathered, merged.

    Args:
        make: an empty keeper.
        add: adds some samples, at least one, as one batch or one by one.
        samples: what one worker would see in this order.
        num_workers: some of them may get nothing.
        seed: of the order, the shares and the batches.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(samples))
    worker_of = generator.integers(0, num_workers, len(samples))
    keepers = [make() for _ in range(num_workers)]
    for worker, keeper in enumerate(keepers):
        mine = [samples[i] for i in order if worker_of[i] == worker]
        while mine:
            size = int(generator.integers(1, len(mine) + 1))
            add(keeper, mine[:size])
            mine = mine[size:]
    states = [pickle.dumps(keeper.state()) for keeper in keepers]
    for keeper in keepers:
        keeper.merge([pickle.loads(states[i]) for i in generator.permutation(num_workers)])
    return keepers
