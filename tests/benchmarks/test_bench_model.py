"""The model benchmark: its reference is the same arithmetic, its modes learn the same."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from models.pretraining import create_pretraining_model
from models.teacher import EMATeacher
from models.tokens import split_tokens
from pipeline.onednn_products import is_exact
from tests.conftest import REPO_ROOT

sys.path.insert(0, str(REPO_ROOT / "benchmarks"))
import bench_model
from reference_model import ReferenceModel, ReferenceTeacher

NANO = "itpn_nano_patch16_224"
NUM_STEPS = 100


@pytest.mark.parametrize("mfm_weight", [0.0, 0.3])
def test_the_reference_has_our_losses_and_gradients_in_float64(mfm_weight: float):
    torch.manual_seed(0)
    ours = create_pretraining_model(NANO, img_size=64, mfm_weight=mfm_weight).double()
    theirs = ReferenceModel(ours).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    mask = torch.rand(3, 16).argsort(dim=1) < 12
    features = targets = None
    if mfm_weight:
        teachers = EMATeacher(ours.encoder.backbone), ReferenceTeacher(theirs)
        for teacher in teachers:  # not the student's weights any more
            with torch.no_grad():
                for parameter in teacher.backbone.parameters():
                    parameter.mul_(1.1)
        features = teachers[0](images, split_tokens(mask)[1])
        targets = teachers[1](images, mask)
    loss, expected = theirs(images, mask, targets), ours(images, mask, features).total
    torch.testing.assert_close(loss.float(), expected.float(), rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert len(gradients) > 100
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:  # both compute losses in float32 at places
            torch.testing.assert_close(
                parameter.grad, gradients[name], rtol=1e-5, atol=1e-7, msg=name
            )


def test_moving_averages_agree():
    ours = create_pretraining_model(NANO, img_size=64)
    theirs = ReferenceModel(ours)
    teachers = EMATeacher(ours.encoder.backbone), ReferenceTeacher(theirs)
    with torch.no_grad():
        for model in (ours, theirs):
            for parameter in model.parameters():
                parameter.add_(1.0)
    teachers[0].update(ours.encoder.backbone, 0.9)
    teachers[1].update(theirs, 0.9)
    averages = [dict(teacher.backbone.named_parameters()) for teacher in teachers]
    assert averages[0].keys() == averages[1].keys()
    for name, average in averages[0].items():
        torch.testing.assert_close(average, averages[1][name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "medium"], ids=["torch", "onednn"])
def test_every_mode_has_the_loss_curve_of_the_reference_for_100_steps(precision: str):
    """Bands: 1e-3 for float32, where rounding adds up; 1 % for bfloat16."""
    args = argparse.Namespace(device="cpu", model="itpn_debug", batch_size=4)
    torch.manual_seed(0)
    batches = [
        bench_model.Batch(
            torch.nn.functional.interpolate(torch.randn(4, 3, 14, 14), 224, mode="bilinear"),
            torch.rand(4, 196).argsort(dim=1) < 147,
        )
        for _ in range(4)
    ]
    curves: dict[str, torch.Tensor] = {}
    for mode in bench_model.MODES:
        torch.set_float32_matmul_precision("highest" if mode == "reference" else precision)
        if not is_exact(torch.matmul):
            pytest.skip("oneDNN rounds to bfloat16 on this processor and is not used")
        step = bench_model.make_step(args, mode, "mim_mfm")
        losses = [step(batches[i % len(batches)]) for i in range(NUM_STEPS)]
        curves[mode] = torch.stack(losses).float()
    reference = curves.pop("reference")
    assert reference[-1] < 0.97 * reference[0], "there is a curve"
    for mode, curve in curves.items():
        band = 1e-2 if mode == "bf16" else 1e-3
        torch.testing.assert_close(curve, reference, rtol=band, atol=0, msg=mode)


@pytest.mark.slow
def test_the_last_line_has_a_row_for_every_mode_and_objective():
    command = [sys.executable, "benchmarks/bench_model.py", "--model", "itpn_debug"]
    command += ["--batch-size", "2", "--rounds", "1", "--modes", "reference", "eager", "bf16"]
    done = subprocess.run(
        command,
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == ["reference", "eager", "bf16"]
    for rows in result.values():
        assert list(rows) == ["mim", "mim_mfm"]
        for row in rows.values():
            assert set(row) == {
                *("ratio_vs_reference", "images_per_s", "flops_per_image", "mfu", "peak_mb")
            }
            assert all(value > 0 for value in row.values())
        assert rows["mim_mfm"]["flops_per_image"] > 1.1 * rows["mim"]["flops_per_image"]
    assert result["reference"]["mim"]["ratio_vs_reference"] == 1
