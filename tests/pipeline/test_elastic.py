"""Any number of workers computes the same step: its micro-batches are shared, not changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config_values import apply_overrides
from pipeline.data import SampleFactory, micro_batches, sample_stream
from pipeline.pretrain import forward_backward, to_device
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import debug
from pipeline.sources import build_index
from pipeline.train_state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@settings(deadline=None)
@given(share=st.integers(1, 40), most=st.integers(1, 24), largest=st.integers(1, 50))
def test_every_micro_batch_has_one_worker_and_every_worker_has_work_at_any_size(
    share: int, most: int, largest: int
) -> None:
    overrides = {
        "data.global_batch_size": share * most,
        "scaling.num_workers": (1, most),
        "scaling.max_batch_size_per_worker": largest,
    }
    config = apply_overrides(debug(), overrides)
    for world_size in range(1, most + 1):
        taken = [config.micro_batches_of(rank, world_size) for rank in range(world_size)]
        assert [m for part in taken for m in part] == list(range(config.num_micro_batches))
        sizes = [len(part) for part in taken]
        assert min(sizes) >= 1, "a worker without one would never join the reduction"
        assert max(sizes) - min(sizes) <= 1


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_workers(image_folder: Path) -> None:
    config = elastic_config(image_folder, most=6, batch_size=12)
    stream = sample_stream(config, build_index(str(image_folder)))
    whole = micro_batches(stream, config, 3)
    for world_size in range(1, 7):
        parts = [
            micro
            for rank in range(world_size)
            for micro in micro_batches(stream, config, 3, rank, world_size)
        ]
        assert len(parts) == len(whole) == 6
        for part, expected in zip(parts, whole, strict=True):
            for column, column_expected in zip(part, expected, strict=True):
                np.testing.assert_array_equal(column, column_expected)


def elastic_config(image_folder: Path, most: int, batch_size: int) -> PretrainConfig:
    overrides = {
        "data.path": str(image_folder),
        "data.image_size": 32,
        "data.global_batch_size": batch_size,
        "scaling.num_workers": (1, most),
        "scaling.max_batch_size_per_worker": batch_size // most,
    }
    return apply_overrides(debug(), overrides)


def step_of_workers(
    config: PretrainConfig, image_folder: Path, world_size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and losses of the first step, averaged over workers as data parallelism does."""
    index = build_index(str(image_folder))
    factory, stream = SampleFactory.build(config, index), sample_stream(config, index)
    gradients: dict[str, Tensor] = {}
    losses = torch.zeros(5)
    state = TrainState.build(config, CPU)
    for rank in range(world_size):
        for draws in micro_batches(stream, config, 0, rank, world_size):
            images, mask = to_device(factory.batch(draws), config, CPU)
            losses += (
                forward_backward(
                    state.model, state.teacher, images, mask, config, world_size=world_size
                )
                / world_size
            )
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                share = parameter.grad / world_size
                gradients[name] = gradients[name] + share if name in gradients else share
        state.optimizer.zero_grad(set_to_none=True)
    return gradients, losses


@pytest.mark.parametrize("num_micros", [2, 4])
def test_one_worker_with_the_micro_batches_of_two_has_their_gradients_bit_for_bit(
    image_folder: Path, num_micros: int
) -> None:
    config = elastic_config(image_folder, most=2, batch_size=8)
    config = apply_overrides(config, {"scaling.max_batch_size_per_worker": 8 // num_micros})
    assert config.num_micro_batches == num_micros
    (two, two_losses), (one, one_losses) = (
        step_of_workers(config, image_folder, world_size) for world_size in (2, 1)
    )
    assert two.keys() == one.keys() and len(one) > 50
    for name, gradient in one.items():
        if num_micros == 2:
            assert torch.equal(two[name], gradient), name
        assert_nearly_equal(two[name], gradient, name)
    torch.testing.assert_close(two_losses, one_losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("most", "world_size"), [(4, 2), (4, 3), (4, 4), (6, 4), (3, 2)])
def test_gradients_are_equal_also_where_the_micro_batches_do_not_divide(
    image_folder: Path, most: int, world_size: int
) -> None:
    config = elastic_config(image_folder, most, batch_size=2 * most)
    several, several_losses = step_of_workers(config, image_folder, world_size)
    one, one_losses = step_of_workers(config, image_folder, 1)
    assert several.keys() == one.keys()
    for name, gradient in one.items():
        assert_nearly_equal(several[name], gradient, name)
    torch.testing.assert_close(several_losses, one_losses, rtol=1e-6, atol=0)


def assert_nearly_equal(left: Tensor, right: Tensor, name: str) -> None:
    """Within 5e-6 of the largest entry: float32 sums in another order."""
    assert (left - right).abs().max() <= 5e-6 * right.abs().max(), name
