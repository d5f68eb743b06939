"""Data parallelism: when gradients travel, and that batch norms end up the same everywhere."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pipeline.parallel import (
    average_batch_norms,
    no_sync_unless,
    parallel,
    with_shared_batch_norms,
)
from pipeline.train_state import Worker
from tests.pipeline.two_batch_norms import average_together, model_with_batch_norms

ALONE = Worker()
PAIR = Worker(0, 2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    mp.spawn(average_together, args=(f"{folder}/meeting", str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_running_statistics_become_their_mean_on_both_workers(pair: list[dict[str, Any]]) -> None:
    """Models hold numbers 0 and 1, so the mean is that of a model of number 0.5."""
    mean = model_with_batch_norms(0.5).state_dict()
    averaged = {f"{n}.running_{k}" for n in ("1", "2.0") for k in ("mean", "var")}
    for key in averaged:
        for found in pair:
            torch.testing.assert_close(found["state"][key], mean[key], rtol=0, atol=0)
    for rank, found in enumerate(pair):
        before = model_with_batch_norms(rank).state_dict()
        assert averaged < before.keys()
        for key in before.keys() - averaged:  # parameters, counters, norms of other kinds
            assert torch.equal(found["state"][key], before[key]), key


def test_gradients_are_averaged_at_the_last_micro_batch_only(pair: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(pair):
        gradients = found["gradients"]
        assert gradients["is_wrapped"]
        first, last = (float(g) for g in gradients["seen"])
        assert first == 1.0 + rank, "a gradient of this worker alone"
        assert last == ((1 + 11) + (2 + 12)) / 2


def test_one_worker_is_neither_wrapped_nor_averaged() -> None:
    model = model_with_batch_norms(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert parallel(model, ALONE) is model
    average_batch_norms(model, ALONE)  # without a process group
    assert with_shared_batch_norms(model, ALONE) is model
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_batch_norms_of_cpu_workers_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    kinds = [type(module) for module in model.modules()]
    assert with_shared_batch_norms(model, PAIR) is model
    assert [type(module) for module in model.modules()] == kinds
    assert with_shared_batch_norms(model, Worker(0, 1, torch.device("cuda"))) is model
    assert [type(module) for module in model.modules()] == kinds


def test_batch_norms_of_gpu_workers_are_shared_and_keep_their_parameters() -> None:
    model = model_with_batch_norms(1)
    parameters = dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    shared = with_shared_batch_norms(model, Worker(0, 2, torch.device("cuda", 0)))
    assert [type(shared[1]), type(shared[2][0])] == [nn.SyncBatchNorm] * 2  # type: ignore[index]
    assert all(p is parameters[name] for name, p in shared.named_parameters())
    assert shared.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in shared.state_dict().items())


def test_what_is_not_wrapped_needs_no_pause_of_gradients() -> None:
    for is_last in (True, False):
        context = no_sync_unless(is_last, nn.Linear(1, 1))
        assert isinstance(context, contextlib.nullcontext)


def test_a_device_is_named_only_for_gpus(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    for device, expected in (("cpu", None), ("cuda:1", [torch.device("cuda:1")])):
        with mock.patch("pipeline.parallel.DistributedDataParallel") as wrap:
            parallel(model, Worker(1, 2, torch.device(device)))
        # Buffers are averaged by `average_batch_norms`, not taken over from worker 0.
        wrap.assert_called_once()
        assert wrap.call_args.args == (model,)
        settings = wrap.call_args.kwargs
        assert settings["device_ids"] == expected and settings["broadcast_buffers"] is False
