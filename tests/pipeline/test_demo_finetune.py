"""The fine-tuning demo without its training: which runs there are, in what order, what is told."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from pipeline import demo_finetune
from pipeline.cluster import needed_cpus
from pipeline.config import TrainingConfig
from pipeline.config_values import flatten_config
from pipeline.demo_finetune import demo_runs, figures_table, run_demo_finetune
from pipeline.demo_labels import DemoTask
from pipeline.finetune_config import FinetuneConfig, Task
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import DEMO_DATA, demo
from pipeline.run_folder import RunFolder
from pipeline.trainer import RunFailedError

TASKS: tuple[Task, ...] = get_args(Task)
METRICS = {"classify": "val/top1", "detect": "val/box_ap", "segment": "val/miou"}
IN_ORDER = [f"demo-{task}-{arm}" for task in TASKS for arm in ("scratch", "pretrained")]


class Demo:
    """Stands for the cluster, the data and the runs; keeps what was asked of them, in order.

    The two arms of a task come in any order.
    """

    def __init__(self, storage_path: Path) -> None:
        self.storage_path = str(storage_path)
        self.done: list[str] = []
        self.configs: dict[str, TrainingConfig] = {}
        self.cpus = 0
        self.raises: dict[str, BaseException] = {}
        """By the name of a run, once."""
        self.meet: threading.Barrier | None = None
        """Where each run waits for the other arm."""
        self.stopped: list[str] = []

    def __call__(self) -> dict[Task, dict[str, Any]]:
        self.done.clear()
        return run_demo_finetune(self.storage_path)

    def prepare(self, what: str, folder: str) -> None:
        assert folder == DEMO_DATA
        self.done.append(what)

    @contextlib.contextmanager
    def joined_cluster(self, private_cpus: int) -> Iterator[None]:
        self.cpus = private_cpus
        self.done.append("cluster starts")
        try:
            yield
        finally:
            self.done.append("cluster stops")

    def run(self, config: TrainingConfig, *, stop: threading.Event | None = None) -> dict[str, Any]:
        """What a real run leaves: its folder and its summary."""
        name = config.run.name
        self.done.append(name)
        self.configs[name] = config
        folder = RunFolder(config)
        folder.check()
        folder.open()
        if self.meet is not None and stop is not None:
            self.meet.wait(timeout=10)
        if name in self.raises:
            raise self.raises.pop(name)
        if self.meet is not None and stop is not None and stop.wait(timeout=0.2):
            self.stopped.append(name)
            raise KeyboardInterrupt
        summary: dict[str, Any] = {"run": name}
        if isinstance(config, FinetuneConfig):
            assert config.init.is_scratch or (Path(config.init.path) / "summary.json").exists()
            summary |= {"metric": METRICS[config.task], "value": float(IN_ORDER.index(name))}
        folder.summary_file.write_text(json.dumps(summary))
        return summary

    @property
    def written(self) -> Path:
        return Path(self.storage_path) / "demo-finetune" / "summary.json"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    told = Demo(tmp_path / "runs")
    for name, fake in (
        ("write_demo_photos", lambda folder: told.prepare("photos", folder)),
        ("prepare_demo_labels", lambda folder: told.prepare("labels", folder)),
        ("joined_cluster", told.joined_cluster),
        ("run_pretraining", told.run),
        ("run_finetuning", told.run),
    ):
        monkeypatch.setattr(demo_finetune, name, fake)
    return told


def task_by_task(names: list[str]) -> list[str]:
    """Names in order, the two arms of a task put into theirs."""
    places = {name: place for place, name in enumerate(["demo", *IN_ORDER])}
    tasks = [places[name] + places[name] % 2 for name in names]
    assert tasks == sorted(tasks), names
    return sorted(names, key=places.__getitem__)


def test_there_is_one_run_a_task_on_its_own_labelled_set_of_the_demo(tmp_path: Path):
    runs = demo_runs(str(tmp_path))
    assert tuple(runs) == TASKS
    sets = dict(zip(TASKS, get_args(DemoTask), strict=True))
    for task, config in runs.items():
        assert config.task == task
        assert config.data.path == f"{DEMO_DATA}/{sets[task]}/train"
        assert config.data.val_path == f"{DEMO_DATA}/{sets[task]}/val"
        assert config.run.storage_path == str(tmp_path)
        assert config.init.is_scratch and config.run.name == f"demo-{task}-scratch"
        assert config.model_name == demo().model.name, "the other arm loads the demo's encoder"


def test_the_demo_prepares_pre_trains_and_runs_both_arms_of_each_task_on_one_cluster(told: Demo):
    told()
    preparing, in_cluster = told.done[:2], told.done[2:]
    assert sorted(preparing) == ["labels", "photos"]
    assert in_cluster[:2] == ["cluster starts", "demo"] and in_cluster[-1] == "cluster stops"
    assert task_by_task(in_cluster[2:-1]) == IN_ORDER
    pretraining = told.configs["demo"]
    assert isinstance(pretraining, PretrainConfig)
    assert pretraining.run.storage_path == told.storage_path
    for config in told.configs.values():
        at_once = 1 if config.run.name == "demo" else 2
        needed = at_once * needed_cpus(config, config.scaling.max_workers)
        assert needed <= told.cpus, f"{config.run.name}: Ray would wait for ever"


def test_the_two_arms_of_a_task_run_at_the_same_time(told: Demo):
    told.meet = threading.Barrier(2)
    assert set(told()) == set(TASKS)  # one after the other would break the barrier


@pytest.mark.parametrize("broken", IN_ORDER)
def test_where_one_arm_fails_the_other_is_told_to_stop(broken: str, told: Demo):
    told.meet = threading.Barrier(2)
    told.raises = {broken: RunFailedError("a worker is lost")}
    with pytest.raises(RunFailedError):
        told()
    (stopped,) = told.stopped
    assert {broken, stopped} == {
        name for name in IN_ORDER if name.split("-")[1] == broken.split("-")[1]
    }


def test_the_two_arms_of_a_task_differ_in_their_initial_weights_and_name_alone(told: Demo):
    told()
    encoder = str(RunFolder(told.configs["demo"]).path)
    for task in TASKS:
        scratch, pretrained = (
            flatten_config(told.configs[f"demo-{task}-{arm}"]) for arm in ("scratch", "pretrained")
        )
        assert {key for key in scratch if scratch[key] != pretrained[key]} == {
            "init.path",
            "run.name",
        }
        assert (scratch["init.path"], pretrained["init.path"]) == ("scratch", encoder)


def test_the_figures_are_returned_written_and_printed(
    told: Demo, capsys: pytest.CaptureFixture[str]
):
    figures = told()
    # The value of a run is its place among the runs.
    assert figures == {
        "classify": {"metric": "val/top1", "scratch": 0.0, "pretrained": 1.0},
        "detect": {"metric": "val/box_ap", "scratch": 2.0, "pretrained": 3.0},
        "segment": {"metric": "val/miou", "scratch": 4.0, "pretrained": 5.0},
    }
    assert json.loads(told.written.read_text()) == figures
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("top1", "box_ap", "miou", "2.00", "5.00"))


def test_what_is_finished_is_not_repeated(told: Demo):
    figures = told()
    told.written.unlink()
    assert told() == figures
    assert told.done[2:] == ["cluster starts", "cluster stops"]
    assert json.loads(told.written.read_text()) == figures


@pytest.mark.parametrize("broken", ["demo", "demo-detect-scratch", "demo-detect-pretrained"])
@pytest.mark.parametrize("error", [RunFailedError("a worker is lost"), KeyboardInterrupt()])
def test_a_demo_that_was_cut_off_goes_on_at_the_run_it_was_in(
    broken: str, error: BaseException, told: Demo
):
    told.raises = {broken: error}
    with pytest.raises(type(error)):
        told()
    assert broken in told.done[-3:-1] and told.done[-1] == "cluster stops"
    assert not told.written.exists(), "no figures of half a demo"
    finished = [name for name in told.done[3:-1] if name != broken]
    figures = told()
    assert task_by_task([*finished, *told.done[3:-1]]) == ["demo", *IN_ORDER]
    assert set(figures) == set(TASKS) and told.written.exists()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_folder_of_other_settings_stops_the_demo(is_finished: bool, told: Demo):
    if is_finished:
        told()
        told.written.unlink()
    else:
        told.raises = {"demo-classify-scratch": KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            told()
    file = RunFolder(told.configs["demo-classify-scratch"]).path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"run": values["run"] | {"seed": 7}}))
    with pytest.raises(ValueError, match=r"demo-classify-scratch' was started with another.*\n.*7"):
        told()
    assert not told.written.exists()


def test_the_table_has_a_row_a_task_and_names_metrics_as_people_do():
    figures: dict[Task, dict[str, Any]] = {
        "classify": {"metric": "val/top1", "scratch": 81.239, "pretrained": 92.5},
        "segment": {"metric": "val/miou", "scratch": 7.0, "pretrained": 31.006},
    }
    console = Console(width=80)
    with console.capture() as capture:
        console.print(figures_table(figures))
    rows = [[word for word in line.split() if word.isascii()] for line in capture.get().split("\n")]
    assert ["classify", "top1", "81.24", "92.50"] in rows
    assert ["segment", "miou", "7.00", "31.01"] in rows
    assert ["task", "metric", "scratch", "pre-trained"] in rows
