"""`python -m jobs.prepare_data` as a user runs it: on Ray, killed in the middle, submitted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.prepare_data import main
from tests.conftest import REPO_ROOT
from tests.pipeline.preparing import contents, no_ray, read_manifest
from tests.pipeline.samples import encode, noise_image

SHARD_MB = "0.23"  # 18 images of 100 kB in 8 shards


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 18 images, one of them truncated."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(18):
        path = folder / f"class_{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        encoded = encode(noise_image(i, (200, 168)))
        path.write_bytes(encoded[:5000] if i == 7 else encoded)
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/prepare_data.py", *arguments])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])


def arguments(source: Path, out: Path) -> list[str]:
    return ["--source", str(source), "--out", str(out), "--shard-mb", SHARD_MB]


def environment() -> dict[str, str]:
    values = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    values.pop("RAY_ADDRESS", None)
    return values


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_killed_and_repeated_gives_the_bytes_of_an_undisturbed_one(
    ray_cluster: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "jobs.prepare_data", *arguments(source, out)]
    process = subprocess.Popen(
        [*command, "--num-cpus", "1"],
        cwd=REPO_ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    finished = out / "_preparing/finished"
    deadline = time.monotonic() + 120
    while not (finished.exists() and list(finished.glob("*.json"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no shard was finished in two minutes"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(finished.glob("*.json")))
    assert 1 <= kept < 8, "the kill came too late to show anything"
    assert not (out / "train/_manifest.json").exists()

    assert run_main(monkeypatch, *arguments(source, out)) == 0
    request.getfixturevalue(no_ray.__name__)  # in one process: nothing depends on the tasks
    assert run_main(monkeypatch, *arguments(source, tmp_path / "undisturbed")) == 0
    assert contents(out) == contents(tmp_path / "undisturbed")
    manifest = read_manifest(out / "train")
    assert manifest.num_samples == 17 and len(manifest.shards) == 8
    assert not (out / "_preparing").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_job_submit_runs_the_same_file(ray_cluster: str, source: Path, tmp_path: Path):
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_cluster),
        *("--working-dir", ".", "--", sys.executable, "jobs/prepare_data.py"),
        *arguments(source, tmp_path / "out"),
        *("--val-fraction", "0.3"),
    ]
    done = subprocess.run(
        command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240, env=environment()
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "class-folders with 18 images, 3 classes" in done.stdout
    assert f"--data.path {tmp_path}/out/train --data.val-path {tmp_path}/out/val" in done.stdout
    parts = [read_manifest(tmp_path / "out" / split).num_samples for split in ("train", "val")]
    assert sum(parts) == 17 and min(parts) > 0


@pytest.mark.ray
def test_errors_of_a_task_reach_the_user_as_one_line(
    ray_cluster: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    (tmp_path / "out/train/shard-00001.parquet").mkdir(parents=True)  # in the way
    assert run_main(monkeypatch, *arguments(source, tmp_path / "out")) == 1
    assert "error: shard" in caplog.text and "was not written" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_source_or_a_setting_that_is_wrong_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    assert run_main(monkeypatch, "--source", str(tmp_path / "none"), "--out", str(tmp_path)) == 1
    assert "does not exist" in caplog.text
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, "--source", "x", "--out", "y", "--shard-mb", "0")
    assert "shard_mb=0" in capsys.readouterr().err


def test_interrupting_exits_with_130_and_says_that_work_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.prepare_data.prepare", interrupt)
    assert run_main(monkeypatch, *arguments(source, tmp_path / "out")) == 130
    assert "the same command goes on" in caplog.text
