"""Float32 products go through oneDNN where that gains, and nowhere where it rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import onednn_products
from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.finetune_config import Task
from pipeline.onednn_products import is_exact, processor_gains, use_onednn
from pipeline.pretrain_config import PretrainConfig
from tests.pipeline.finetune_loop import LocalFinetune, finetune_config
from tests.pipeline.loop import LocalRun


@pytest.fixture
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor is."""
    monkeypatch.setattr(onednn_products, "processor_gains", lambda: True)


def rounding(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def rounding_when_large(a: Tensor, b: Tensor) -> Tensor:
    return rounding(a, b) if a.shape[-1] >= 512 else a @ b


def rounding_batches(a: Tensor, b: Tensor) -> Tensor:
    return rounding(a, b) if a.ndim == 3 else a @ b


def rounding_transposed(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if a.is_contiguous() else rounding(a, b)


def test_products_that_round_are_told_from_those_that_do_not():
    torch.set_float32_matmul_precision("highest")
    assert is_exact(torch.matmul)
    for product in (rounding, rounding_when_large, rounding_batches, rounding_transposed):
        assert not is_exact(product), product


@pytest.mark.usefixtures("gaining")
@pytest.mark.parametrize("exact", [True, False])
def test_the_precision_is_lowered_only_where_nothing_is_rounded(
    exact: bool, monkeypatch: pytest.MonkeyPatch
):
    asked_at: list[str] = []

    def ask(matmul: object) -> bool:
        asked_at.append(torch.get_float32_matmul_precision())
        return exact

    monkeypatch.setattr(onednn_products, "is_exact", ask)
    assert use_onednn() is exact
    assert asked_at == ["medium"], "asked of the products that would be used"
    assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")


def test_nothing_changes_where_it_does_not_gain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn_products, "processor_gains", lambda: False)
    assert not use_onednn()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("gaining")
def test_products_keep_the_precision_of_float32():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    by_torch = a @ b
    is_used = use_onednn()  # or not, on a processor that would round
    product = a @ b
    error = (product.double() - a.double() @ b.double()).abs().max()
    assert error < 1e-3, "bfloat16 would be off by 0.3"
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert torch.equal(product, by_torch) is not is_used, "other sums, other last bits"


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


@pytest.mark.usefixtures("one_thread", "gaining")
@pytest.mark.parametrize("changes", [{}, {"scaling.grad_checkpointing": True}], ids=str)
def test_a_run_through_it_is_the_run_and_resumes_bit_for_bit(
    changes: dict[str, object], debug_config: PretrainConfig, tmp_path: Path
):
    config = apply_overrides(debug_config, {"optim.num_steps": 4, **changes})
    plain = LocalRun(config, tmp_path / "plain")
    plain()
    is_used = use_onednn()
    whole = LocalRun(config, tmp_path / "whole")
    whole()
    resumed = [LocalRun(config, tmp_path / "resumed", stop_at=step) for step in (2, -1)]
    for run in resumed:
        run()
    assert resumed[1].started_at == 2
    states = [load_state(run.checkpointer.latest()) for run in (whole, resumed[1], plain)]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        same = (torch.equal(t, states[2]["model"][k]) for k, t in states[0]["model"].items())
        assert all(same) is not is_used, "other sums, other last bits"
    for key, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][key]), key
        torch.testing.assert_close(tensor, states[2]["model"][key], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("one_thread", "gaining")
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_fine_tuning_through_it_has_the_losses_without_it(task: Task, tmp_path: Path):
    config = finetune_config(task, tmp_path / "data", optim__num_steps=2)
    records = []
    for name in ("plain", "through it"):
        run = LocalFinetune(config, tmp_path / name)
        run()
        records.append(run.records)
        use_onednn()
    for step, record in records[0].items():
        loss = record["train/loss"]
        assert records[1][step]["train/loss"] == pytest.approx(loss, rel=1e-4), step
