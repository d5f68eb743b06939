"""One driver a run folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import run_pretraining
from pipeline.run_lock import LOCK_FILE, run_lock
from tests.conftest import REPO_ROOT

HOLD = (
    "import sys, time; from pathlib import Path; from pipeline.run_lock import run_lock\n"
    "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(120)"
)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_driver_is_told_who_the_first_is(tmp_path: Path, holder: subprocess.Popen[str]):
    message = rf"in use by process {holder.pid} on .*--run\.name"
    with pytest.raises(ValueError, match=message), run_lock(tmp_path / "run", grace_s=0.3):
        pass


def test_a_killed_driver_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path / "run", grace_s=0):
        assert (tmp_path / "run" / LOCK_FILE).exists()


def test_a_driver_about_to_end_is_waited_for(tmp_path: Path, holder: subprocess.Popen[str]):
    threading.Timer(0.6, holder.kill).start()
    started = time.monotonic()
    with run_lock(tmp_path / "run"):
        assert time.monotonic() - started > 0.5


def test_a_run_whose_folder_is_held_touches_nothing(
    debug_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.run_lock._GRACE_S", 0.0)
    config = apply_overrides(debug_config, {"run.storage_path": str(tmp_path), "run.name": "run"})
    with run_lock(tmp_path / "run"):
        with pytest.raises(ValueError, match="is in use by process"):
            run_pretraining(config)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_refused_for_its_data_leaves_no_folder(debug_config: PretrainConfig, tmp_path: Path):
    config = apply_overrides(debug_config, {"data.path": str(tmp_path / "nothing")})
    with pytest.raises(FileNotFoundError, match="nothing"):
        run_pretraining(config)
    assert not (Path(config.run.storage_path) / config.run.name).exists()


def test_many_drivers_at_once_hold_it_one_after_the_other(tmp_path: Path):
    """Also where the one before removes file and folder between another's opening and locking."""
    inside: list[int] = []
    most = 0

    def drive() -> None:
        nonlocal most
        for _ in range(20):
            with run_lock(tmp_path / "run", grace_s=60):
                inside.append(1)
                most = max(most, len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_locks(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), run_lock(tmp_path / "run"):
        pass
    assert "no locks on this file system" in caplog.text
