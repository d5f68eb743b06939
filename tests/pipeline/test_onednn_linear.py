"""Linear layers through oneDNN are linear layers, and are used where they gain."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from pipeline import onednn_linear
from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.finetune_config import Task
from pipeline.onednn_linear import OneDnnLinear, processor_gains, use_onednn
from pipeline.pretrain_config import PretrainConfig
from tests.pipeline.finetune_loop import LocalFinetune, finetune_config
from tests.pipeline.loop import LocalRun

LARGE, SMALL = (2, 50, 4, 256), (2, 256)
"""Inputs of a layer of 256 -> 512."""


def pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(256, 512, bias=bias)
    swapped = copy.deepcopy(plain)
    use_onednn(swapped)
    return plain, swapped


def product(layer: nn.Linear, input: torch.Tensor) -> list[torch.Tensor | None]:
    """Output, and the gradients of input, weight and bias."""
    input = input.clone().requires_grad_()
    output = layer(input)
    (output.float() ** 2).sum().backward()
    return [
        output,
        input.grad,
        *(None if p is None else p.grad for p in (layer.weight, layer.bias)),
    ]


@pytest.fixture
def onednn_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that went through oneDNN; whichever processor this is."""
    calls: list[int] = []
    suits = onednn_linear._suits

    def watched(input: torch.Tensor, weight: torch.Tensor) -> bool:
        if answer := suits(input, weight):
            calls.append(1)
        return answer

    monkeypatch.setattr(onednn_linear, "_suits", watched)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_large_products_and_their_gradients_are_the_same(
    bias: bool, is_contiguous: bool, onednn_calls: list[int]
):
    plain, swapped = pair(bias)
    assert type(swapped) is OneDnnLinear
    input = torch.randn(LARGE) if is_contiguous else torch.randn(LARGE[::-1]).permute(3, 2, 1, 0)
    with mock.patch.object(onednn_linear, "_LEAST_MULTIPLY_ADDS", input.numel() * 512):
        found = product(swapped, input)
    assert onednn_calls
    for left, right in zip(found, product(plain, input), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["small", "autocast", "bfloat16", "one vector"])
def test_others_are_left_to_torch(kind: str, onednn_calls: list[int]):
    plain, swapped = pair()
    input = torch.randn(SMALL if kind == "small" else LARGE)
    with mock.patch.object(onednn_linear, "_LEAST_MULTIPLY_ADDS", 1 if kind != "small" else 10**9):
        if kind == "bfloat16":
            plain, swapped, input = plain.bfloat16(), swapped.bfloat16(), input.bfloat16()
        if kind == "one vector":
            input = torch.randn(256)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            found, expected = product(swapped, input), product(plain, input)
    assert not onednn_calls
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def test_copies_take_it_along_and_state_dicts_know_nothing_of_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2, bias=False)))
    keys = list(model.state_dict())
    use_onednn(model, None)
    assert [type(m) for m in copy.deepcopy(model).modules()].count(OneDnnLinear) == 2
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "gains"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AVX2", False),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "AVX512", False),
        ("processor\t: 0\n", "AVX512", False),
    ],
)
def test_it_gains_on_amd_with_avx512(
    cpuinfo: str, capability: str, gains: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert processor_gains() is gains


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changes", [{}, {"scaling.grad_checkpointing": True}], ids=str)
def test_a_run_through_it_is_the_run_and_resumes_bit_for_bit(
    changes: dict[str, object],
    debug_config: PretrainConfig,
    tmp_path: Path,
    onednn_calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    config = apply_overrides(debug_config, {"optim.num_steps": 4, **changes})
    monkeypatch.setattr("pipeline.pretrain.processor_gains", lambda: False)
    plain = LocalRun(config, tmp_path / "plain")
    plain()
    assert not onednn_calls
    monkeypatch.setattr("pipeline.pretrain.processor_gains", lambda: True)
    monkeypatch.setattr(onednn_linear, "_LEAST_MULTIPLY_ADDS", 0)
    whole = LocalRun(config, tmp_path / "whole")
    whole()
    assert onednn_calls
    resumed = [LocalRun(config, tmp_path / "resumed", stop_at=step) for step in (2, -1)]
    for run in resumed:
        run()
    assert resumed[1].started_at == 2
    states = [load_state(run.checkpointer.latest()) for run in (whole, resumed[1], plain)]
    for key, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][key]), key
        torch.testing.assert_close(tensor, states[2]["model"][key], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_fine_tuning_through_it_has_the_losses_without_it(
    task: Task, tmp_path: Path, onednn_calls: list[int], monkeypatch: pytest.MonkeyPatch
):
    config = finetune_config(task, tmp_path / "data", optim__num_steps=2)
    monkeypatch.setattr(onednn_linear, "_LEAST_MULTIPLY_ADDS", 0)
    records = []
    for gains in (False, True):
        monkeypatch.setattr("pipeline.finetune.processor_gains", lambda gains=gains: gains)
        run = LocalFinetune(config, tmp_path / str(gains))
        run()
        assert bool(onednn_calls) is gains
        records.append(run.records)
    for step, record in records[0].items():
        loss = record["train/loss"]
        assert records[1][step]["train/loss"] == pytest.approx(loss, rel=1e-4), step
