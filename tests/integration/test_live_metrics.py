"""What Prometheus would scrape while a run trains, and the profile it leaves, on a real cluster."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from prometheus_client.parser import text_string_to_metric_families

from pipeline.config_values import apply_overrides
from pipeline.live_metrics import LiveMetrics, gauge_name
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import _plan
from pipeline.recipes import debug
from pipeline.tracking import default_tracking_uri
from pipeline.trainer import run_training

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def scrape(run: str) -> dict[str, float]:
    """Values of our gauges with the tag of a run, by name without Ray's prefix."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name.removeprefix("ray_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_itpn_") and sample.labels.get("run") == run
    }


@pytest.fixture(scope="module")
def observed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run, stopped when it had been scraped."""
    folder = tmp_path_factory.mktemp("observed")
    changes = {
        "data.path": "",
        "data.synthetic": True,
        "run.storage_path": str(folder),
        "run.name": "observed",
        "run.profile_steps": "10:12",
        "run.checkpoint_every_steps": 10_000,
        "run.evaluate_every_steps": 10_000,
        "run.picture_every_steps": 10_000,
        "optim.num_steps": 100_000,
    }
    config = apply_overrides(debug(), changes)
    stop = threading.Event()

    def train() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as after Ctrl-C
            run_training(config, lambda: _plan(config), stop=stop)

    thread = threading.Thread(target=train)
    thread.start()
    scraped: dict[str, float] = {}
    # Nodes report every ten seconds, and not all gauges for the first time at once.
    while thread.is_alive() and not {"itpn_step", "itpn_perf_images_per_s"} <= scraped.keys():
        time.sleep(0.5)
        scraped = scrape("observed")
    stop.set()
    thread.join()
    lines = (folder / "observed" / "metrics.jsonl").read_text().splitlines()
    records = {row["step"]: row for row in map(json.loads, lines)}
    return {"config": config, "scraped": scraped, "records": records}


def test_what_is_scraped_is_what_is_recorded(observed: dict[str, Any]) -> None:
    records, last = observed["records"], observed["scraped"]
    assert last["itpn_step"] in records
    keys = [key for key in records[1] if key not in ("step", "time")]
    assert {"train/loss_mim", "train/loss_mfm16", "perf/images_per_s", "optim/lr"} <= set(keys)
    for key in keys:
        # The gauges of a step are not set in one go, so a neighbour's value may be beside it.
        known = {row[key] for row in records.values() if key in row}
        assert last[gauge_name(key)] in known, key


def test_the_profile_is_an_artifact_of_the_run(observed: dict[str, Any]) -> None:
    config: PretrainConfig = observed["config"]
    folder = Path(config.run.storage_path)
    names = {"step_10-12.json.gz", "step_10-12.txt"}
    assert {file.name for file in (folder / "observed" / "profiles").iterdir()} == names
    client = MlflowClient(default_tracking_uri(folder))
    state = json.loads((folder / "observed" / "state.json").read_text())
    listed = client.list_artifacts(state["mlflow_run_id"], "profiles")
    assert {Path(info.path).name for info in listed} == names


def test_a_log_step_costs_microseconds(ray_cluster: str) -> None:
    live = LiveMetrics("cost", "pretrain")
    metrics = {f"train/loss_{i}": float(i) for i in range(30)}
    live.set(0, metrics)
    started = time.perf_counter()
    for step in range(100):
        live.set(step, metrics)
    assert (time.perf_counter() - started) / 100 < 0.01


def test_a_run_goes_on_without_gauges(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no metrics here")

    monkeypatch.setattr("pipeline.live_metrics.Gauge", broken)
    live = LiveMetrics("broken", "pretrain")
    for step in range(3):
        live.set(step, {"train/loss": 1.0})
    assert caplog.text.count("no live metrics for Prometheus: no metrics here") == 1
