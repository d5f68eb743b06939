"""However a model is computed, it is the official one: compiled, by oneDNN, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.itpn import create_itpn
from models.layers import MOST_PLAIN, attention
from models.pretraining import PretrainingModel
from models.weights import load_weights
from pipeline.compilation import compile_training
from pipeline.onednn_products import is_exact
from tests.models import golden

BF16_LOSS, BF16_GRADIENT = 5e-3, 0.06
"""Relative: 8 bits of mantissa leave 4e-3 a number; a gradient is compared as a whole vector."""


def model_of(case: golden.GoldenCase) -> PretrainingModel:
    model = golden.build_mim(case).eval()
    load_weights(model, case.group("w/"))
    return model


def mask_of(case: golden.GoldenCase) -> Tensor:
    return case.group("out/")["mask"].bool()


def through_onednn(model: PretrainingModel) -> None:
    torch.set_float32_matmul_precision("medium")
    if not is_exact(torch.matmul):
        pytest.skip("oneDNN rounds to bfloat16 on this processor and is not used")


def recomputing(model: PretrainingModel) -> None:
    model.encoder.backbone.set_grad_checkpointing()


@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        *((name, compile_training) for name in golden.case_names(golden.MIM_CLASSES)),
        *((name, recomputing) for name in golden.case_names(golden.MIM_CLASSES)),
        *((name, through_onednn) for name in golden.case_names(golden.MIM_CLASSES)),
    ],
)
def test_float32_modes_keep_official_losses_and_gradients(
    name: str, prepare: Callable[[PretrainingModel], None]
):
    case = golden.load_case(name)
    model = model_of(case)
    keys = list(model.state_dict())
    prepare(model)
    loss = model(case.group("in/")["image"], mask_of(case)).total
    torch.testing.assert_close(loss, case.group("out/")["loss"].float(), rtol=1e-4, atol=1e-5)
    loss.backward()
    gradients = golden.official_grads(model)
    for parameter, norm in case.info["grad_norm"].items():
        assert float(gradients[parameter].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7)
    assert list(model.state_dict()) == keys, "checkpoints know nothing of it"


@pytest.mark.parametrize("name", golden.case_names(golden.MIM_CLASSES))
def test_bfloat16_keeps_official_losses_and_gradients_within_its_own_tolerance(name: str):
    case = golden.load_case(name)
    model = model_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(case.group("in/")["image"], mask_of(case)).total
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, case.group("out/")["loss"].float(), rtol=BF16_LOSS, atol=0)
    loss.backward()
    found = {k: g for k, g in golden.official_grads(model).items() if g is not None}
    exact = model_of(case)
    exact(case.group("in/")["image"], mask_of(case)).total.backward()
    expected = {k: g for k, g in golden.official_grads(exact).items() if g is not None}
    assert found.keys() == expected.keys()
    left, right = (torch.cat([g.flatten() for g in d.values()]) for d in (found, expected))
    assert (left - right).norm() < BF16_GRADIENT * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "bias", "bias by image", "seen"])
def test_plain_attention_on_cpus_is_attention(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    q = torch.randn(2, 3, 20, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 3, 25, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    masks = {
        "bias": torch.randn(3, 20, 25, dtype=dtype),
        "bias by image": torch.randn(2, 3, 20, 25, dtype=dtype),
        "seen": torch.rand(2, 1, 20, 25) < 0.5,
    }
    mask = masks.get(kind)
    weight = torch.randn(2, 3, 20, 8)

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        found = attend(q, k, v, mask)
        assert found.dtype == dtype
        return [found, *torch.autograd.grad((found * weight).sum(), (q, k, v))]

    expected = run(F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # plain, then
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for left, right in zip(run(attention), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_long_sequences_and_exported_graphs_keep_fused_attention(monkeypatch: pytest.MonkeyPatch):
    fused: list[int] = []
    of_torch = F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        fused.append(args[1].shape[-2])
        return of_torch(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for length in (MOST_PLAIN, MOST_PLAIN + 1):
        attention(*torch.randn(3, 1, 1, length, 4))
        attention(torch.randn(1, 1, 4, 4), *torch.randn(2, 1, 1, length, 4))
    assert fused == [MOST_PLAIN + 1] * 2
    monkeypatch.undo()
    graph = torch.export.export(
        create_itpn("itpn_debug").eval(), (torch.randn(1, 3, 64, 64),)
    ).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert any("scaled_dot_product_attention" in name for name in called)
    assert not any("bmm" in name for name in called)
