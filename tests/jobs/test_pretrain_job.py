"""`python -m jobs.pretrain` as a user runs it: submitted, interrupted, dry, and given bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from jobs.pretrain import main
from pipeline.tracking import default_tracking_uri
from tests.conftest import REPO_ROOT


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py", *arguments])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])


@pytest.mark.ray
@pytest.mark.slow
def test_ray_job_submit_runs_the_same_file(ray_cluster: str, image_folder: Path, tmp_path: Path):
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_cluster),
        *("--working-dir", ".", "--", sys.executable, "jobs/pretrain.py", "debug"),
        *("--data.path", str(image_folder), "--run.storage-path", str(tmp_path)),
        *("--run.name", "submitted", "--optim.num-steps", "5"),
    ]
    done = subprocess.run(
        command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240, env=_job_env()
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "models from " in done.stdout and "step 5/5" in done.stdout
    summary = json.loads((tmp_path / "submitted" / "summary.json").read_text())
    assert summary["steps"] == 5
    resolved = done.stdout.split("models from ")[1].split(" at commit")[0]
    assert "working_dir" in resolved, "the uploaded code runs, not an installed copy"


def _job_env() -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "disabled"}


@pytest.mark.slow
@pytest.mark.faults
def test_ctrl_c_keeps_a_checkpoint_marks_the_run_killed_and_leaves_no_process(
    image_folder: Path, tmp_path: Path
):
    """Ctrl-C twice as fast as a person would not: once, in mid-training, on a private cluster."""
    command = [
        *(sys.executable, "-m", "jobs.pretrain", "debug", "--data.path", str(image_folder)),
        *("--run.storage-path", str(tmp_path), "--optim.num-steps", "1000000"),
        *("--run.picture-every-steps", "1000000", "--run.evaluate-every-steps", "1000000"),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        command,
        cwd=REPO_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    metrics = tmp_path / "debug" / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 15):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.5)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("ray" in " ".join(child.cmdline()) for child in family)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "interrupted; the newest checkpoint is kept" in output

    checkpoints = sorted((tmp_path / "debug" / "checkpoints").iterdir())
    last_step = int(checkpoints[-1].name.removeprefix("step_"))
    assert last_step == json.loads(metrics.read_text().splitlines()[-1])["step"], "saved on leaving"
    state = json.loads((tmp_path / "debug" / "state.json").read_text())
    run = MlflowClient(default_tracking_uri(tmp_path)).get_run(state["mlflow_run_id"])
    assert run.info.status == state["status"] == "KILLED"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "no Ray process left"


def test_dry_run_reports_and_trains_nothing(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    storage = tmp_path / "runs"
    arguments = ("--data.path", str(image_folder), "--run.storage-path", str(storage))
    assert run_main(monkeypatch, "debug", "--dry-run", *arguments) == 0
    for part in (
        '"mask_ratio": 0.75',
        "24 images; 24 probed, 0 unreadable",
        "parameters",
        "GiB a worker",
        "ms an image",
        "is writable",
        "nothing was trained",
    ):
        assert part in caplog.text, part
    assert not storage.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "{missing}"], r"data.path='.*missing' does not exist"),
        (["--data.path", "{empty}"], r"empty' holds no image among 0 files"),
        (["--data.path", "{broken}"], r"none of 2 probed images can be decoded"),
        (
            ["--data.path", "{images}", "--data.val-path", "{missing}"],
            r"data.val_path='.*does not exist",
        ),
    ],
)
def test_bad_data_is_one_clear_line_and_leaves_nothing_behind(
    arguments: list[str],
    message: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "broken" / name).write_bytes(b"not an image")
    places = {k: str(tmp_path / k) for k in ("missing", "empty", "broken")}
    places["images"] = str(image_folder)
    filled = [argument.format(**places) for argument in arguments]
    storage = tmp_path / "runs"
    status = run_main(monkeypatch, "debug", *filled, "--run.storage-path", str(storage))
    assert status == 1
    assert re.search(rf"error: .*{message}", caplog.text), caplog.text
    assert "Traceback" not in caplog.text
    assert not storage.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demmo"], "unknown recipe 'demmo'; did you mean 'demo'?"),
        (["debug", "--optm.lr", "1"], "--optim.lr"),
        (
            ["debug", "--data.image-size", "100"],
            "data.image_size=100 is not a multiple of 16; use 96",
        ),
        (
            ["debug", "--model.name", "itpn_bas_patch16_224"],
            "did you mean 'itpn_base_patch16_224'?",
        ),
        (
            ["debug", "--data.global-batch-size", "100", "--scaling.num-workers", "8"],
            "scaling.num_workers=8; use 96 or 104",
        ),
        ([], "usage: python -m jobs.pretrain RECIPE"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_way_out(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd
):
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, *arguments)
    printed = capfd.readouterr()
    flat = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert error.value.code == 2
    assert message in flat
