"""However a model is computed, it is the official one: compiled, by oneDNN, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import attention
from models.pretraining import PretrainingModel
from models.weights import load_weights
from pipeline.compilation import compile_training
from pipeline.onednn_linear import use_onednn
from tests.models import golden

BF16_LOSS, BF16_GRADIENT = 5e-3, 0.06
"""Relative: 8 bits of mantissa leave 4e-3 a number; a gradient is compared as a whole vector."""


def model_of(case: golden.GoldenCase) -> PretrainingModel:
    model = golden.build_mim(case).eval()
    load_weights(model, case.group("w/"))
    return model


def mask_of(case: golden.GoldenCase) -> Tensor:
    return case.group("out/")["mask"].bool()


def recomputing(model: PretrainingModel) -> None:
    model.encoder.backbone.set_grad_checkpointing()


@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        *((name, compile_training) for name in golden.case_names(golden.MIM_CLASSES)),
        *((name, recomputing) for name in golden.case_names(golden.MIM_CLASSES)),
        *((name, use_onednn) for name in golden.case_names(golden.MIM_CLASSES)),
    ],
)
def test_float32_modes_keep_official_losses_and_gradients(
    name: str, prepare: Callable[[PretrainingModel], None], monkeypatch: pytest.MonkeyPatch
):
    # The golden models are small.
    monkeypatch.setattr("pipeline.onednn_linear._LEAST_MULTIPLY_ADDS", 0)
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


@pytest.mark.parametrize("with_bias", [False, True])
def test_plain_attention_of_bfloat16_on_cpus_is_attention(with_bias: bool):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8) for _ in range(3))
    bias = torch.randn(3, 20, 20) if with_bias else None
    low = None if bias is None else bias.bfloat16()
    found = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), low)
    assert found.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    assert torch.equal(attention(q, k, v, bias), expected), "float32 goes through the fused kernel"
