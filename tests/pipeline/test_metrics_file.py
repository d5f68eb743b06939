"""metrics.jsonl keeps every line, over kills and over disks that are really full."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline import metrics_file
from pipeline.metrics_file import MetricsFile, read_records
from tests.pipeline.storage_faults import fill_disk, small_disk

PAGE_KIB = 4  # tmpfs gives room by the page


def record(step: int) -> dict[str, float]:
    return {"step": step, "time": 0.5, "train/loss": step / 7}


def steps_in(path: Path) -> list[int]:
    """Steps of a file of which every line must be whole."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(metrics_file, "_RETRY_S", 0.0)
    return []


def test_lines_a_full_disk_refuses_are_written_in_order_when_there_is_room(
    tmp_path: Path, warnings: list[str]
):
    with small_disk(tmp_path / "disk", 64) as disk:
        path = disk / "metrics.jsonl"
        file = MetricsFile(path, start_step=0, warn=warnings.append)
        file.append(record(1))
        filler = fill_disk(disk, 0)
        for step in range(2, 200):  # over the end of the first page
            file.append(record(step))
        during = steps_in(path)
        assert 1 <= len(during) < 199 and during == list(range(1, len(during) + 1))
        (warning,) = warnings
        assert "No space left on device" in warning and "training goes on" in warning
        filler.unlink()
        file.append(record(200))
        assert steps_in(path) == list(range(1, 201))
        file.close()
        assert len(warnings) == 1


def test_room_that_comes_after_the_last_step_is_used_at_closing(
    tmp_path: Path, warnings: list[str]
):
    with small_disk(tmp_path / "disk", 64) as disk:
        path = disk / "metrics.jsonl"
        filler = fill_disk(disk, 0)
        file = MetricsFile(path, start_step=0, warn=warnings.append)
        for step in (1, 2, 3):
            file.append(record(step))
        filler.unlink()
        file.close()
        assert steps_in(path) == [1, 2, 3] and len(warnings) == 1


def test_a_write_that_got_in_only_in_part_leaves_no_half_line(tmp_path: Path, warnings: list[str]):
    with small_disk(tmp_path / "disk", 64) as disk:
        path = disk / "metrics.jsonl"
        file = MetricsFile(path, start_step=0, warn=warnings.append)
        file.append(record(1))
        size = path.stat().st_size
        filler = fill_disk(disk, 0)
        file.append(record(2) | {"long": "x" * 2 * PAGE_KIB * 1024})  # half of it has room
        assert path.stat().st_size == size and steps_in(path) == [1]
        shutil.copy(path, tmp_path / "killed_here.jsonl")
        filler.unlink()
        file.append(record(3))
        assert steps_in(path) == [1, 2, 3]
        file.close()
    assert steps_in(tmp_path / "killed_here.jsonl") == [1]


def test_lines_that_never_find_room_are_told_at_the_end(tmp_path: Path, warnings: list[str]):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, start_step=0, warn=warnings.append)
    path.symlink_to("/dev/full")  # only now: reading it never ends
    for step in (1, 2):
        file.append(record(step))
    file.close()
    first, last = warnings
    assert "No space left on device" in first
    assert last.startswith(f"{path}: 2 lines found no room until the end and are lost there")


def test_cutting_off_later_steps_needs_no_room(tmp_path: Path, warnings: list[str]):
    with small_disk(tmp_path / "disk", 64) as disk:
        path = disk / "metrics.jsonl"
        path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 300)))
        fill_disk(disk, 0)
        file = MetricsFile(path, start_step=290, warn=warnings.append)
        assert steps_in(path) == list(range(1, 291))
        assert [r["step"] for r in file.kept] == list(range(1, 291)) and file.last_step == 299
        for step in range(291, 300):
            file.append(record(step))
        assert steps_in(path) == list(range(1, 300)) and not warnings


@pytest.mark.parametrize("cut", range(1, 30))
def test_whatever_a_kill_left_of_the_last_line_the_others_stay(tmp_path: Path, cut: int):
    lines = "".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines[:-cut])
    file = MetricsFile(path, start_step=9)
    assert [r["step"] for r in file.kept] == ([1, 2, 3] if cut == 1 else [1, 2])
    file.append(record(4))
    file.close()
    assert steps_in(path) == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


def test_reading_passes_over_what_is_no_record(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_records(path)) == []
    path.write_bytes(b'{"step": 1, "time": 0}\n{"step": 2, "ti{"step": 3}\n\0\0\n{"step": 4}')
    assert [r["step"] for r in read_records(path)] == [1, 4]
    kept = MetricsFile(path, start_step=1).kept
    assert [r["step"] for r in kept] == [1] and steps_in(path) == [1]


def test_a_file_cut_by_someone_else_gets_no_hole(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, start_step=0)
    file.append(record(1))
    path.write_text("")
    file.append(record(2))
    path.unlink()
    file.append(record(3))
    file.close()
    assert steps_in(path) == [3]
