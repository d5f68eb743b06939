"""What a micro-batch draws depends on (seed, step, micro-batch), and on nothing drawn before."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pipeline.draws import seed_draws

PLACE = (5, 40, 3)
GENERATORS = ("torch", "numpy", "python")


def drawn(place: tuple[int, int, int], count: int = 8) -> dict[str, list[float]]:
    """Numbers from each global generator after seeding for a place in a run."""
    seed_draws(*place)
    return {
        "torch": torch.rand(count, dtype=torch.float64).tolist(),
        "numpy": np.random.random(count).tolist(),
        "python": [random.random() for _ in range(count)],
    }


def test_the_same_place_draws_the_same_whatever_was_drawn_before() -> None:
    first = drawn(PLACE)
    drawn((1, 2, 3), 100)
    torch.rand(7)
    np.random.random(7)
    random.random()
    assert drawn(PLACE) == first


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("argument", [0, 1, 2], ids=["seed", "step", "micro_batch"])
def test_every_argument_changes_every_generator(generator: str, argument: int) -> None:
    other = tuple(value + (i == argument) for i, value in enumerate(PLACE))
    ours, others = drawn(PLACE)[generator], drawn((other[0], other[1], other[2]))[generator]
    assert all(a != b for a, b in zip(ours, others, strict=True))


def test_arguments_are_not_added_up_or_confused_with_each_other() -> None:
    places = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    for generator in GENERATORS:
        assert len({drawn(place, 1)[generator][0] for place in places}) == len(places)


def test_each_generator_has_a_seed_of_its_own() -> None:
    """torch's and numpy's are the same Mersenne twister: equal seeds would draw equal words."""
    seed_draws(*PLACE)
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    numpy_seed = int(state["state"]["key"][0])  # the first word is the seed until one is drawn
    torch_seeds = (torch.initial_seed() % 2**32, torch.initial_seed() >> 32)
    assert numpy_seed not in torch_seeds
    for seed in (numpy_seed, *torch_seeds):
        assert random.getstate() != random.Random(seed).getstate()


def test_large_seeds_and_long_runs_are_taken_whole() -> None:
    """Bits above 32 count, too."""
    for argument in range(3):
        small, large = list(PLACE), list(PLACE)
        large[argument] += 2**32
        assert drawn((small[0], small[1], small[2])) != drawn((large[0], large[1], large[2]))


def test_torch_is_seeded_with_64_bits() -> None:
    """Its generator on GPUs uses them all; of 32, two in 100,000 steps are likely to be equal."""
    seeds = []
    for step in range(20):
        seed_draws(0, step, 0)
        seeds.append(torch.initial_seed())
    assert max(seeds) > 2**62 and len({seed % 2**32 for seed in seeds}) == 20
    assert len({seed >> 32 for seed in seeds}) == 20
