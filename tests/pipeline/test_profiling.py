"""Profiles of chosen steps: these, no others, and nothing computed differently."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
from torch.profiler import profile

from pipeline.config import parse_profile_steps
from pipeline.config_values import apply_overrides, config_diff, config_to_dict
from pipeline.pretrain_config import PretrainConfig
from pipeline.profiling import StepProfiler
from pipeline.recipes import debug
from tests.pipeline.loop import LocalRun

pytestmark = pytest.mark.usefixtures("one_thread")


def run(config: PretrainConfig, folder: Path, steps: str, start: int = 0) -> LocalRun:
    """A run under the profiler, whose files go to `folder`/profiles."""
    files: list[Path] = []
    with StepProfiler(parse_profile_steps(steps), folder / "profiles", files.append) as profiler:
        profiler.after_step(start)
        local = LocalRun(config, folder / "checkpoints", on_step=profiler.after_step)
        local()
    assert sorted(files) == sorted((folder / "profiles").glob("*"))
    return local


def count_updates(trace: Path) -> int:
    """Optimiser steps in a trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum("Optimizer.step#AdamW.step" in str(event.get("name")) for event in events)


@pytest.fixture
def short(debug_config: PretrainConfig) -> PretrainConfig:
    return apply_overrides(debug_config, {"optim.num_steps": 6, "run.evaluate_every_steps": 3})


def test_the_trace_holds_the_steps_asked_for(short: PretrainConfig, tmp_path: Path) -> None:
    run(short, tmp_path, "2:4")
    trace, table = (tmp_path / "profiles" / f"step_2-4.{end}" for end in ("json.gz", "txt"))
    assert count_updates(trace) == 3
    assert "Self CPU" in table.read_text() and "aten::" in table.read_text()


def test_a_profiled_run_computes_the_same_bits(short: PretrainConfig, tmp_path: Path) -> None:
    plain, profiled = LocalRun(short, tmp_path / "plain"), run(short, tmp_path / "profiled", "1:3")
    plain()
    assert profiled.records.keys() == plain.records.keys()
    for step, record in plain.records.items():
        for key in (key for key in record if key.startswith(("train/", "val/", "optim/"))):
            assert profiled.records[step][key] == record[key], (step, key)


def test_a_run_that_ends_meanwhile_leaves_what_there_is(
    short: PretrainConfig, tmp_path: Path
) -> None:
    run(short, tmp_path, "5:900")
    assert count_updates(tmp_path / "profiles" / "step_5-6.json.gz") == 2


def test_a_run_that_goes_on_inside_the_stretch_profiles_the_rest(
    short: PretrainConfig, tmp_path: Path
) -> None:
    first = LocalRun(short, tmp_path / "checkpoints", stop_at=3)
    first()
    run(short, tmp_path, "2:5", start=3)
    assert count_updates(tmp_path / "profiles" / "step_4-5.json.gz") == 2


@pytest.mark.parametrize("steps", ["", "7:9"])
def test_nothing_is_written_where_nothing_was_to_be_profiled(
    short: PretrainConfig, tmp_path: Path, steps: str
) -> None:
    run(short, tmp_path, steps)
    assert not (tmp_path / "profiles").exists()


def test_a_full_disk_costs_the_trace_and_not_the_run(
    short: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profiles").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        profiler = StepProfiler(range(1, 3), tmp_path / "profiles", lambda file: None)
        profiler.after_step(0)
        assert (
            LocalRun(short, tmp_path / "checkpoints", on_step=profiler.after_step)()["steps"] == 6
        )
    assert "profile was not written" in caplog.text


def test_a_profiler_that_does_not_start_costs_the_trace_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(_: profile) -> None:
        raise RuntimeError("CUPTI is in use")

    monkeypatch.setattr(profile, "start", busy)
    profiler = StepProfiler(range(1, 4), tmp_path / "profiles", lambda file: None)
    for step in range(4):
        profiler.after_step(step)
    profiler.close()
    assert caplog.text.count("no profile: CUPTI is in use") == 1
    assert not (tmp_path / "profiles").exists()


@pytest.mark.parametrize("text", ["10", "15:10", "0:3", "a:b", "10:15:20", "-1:4"])
def test_what_is_no_stretch_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"run\.profile_steps='{text}' must be FIRST:LAST"):
        apply_overrides(debug(), {"run.profile_steps": text})


def test_a_run_may_go_on_with_other_steps_to_profile() -> None:
    before, after = (apply_overrides(debug(), {"run.profile_steps": s}) for s in ("", "10:15"))
    assert config_diff(config_to_dict(before), config_to_dict(after)) == []
