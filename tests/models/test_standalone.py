"""The models without the pipeline: a step trains with Ray, MLflow and pyarrow out of reach."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]

TRAIN_WITHOUT_THE_PIPELINE = """
import importlib, pkgutil, sys

BLOCKED = {"ray", "mlflow", "pyarrow", "pipeline"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for name in sorted(BLOCKED):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "is blocked" in str(error)
    else:
        raise SystemExit(f"{name} could be imported: the test proves nothing")

import torch
import models
for module in pkgutil.iter_modules(models.__path__):
    importlib.import_module(f"models.{module.name}")

from models.pretraining import create_pretraining_model
from models.teacher import EMATeacher
from models.tokens import split_tokens

torch.manual_seed(0)
model = create_pretraining_model("itpn_debug", mfm_weight=0.3).train()
teacher = EMATeacher(model.encoder.backbone)
trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3)
before = {n: p.detach().clone() for n, p in model.named_parameters()}
teacher_before = [p.clone() for p in teacher.parameters()]

images = torch.randn(2, 3, 64, 64)
mask = torch.rand(2, 16).argsort(dim=1) >= 4
losses = model(images, mask, teacher(images, split_tokens(mask)[1]))
losses.total.backward()
optimizer.step()
teacher.update(model.encoder.backbone, 0.9)

assert losses.total.isfinite() and set(losses.mfm) == {4, 8, 16}
for name, p in model.named_parameters():
    assert torch.equal(p, before[name]) != p.requires_grad, name
assert any(not torch.equal(a, b) for a, b in zip(teacher_before, teacher.parameters()))
assert not BLOCKED & set(sys.modules), "blocked modules were imported"
print("trained")
"""


def run_python(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_models_import_and_train_a_step_without_ray_mlflow_pyarrow_and_pipeline():
    assert run_python(TRAIN_WITHOUT_THE_PIPELINE) == "trained"


def test_the_table_of_variants_is_read_without_importing_torch():
    script = "import sys, models.variants; print('torch' in sys.modules)"
    assert run_python(script) == "False"
