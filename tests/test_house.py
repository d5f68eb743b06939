"""Rules of the house that a reader relies on: imports point one way, files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from pipeline import evaluation_run, finetuning_run
from tests.conftest import REPO_ROOT

SOURCES = [p for room in ("models", "pipeline", "jobs") for p in (REPO_ROOT / room).rglob("*.py")]
PIPELINE = REPO_ROOT / "pipeline"
# All other files are pure: the loops, what a task is, samples, scores, pictures, recipes, ...
RAY_RING = set(
    """batch_inference cluster data doctor evaluation_data evaluation_run finetuning_run
    live_metrics pretraining_run progress train_worker trainer prepare/job sweeps/trial_run
    sweeps/tuner""".split()  # noqa: SIM905
)
MLFLOW_RING = set(
    "tracking mlflow_delivery served_model sweeps/registry exports/mlflow_folder".split()  # noqa: SIM905
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
    if path.is_relative_to(PIPELINE):
        name = path.relative_to(PIPELINE).with_suffix("").as_posix()
        assert ("ray" in packages) == (name in RAY_RING), "who else knows Ray is listed above"
        assert ("mlflow" in packages) == (name in MLFLOW_RING), "and who knows MLflow"


def run_code(code: str) -> None:
    """Run Python in a process of its own; its imports are its own, too."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_has_no_side_effects_on_ray_or_logging_and_loads_no_mlflow():
    files = [path.relative_to(REPO_ROOT) for path in SOURCES if path.parent.name != "jobs"]
    names = [".".join(file.with_suffix("").parts) for file in files if file.stem != "__init__"]
    run_code(
        "import logging, ray, sys, torch; before = list(logging.getLogger().handlers);"
        f"import {', '.join(names)};"
        "assert logging.getLogger().handlers == before;"
        "assert not ray.is_initialized() and not torch.cuda.is_initialized();"
        "assert 'mlflow' not in sys.modules, 'it takes seconds: import it where it is used'"
    )


def test_a_data_worker_does_not_import_torch(tmp_path: Path):
    """Neither with its modules nor by unpickling what makes its samples."""
    builders = (finetuning_run.TRAINING, finetuning_run.VALIDATION, evaluation_run.VALIDATION)
    file = tmp_path / "builders"
    file.write_bytes(ray.cloudpickle.dumps(builders))
    run_code(
        "import pickle, sys, pipeline.data, pipeline.evaluation_data, pipeline.prepare.job;"
        f"pickle.load(open({str(file)!r}, 'rb'));"
        "assert 'pipeline.downstream.segment_samples' in sys.modules;"
        "assert 'torch' not in sys.modules"
    )


def test_files_are_short_and_named_for_what_they_own():
    for path in (*SOURCES, *(REPO_ROOT / "tests").rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 500, f"{path} is over 500 lines; split it"
        assert path.stem not in ("utils", "helpers", "common", "misc"), path
    for path in (REPO_ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 70, f"{path}: a job parses and calls"
    for name in RAY_RING | MLFLOW_RING:
        assert (PIPELINE / f"{name}.py").exists(), f"{name} is in a ring, but nowhere else"
    assert not list((REPO_ROOT / "docker").glob("__init__.py")), "would shadow the Docker SDK"
