"""What a sweep knows of its trials over all its starts, and how many run at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config_values import apply_overrides
from pipeline.finetune_config import ClassifyConfig
from pipeline.finetune_recipes import small_classify
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.plan import SweepPlan
from pipeline.sweeps.space import parse_space
from pipeline.sweeps.state import SweepState
from pipeline.sweeps.trials import Ending
from pipeline.sweeps.tuner import num_concurrent, with_absolute_paths

METRIC = "val/top1"
SPACE = {"optim.lr": "loguniform:1e-5:1e-2", "optim.layer_decay": "choice:0.65,0.8,0.95"}


def base(folder: Path, **changes: Any) -> ClassifyConfig:
    return apply_overrides(
        small_classify(),
        {
            "init.path": "scratch",
            "run.storage_path": str(folder),
            "run.name": "sweep",
            "optim.num_steps": 90,
            **changes,
        },
    )


def plan(
    folder: Path, sweep: SweepConfig | None = None, space: dict[str, str] | None = None, **kw: Any
) -> SweepPlan:
    made = SweepPlan(
        base(folder, **kw), sweep or SweepConfig(num_trials=4), parse_space(space or SPACE), METRIC
    )
    made.folder.mkdir(exist_ok=True)
    return made


def write_metrics(folder: Path, *points: tuple[int, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, METRIC: value}) + "\n" for step, value in points]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_every_trial_has_its_own_settings_and_a_folder_in_the_sweeps(tmp_path: Path):
    made = plan(tmp_path)
    made.parent_run_id = "parent"
    state = SweepState(made)
    trials = [state.next_trial() for _ in range(4)]
    assert state.next_trial() is None
    configs = [made.config_of(trial) for trial in trials if trial is not None]
    assert len({config.optim.lr for config in configs}) == 4
    for number, config in enumerate(configs):
        assert config.run.name == f"trial_{number:04d}"
        assert config.run.storage_path == str(tmp_path / "sweep")
        assert config.tracking.parent_run_id == "parent"
        assert config.tracking.varied == tuple(SPACE)
        assert config.run.evaluate_every_steps == 10  # a ninth of 90


def test_a_sweep_that_is_run_again_has_the_same_trials_and_goes_on_with_the_unfinished(
    tmp_path: Path,
):
    first = SweepState(plan(tmp_path))
    trials = [first.next_trial() for _ in range(3)]
    first.end(1, "finished")
    again = SweepState(plan(tmp_path))
    assert [again.next_trial() for _ in range(2)] == [trials[0], trials[2]]
    fourth = again.next_trial()
    assert fourth is not None and fourth.number == 3
    assert again.next_trial() is None
    assert again.book.endings == {1: Ending("finished", "")}


def test_a_trial_that_finished_just_before_a_kill_is_not_run_again(tmp_path: Path):
    first = SweepState(plan(tmp_path))
    trial = first.next_trial()
    assert trial is not None
    write_metrics(tmp_path / "sweep" / trial.name, (90, 50.0))
    (tmp_path / "sweep" / trial.name / "summary.json").write_text("{}")
    again = SweepState(plan(tmp_path))
    assert again.book.endings == {0: Ending("finished", "")}
    following = again.next_trial()
    assert following is not None and following.number == 1


def test_what_was_reported_before_a_kill_still_counts(tmp_path: Path):
    first = SweepState(plan(tmp_path))
    for value in (50.0, 40.0):
        trial = first.next_trial()
        assert trial is not None
        write_metrics(tmp_path / "sweep" / trial.name, (10, value))
    again = SweepState(plan(tmp_path))
    first_waiting = again.next_trial()
    assert first_waiting is not None and first_waiting.number == 0
    following = again.next_trial()  # 1 was hopeless, and is not even started
    assert following is not None and following.number == 2
    assert again.book.endings == {1: Ending("stopped early", "")}


def test_values_that_do_not_go_together_are_a_failed_trial_and_no_more(tmp_path: Path):
    space = {"data.crop_ratio": "grid:[0.5,2.0],[0.9,1.1]", "data.image_size": "grid:64,128"}
    made = plan(tmp_path, SweepConfig(searcher="grid"), space)
    real = made.config_of

    def config_of(trial: Any) -> Any:
        if trial.number == 1:
            raise ValueError("these two do not go together")
        return real(trial)

    made.config_of = config_of  # type: ignore[method-assign]
    state = SweepState(made)
    numbers = []
    while (trial := state.next_trial()) is not None:
        numbers.append(trial.number)
    assert numbers == [0, 2, 3]
    assert state.book.endings == {1: Ending("failed", "these two do not go together")}
    assert state.num_steps(1) == 90


@pytest.mark.parametrize("retry", [False, True])
def test_failed_trials_are_tried_again_only_when_asked(tmp_path: Path, retry: bool):
    first = SweepState(plan(tmp_path))
    first.next_trial()
    first.end(0, "failed", "no disk")
    again = SweepState(plan(tmp_path, SweepConfig(num_trials=4, retry_failed=retry)))
    trial = again.next_trial()
    assert trial is not None and trial.number == (0 if retry else 1)


def test_a_trial_finds_relative_paths_from_where_the_sweep_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Actors of a cluster that was joined work in another folder."""
    monkeypatch.chdir(tmp_path)
    given = {"init.path": "runs/demo", "data.path": "train", "data.val_path": "s3://bucket/val"}
    sent = with_absolute_paths(base(tmp_path, **given))
    assert sent.init.path == str(tmp_path / "runs" / "demo")
    assert sent.data.path == str(tmp_path / "train")
    assert sent.data.val_path == "s3://bucket/val"
    assert with_absolute_paths(base(tmp_path)).init.is_scratch


def test_trials_of_other_lengths_are_judged_at_the_same_share_of_their_steps(tmp_path: Path):
    made = plan(tmp_path, SweepConfig(searcher="grid"), {"optim.num_steps": "grid:90,900"})
    state = SweepState(made)
    trials = [state.next_trial() for _ in range(2)]
    every = [made.config_of(t).run.evaluate_every_steps for t in trials if t is not None]
    assert every == [10, 100]
    assert not state.report(0, 10, 50.0)
    assert not state.report(1, 90, 1.0)
    assert state.report(1, 100, 1.0)


@pytest.mark.parametrize(
    ("changes", "sweep", "has", "count", "said"),
    [
        ({"data.num_cpus": 0}, {}, {"CPU": 2}, 2, "2 CPUs / 1 a trial = 2"),
        ({"data.num_cpus": 0}, {}, {"CPU": 1}, 1, "1 CPUs / 1 a trial = 1"),
        ({"data.num_cpus": 2}, {}, {"CPU": 64}, 8, "8 trials"),
        ({"data.num_cpus": 2}, {}, {"CPU": 7}, 2, "7 CPUs / 3 a trial = 2"),
        ({"data.num_cpus": 0}, {"max_concurrent_trials": 3}, {"CPU": 64}, 3, "max_concurrent"),
        (
            {"data.num_cpus": 0, "scaling.cpus_per_worker": 0.1},
            {},
            {"CPU": 0.3},
            3,
            "0.3 CPUs / 0.1 a trial = 3",
        ),
        (
            {"data.num_cpus": 0, "scaling.use_gpu": True, "scaling.gpus_per_worker": 0.25},
            {},
            {"CPU": 64, "GPU": 1},
            4,
            "1 GPUs / 0.25 a trial = 4",
        ),
    ],
)
def test_as_many_trials_at_a_time_as_the_cluster_has_room_for(
    tmp_path: Path,
    changes: dict[str, Any],
    sweep: dict[str, Any],
    has: dict[str, float],
    count: int,
    said: str,
):
    got, arithmetic = num_concurrent(base(tmp_path, **changes), SweepConfig(**sweep), 8, has)
    assert got == count and said in arithmetic


@pytest.mark.parametrize(
    ("changes", "has", "said"),
    [
        ({"scaling.num_workers": 2, "data.num_cpus": 2}, {"CPU": 3}, "takes 4 CPUs"),
        ({"scaling.use_gpu": True}, {"CPU": 64}, "takes 1 GPUs and the cluster has 0"),
    ],
)
def test_a_trial_that_never_fits_is_refused(
    tmp_path: Path, changes: dict[str, Any], has: dict[str, float], said: str
):
    with pytest.raises(ValueError, match=said):
        num_concurrent(base(tmp_path, **changes), SweepConfig(), 8, has)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_trials": 0}, "num_trials=0"),
        ({"grace": 1.0}, "grace=1.0"),
        ({"reduction_factor": 1.0}, "reduction_factor=1.0"),
        ({"scheduler": "hyperband"}, "scheduler"),
        ({"sweep_seed": -1}, "sweep_seed=-1"),
    ],
)
def test_settings_of_a_sweep_are_checked(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        SweepConfig(**changes)
