"""Jobs through `ray job submit`, to a head that asks for a token.

Sweeps, the demo of fine-tuning and a successful replay are run by their own tests, unsubmitted.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray._private.runtime_env.packaging import create_package

from pipeline.shards import MANIFEST_FILE
from tests.conftest import REPO_ROOT
from tests.integration.ray_head import RayHead
from tests.pipeline.labelled_sets import write_labelled_set

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MAX_UPLOAD_BYTES = 3 * 2**20


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    head = RayHead()
    try:
        yield head
    finally:
        head.stop()


@pytest.mark.parametrize("token", [None, "f" * 64], ids=["none", "wrong"])
def test_without_the_right_token_nothing_is_taken_and_the_message_says_why(
    head: RayHead, token: str | None
):
    done = head.submit("jobs/compare.py", "--help", token=token)
    told = (done.stdout + done.stderr).lower()
    assert done.returncode != 0
    assert "token" in told and ("auth" in told or "invalid" in told), told
    assert "jobs.compare" not in told


def submitted(head: RayHead, *job: str, says: str = "") -> str:
    """What a job prints that succeeds."""
    done = head.submit(*job)
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and says in printed, printed[-4000:]
    return printed


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_jobs_run_as_submitted_one_after_another_on_what_the_others_wrote(
    head: RayHead, image_folder: Path, tmp_path: Path
):
    runs, labelled = tmp_path / "runs", tmp_path / "labelled"
    for split, seed in (("train", 0), ("val", 1)):
        write_labelled_set(labelled / split, "classify", num_samples=16, seed=seed)
    tiny = ("--optim.num-epochs", "None", "--optim.num-steps", "3")

    doctor = ("jobs/doctor.py", "--storage-path", str(runs), "--data", str(image_folder))
    submitted(head, *doctor, says="what to fix")
    prepared = tmp_path / "prepared"
    submitted(head, "jobs/prepare_data.py", "--source", str(image_folder), "--out", str(prepared))
    assert (prepared / "train" / MANIFEST_FILE).exists()

    # The tracking URI comes from the environment of the job.
    store = f"sqlite:///{tmp_path / 'tracked.db'}"
    environment = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": store}})
    pretrain = ("jobs/pretrain.py", "debug", "--data.path", str(prepared / "train"))
    pretrain += ("--run.storage-path", str(runs), "--run.name", "first", *tiny)
    done = head.submit(*pretrain, options=("--runtime-env-json", environment))
    assert done.returncode == 0, done.stdout + done.stderr
    resolved = done.stdout.split("models from ")[1].split(" at commit")[0]
    assert "working_dir" in resolved, "the uploaded code runs"
    run_id = json.loads((runs / "first" / "summary.json").read_text())["mlflow_run_id"]
    assert MlflowClient(store).get_run(run_id).info.status == "FINISHED"
    assert not (runs / "mlflow.db").exists()

    classify = ("classify", "small-classify", "--init", str(runs / "first"), *tiny)
    classify += ("--data.path", str(labelled / "train"), "--data.val-path", str(labelled / "val"))
    classify += ("--run.storage-path", str(runs), "--data.global-batch-size", "8")
    submitted(head, "jobs/finetune.py", *classify, "--run.name", "second")
    second, images = str(runs / "second"), str(labelled / "val")
    submitted(head, "jobs/evaluate.py", second, "--num-workers", "2", says="top1")
    to = ("--images", images, "--out")
    submitted(head, "jobs/predict.py", second, *to, str(tmp_path / "predicted"))
    submitted(head, "jobs/embed.py", str(runs / "first"), *to, str(tmp_path / "vectors"))
    submitted(head, "jobs/export.py", second, "--to", str(tmp_path / "export"))
    submitted(head, "jobs/compare.py", str(runs / "first"), second, says="second")
    weights = ("jobs/convert_weights.py", str(runs / "first" / "encoder.safetensors"))
    submitted(head, *weights, "--to", str(tmp_path / "converted"))
    for folder in ("predicted", "vectors", "export", "converted"):
        assert any((tmp_path / folder).iterdir())


def test_a_job_that_fails_says_so_to_who_submitted_it(head: RayHead, tmp_path: Path):
    done = head.submit("jobs/replay.py", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "nowhere" in done.stdout


def test_the_upload_holds_the_code_and_neither_data_secrets_nor_history(tmp_path: Path):
    """A copy of the checkout with all that collects in one over time."""
    checkout = tmp_path / "checkout"
    skipped = shutil.ignore_patterns(".venv", ".git", "runs", "data", "golden", "*cache*")
    shutil.copytree(REPO_ROOT, checkout, ignore=skipped)
    secret = "must-not-travel"
    for name in (
        *(".git/config", ".venv/lib/torch.py", "runs/first/checkpoint.pt", "data/train/0.jpg"),
        *("docs/page.md", "tests/golden/a.safetensors", "docker/.env", "mlruns/0/meta.yaml"),
        *("mlflow.db", "itpn_ray.egg-info/PKG-INFO", "pipeline/__pycache__/x.pyc"),
        *(".pytest_cache/x", ".mypy_cache/x", ".ruff_cache/x", ".hypothesis/x", "build/x"),
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(secret)
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True)
    with zipfile.ZipFile(package) as content:
        names = [info.filename for info in content.infolist() if not info.is_dir()]
        leaked = [name for name in names if secret.encode() in content.read(name)]
    own = [name for name in leaked if not name.endswith("test_submitted_jobs.py")]
    assert own == []
    assert {"jobs/pretrain.py", "models/itpn.py", "pipeline/trainer.py", "pyproject.toml"} <= {
        name.removeprefix("checkout/") for name in names
    }
    assert package.stat().st_size < MAX_UPLOAD_BYTES, "Ray warns, and refuses large ones"


def test_a_worktree_or_a_linked_environment_is_not_uploaded_either(tmp_path: Path):
    checkout, venv = tmp_path / "checkout", tmp_path / "venv"
    checkout.mkdir()
    venv.mkdir()
    (venv / "big").write_text("x")
    shutil.copy(REPO_ROOT / ".rayignore", checkout)
    (checkout / ".git").write_text("gitdir: elsewhere")
    (checkout / ".venv").symlink_to(venv)
    create_package(str(checkout), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as content:
        names = [n for n in content.namelist() if ".git" in n or ".venv" in n or "big" in n]
    assert names == []
