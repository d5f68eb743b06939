"""Rules of the house that a reader relies on: imports point one way, files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT

SOURCES = [p for room in ("models", "pipeline", "jobs") for p in (REPO_ROOT / room).rglob("*.py")]
PURE_PIPELINE = set(
    """config recipes transforms masking optim schedules metrics checkpoint reproducibility
    between_steps parallel
    pretrain_evaluation pretrain pictures sampling sources run_folder demo_data storage shards
    quarantine decoding reading""".split()  # noqa: SIM905
)
ALLOWED_IN_MODELS = {"models", "torch", "torchvision", "timm", "safetensors"}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages a file imports anywhere, also inside functions."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            packages.add((node.module or "").split(".")[0])
    return packages


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_point_from_jobs_to_pipeline_to_models(path: Path):
    packages = imported_packages(path)
    if path.parent.name == "models":
        foreign = packages - ALLOWED_IN_MODELS - set(sys.stdlib_module_names)
        assert not foreign, f"models/ needs torch, torchvision and timm only, not {foreign}"
    assert "jobs" not in packages or path.parent.name == "jobs"
    if path.parent.name == "pipeline" and path.stem in PURE_PIPELINE:
        assert not packages & {"ray", "mlflow"}, "the pure ring knows neither Ray nor MLflow"


def test_importing_has_no_side_effects_on_ray_or_logging():
    code = (
        "import logging, ray, torch; before = list(logging.getLogger().handlers);"
        "import models.itpn, pipeline.data, pipeline.trainer, pipeline.prepare.job;"
        "assert logging.getLogger().handlers == before;"
        "assert not ray.is_initialized() and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO_ROOT, timeout=120)


def test_a_data_worker_does_not_import_torch():
    code = "import pipeline.data, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO_ROOT, timeout=120)


def test_files_are_short_and_named_for_what_they_own():
    for path in (*SOURCES, *(REPO_ROOT / "tests").rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 500, f"{path} is over 500 lines; split it"
        assert path.stem not in ("utils", "helpers", "common", "misc"), path
    for path in (REPO_ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 70, f"{path}: a job parses and calls"
    assert not list((REPO_ROOT / "docker").glob("__init__.py")), "would shadow the Docker SDK"
