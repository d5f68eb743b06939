"""The doctor: each thing that can be wrong is provoked and found, with what to do about it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.doctor import main
from pipeline import doctor, doctor_node
from pipeline.doctor import DoctorConfig, examine
from pipeline.doctor_findings import Finding, judge_clock, judge_node, measure_clock, overall, table
from pipeline.report import print_table
from tests.conftest import REPO_ROOT

GIB = 2**30
HEALTHY: dict[str, Any] = {
    "versions": {"python": "3.12.1", "torch": "2.9.0", "ray": "2.60.0"},
    "code": "abc",
    "num_cpus": 8,
    "memory_free_bytes": 32 * GIB,
    "shm_bytes": 16 * GIB,
    "open_files": 65536,
    "disk_free_bytes": {"/mnt/runs": 500 * GIB, "/tmp": None},
    "gpus": [{"problem": "", "name": "H100", "memory_bytes": 80 * GIB, "memory_free_bytes": GIB}],
    "decoder": "",
}
OFFERS = {"CPU": 8.0, "GPU": 1.0, "object_store_memory": 8.0 * GIB}


def judge(facts: dict[str, Any] | None = None, offers: dict[str, float] | None = None):
    return list(judge_node("n", HEALTHY | (facts or {}), HEALTHY, OFFERS | (offers or {})))


def test_a_healthy_node_is_ok_in_all_points():
    findings = judge()
    assert {f.status for f in findings} == {"ok"} and not any(f.fix for f in findings)
    assert len(findings) == 9


@pytest.mark.parametrize(
    ("facts", "offers", "check", "status", "found"),
    [
        (
            {"versions": {"python": "3.12.1", "torch": "2.8.0", "timm": "1.0"}},
            {},
            "versions",
            "fail",
            "ray absent (driver: 2.60.0); timm 1.0 (driver: absent); torch 2.8.0 (driver: 2.9.0)",
        ),
        ({"code": "xyz"}, {}, "our code", "fail", "other code: xyz (driver: abc)"),
        ({"decoder": "ImportError: no"}, {}, "JPEG decoder", "fail", "ImportError: no"),
        ({}, {"CPU": 9.0}, "CPUs", "warn", "9 in Ray, 8 cores"),
        ({}, {"object_store_memory": 75e6}, "object store", "fail", "72 MiB; 512 MiB are wanted"),
        ({}, {"object_store_memory": 3e8}, "object store", "warn", "286 MiB; 512 MiB are wanted"),
        ({"shm_bytes": 2**26}, {}, "object store", "warn", "8.0 GiB, but /dev/shm has 64 MiB"),
        ({"memory_free_bytes": 2**29}, {}, "memory free", "fail", "512 MiB; 4.0 GiB are wanted"),
        (
            {"disk_free_bytes": {"/mnt/runs": 5 * GIB}},
            {},
            "disk free, /mnt/runs",
            "warn",
            "5.0 GiB; 10.0 GiB are wanted",
        ),
        ({"open_files": 1024}, {}, "open files", "warn", "1024"),
        ({"open_files": 256}, {}, "open files", "fail", "256"),
        ({"gpus": []}, {}, "GPUs", "fail", "Ray offers 1 GPUs, torch sees 0"),
        ({"gpus": [{"problem": "no kernel"}]}, {}, "GPUs", "fail", "GPU 0: no kernel"),
    ],
)
def test_what_is_wrong_is_found_and_nothing_else(
    facts: dict[str, Any], offers: dict[str, float], check: str, status: str, found: str
):
    wrong = [f for f in judge(facts, offers) if f.status != "ok"]
    assert [(f.check, f.status) for f in wrong] == [(check, status)]
    assert wrong[0].found.startswith(found) and wrong[0].fix


def test_no_limit_of_open_files_is_no_problem():
    assert all(f.status == "ok" for f in judge({"open_files": -1}))


@pytest.mark.parametrize(
    ("shift_s", "status"), [(0.0, "ok"), (0.5, "ok"), (-5.0, "warn"), (40.0, "fail")]
)
def test_a_shifted_clock_is_found_by_its_quickest_answer(shift_s: float, status: str):
    """Most answers take a second, which says little; one is quick."""
    true_time = [1000.0]
    travel_s = iter([1.0, 1.0, 0.01, 1.0, 1.0])

    def ask() -> float:
        way = next(travel_s)
        true_time[0] += 0.9 * way  # there and back do not take the same time
        theirs = true_time[0] + shift_s
        true_time[0] += 0.1 * way
        return theirs

    offset, bound = measure_clock(ask, lambda: true_time[0])
    assert bound == pytest.approx(0.005) and abs(offset - shift_s) <= bound
    finding = judge_clock("n", offset, bound)
    assert finding.status == status and bool(finding.fix) == (status != "ok")


def test_a_clock_that_cannot_be_told_from_ours_is_not_accused():
    assert judge_clock("n", 20.0, 21.0).status == "ok"


def test_code_that_differs_in_one_character_has_another_digest(tmp_path: Path):
    for room in ("models", "pipeline", "jobs"):
        shutil.copytree(REPO_ROOT / room, tmp_path / room)
    assert doctor_node.code_digest(tmp_path) == doctor_node.code_digest()
    (tmp_path / "jobs" / "embed.py").write_text((REPO_ROOT / "jobs" / "embed.py").read_text() + " ")
    assert doctor_node.code_digest(tmp_path) != doctor_node.code_digest()


def test_nodes_that_say_the_same_share_a_row(capsys: pytest.CaptureFixture[str]):
    same = [Finding(check="c", node=f"n{i}", status="ok", found="[x]") for i in range(6)]
    print_table(table([*same, Finding(check="d", node="n1", status="warn", found="y", fix="z")]))
    shown = capsys.readouterr().out
    assert "n0, n1, n2, n3 and 2 more" in shown and shown.count("[x]") == 1
    assert overall(same) == "ok" and overall([]) == "ok"


def found_by(config: DoctorConfig) -> dict[str, Finding]:
    """Findings of the one node by check, without what the machine of the test is like."""
    findings = {f.check: f for f in examine(config)}
    for check in ("open files", "CPUs", "memory free", "disk free, /tmp", "object store"):
        findings.pop(check)
    return findings


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnACluster:
    """The session's, of one node."""

    def test_storage_data_checkpoints_and_mlflow_work_and_nothing_is_left(
        self, image_folder: Path, tmp_path: Path
    ):
        config = DoctorConfig(
            storage_path=str(tmp_path / "runs"),
            checkpoint_path=str(tmp_path / "checkpoints"),
            data=str(image_folder),
            tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
            json=str(tmp_path / "found.json"),
        )
        findings = found_by(config)
        assert {f.status for f in findings.values()} == {"ok"}, findings
        assert {name.split()[0] for name in findings} >= {"shared", "data", "checkpoints", "MLflow"}
        assert not list((tmp_path / "runs").iterdir())
        assert not list((tmp_path / "checkpoints").iterdir())
        told = json.loads((tmp_path / "found.json").read_text())
        assert {f["check"] for f in told["findings"]} >= set(findings)

    def test_what_does_not_work_is_found_on_the_node_with_its_reason(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{free.getsockname()[1]}"
        config = DoctorConfig(
            storage_path=str(tmp_path / "file" / "runs"),
            checkpoint_path=str(tmp_path / "file" / "checkpoints"),
            data=str(tmp_path / "nowhere"),
            tracking_uri=dead,
            use_gpu=True,
        )
        findings = {k: f for k, f in found_by(config).items() if f.status == "fail"}
        assert sorted(name.split()[0] for name in findings) == [
            *("GPUs", "MLflow", "checkpoints", "data", "shared")
        ]
        assert "NotADirectoryError" in findings[f"shared {tmp_path}/file/runs"].found
        assert "FileNotFoundError" in findings[f"data {tmp_path}/nowhere"].found
        assert "refused" in findings[f"MLflow {dead}"].found
        assert all(f.fix for f in findings.values())

    def test_a_clock_an_hour_off_is_a_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        class HourOff(doctor._NodeDoctor):
            def time_s(self) -> float:
                return time.time() + 3600

        monkeypatch.setattr(doctor, "_NodeDoctor", HourOff)
        clock = found_by(DoctorConfig(storage_path=str(tmp_path)))["clock"]
        assert clock.status == "fail" and clock.found.startswith("+36") and "NTP" in clock.fix

    def test_a_node_that_does_not_answer_is_a_finding(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        class Asleep(doctor._NodeDoctor):
            def ask(self, name: str, *args: Any) -> Any:
                time.sleep(60)

        monkeypatch.setattr(doctor, "_NodeDoctor", Asleep)
        start = time.monotonic()
        findings = examine(DoctorConfig(storage_path=str(tmp_path), timeout_s=3))
        assert time.monotonic() - start < 30
        assert [(f.check, f.status) for f in findings] == [("answers", "fail")]

    @pytest.mark.parametrize(("use_gpu", "status"), [(False, 0), (True, 1)])
    def test_the_job_prints_a_table_and_exits_with_1_on_failures(
        self,
        use_gpu: bool,
        status: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        arguments = ["jobs/doctor.py", "--storage-path", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*arguments, *(["--use-gpu"] if use_gpu else [])])
        assert kept(main) == status
        shown = capsys.readouterr().out
        assert "what to fix" in shown and ("Ray knows of no GPU" in shown) == use_gpu


def kept(job: Callable[[], int]) -> int:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return job()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
