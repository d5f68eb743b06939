"""What a person sees of a sweep: real pages of a real MLflow server, in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.finetune_config import ClassifyConfig
from pipeline.sweep import run_sweep
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.space import parse_space
from tests.integration.test_tracking_faults import MlflowServer
from tests.pipeline.finetune_loop import finetune_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.usefixtures("ray_cluster", "one_thread"),
]
NUM_TRIALS = 3


class Tracked(NamedTuple):
    """A finished sweep on a server."""

    uri: str
    summary: dict[str, Any]
    table: str
    experiment: str
    parent: str
    trials: list[str]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    folder = tmp_path_factory.mktemp("page")
    server = MlflowServer(folder)
    try:
        server.start()
        base = finetune_config(
            "classify",
            folder / "data",
            data__num_cpus=0,
            run__name="lr-sweep",
            run__storage_path=str(folder / "runs"),
            tracking__system_metrics=False,
            tracking__uri=server.uri,
        )
        assert isinstance(base, ClassifyConfig)
        space = parse_space({"optim.lr": "grid:1e-4,1e-3,1e-2"})
        sweep = SweepConfig(searcher="grid", scheduler="none", max_concurrent_trials=2)
        tables: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.sweep.print_table", tables.append)
            summary = run_sweep(base, sweep, space, recipe=base, command="run")
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name(base.tracking.experiment).experiment_id
        runs = client.search_runs([experiment])
        (parent,) = [r.info.run_id for r in runs if "mlflow.parentRunId" not in r.data.tags]
        trials = [r.info.run_id for r in runs if r.info.run_id != parent]
        links = "".join(str(cell) for cell in tables[0].columns[-1].cells)
        yield Tracked(server.uri, summary, links, experiment, parent, trials)
    finally:
        server.kill()


def page(address: str, folder: Path, *more: str) -> str:
    """What the page shows once its scripts have run, as HTML."""
    command = [
        *(CHROMIUM or "", "--headless=new", "--no-sandbox", "--disable-gpu"),
        *(f"--user-data-dir={folder / 'profile'}", "--window-size=1500,1000"),
        *("--virtual-time-budget=60000", *more, address),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def plain(html: str) -> str:
    """The text of a page, its blanks as single ones."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_the_sweep_its_trials_its_pictures_and_its_model_are_on_the_pages(
    tracked: Tracked, tmp_path: Path
):
    runs = f"{tracked.uri}/#/experiments/{tracked.experiment}/runs"
    overview = page(f"{runs}/{tracked.parent}", tmp_path, "--dump-dom")
    for text in ("lr-sweep", "best/val_top1", "space.optim.lr", "Finished", "The best again:"):
        assert text in overview, text
    nested = plain(overview).split("Child runs")[1].split("Source")[0]
    assert all(f"trial_{number:04d}" in nested for number in range(NUM_TRIALS)), nested
    artifacts = page(f"{runs}/{tracked.parent}/artifacts", tmp_path, "--dump-dom")
    for name in ("parallel_coordinates.png", "metric_over_time.png", "importance.png"):
        assert name in artifacts, name
    model = page(f"{tracked.uri}/#/models/lr-sweep/versions/1", tmp_path, "--dump-dom")
    assert "Source Run : lr-sweep" in plain(model) and "red, green, blue" in model


def test_the_table_links_to_pages_of_trials(tracked: Tracked, tmp_path: Path):
    for trial in tracked.trials:
        assert f"{tracked.uri}/#/experiments/{tracked.experiment}/runs/{trial}" in tracked.table
    shown = page(
        f"{tracked.uri}/#/experiments/{tracked.experiment}/runs/{tracked.trials[0]}",
        tmp_path,
        "--dump-dom",
    )
    assert "varied.optim.lr" in shown and "Parent run" in shown and "lr-sweep" in shown


def test_a_picture_of_the_sweep_can_be_opened(tracked: Tracked, tmp_path: Path):
    shot = tmp_path / "page.png"
    page(
        f"{tracked.uri}/#/experiments/{tracked.experiment}/runs/{tracked.parent}/artifacts/"
        "parallel_coordinates.png",
        tmp_path,
        f"--screenshot={shot}",
    )
    assert len(Image.open(shot).convert("RGB").getcolors(2**24) or []) > 50
