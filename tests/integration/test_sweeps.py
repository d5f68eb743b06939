"""A whole sweep on the session's Ray cluster: its trials, MLflow, its model, its report."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pyarrow.csv
import pytest
import torch
import tyro
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from pipeline.config_values import apply_overrides, config_from_dict, flatten_config
from pipeline.downstream.classify_samples import ClassifySamples
from pipeline.downstream.finetuned import load_finetuned
from pipeline.finetune_config import ClassifyConfig
from pipeline.finetuning_run import run_finetuning
from pipeline.reading import Sample
from pipeline.served_model import ServedModel
from pipeline.sweep import run_sweep
from pipeline.sweeps.config import SweepConfig
from pipeline.sweeps.space import parse_space
from tests.pipeline.finetune_loop import finetune_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_cluster", "one_thread"),
]
SPACE = parse_space({"optim.lr": "grid:1e-3,1e30,3e-3"})
SWEEP = SweepConfig(searcher="grid", num_trials=10, grace=1 / 3, max_concurrent_trials=2)


class Finished(NamedTuple):
    """A sweep that came to its end: a trial whose loss explodes, and two others."""

    base: ClassifyConfig
    summary: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.base.run.storage_path) / self.base.run.name

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder.parent / 'mlflow.db'}")

    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name(self.base.tracking.experiment)
        return list(self.client.search_runs([experiment.experiment_id]))


def bmp(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "BMP")
    return file.getvalue()


def sweep(base: ClassifyConfig, **changes: Any) -> dict[str, Any]:
    config = dataclasses.replace(SWEEP, **changes)
    command = "python -m jobs.finetune classify own"
    return run_sweep(base, config, SPACE, recipe=base, command=command)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("sweep")
    base = finetune_config(
        "classify",
        folder / "data",
        data__num_cpus=0,
        run__name="lr",
        run__storage_path=str(folder / "runs"),
        tracking__system_metrics=False,
    )
    assert isinstance(base, ClassifyConfig)
    return Finished(base, sweep(base))


def test_a_trial_that_fails_is_marked_and_the_others_go_on(finished: Finished):
    summary = finished.summary
    assert (summary["num_trials"], summary["num_failed"]) == (3, 1)
    assert summary["num_finished"] + summary["num_stopped_early"] == 2
    table = pyarrow.csv.read_csv(finished.folder / "trials.csv").to_pylist()
    assert table[1]["outcome"] == "failed" and "finite" in table[1]["reason"]
    assert summary == json.loads((finished.folder / "summary.json").read_text())
    assert not (finished.folder / "tune").exists()


def test_trials_are_nested_under_one_run_with_all_their_settings(finished: Finished):
    runs = finished.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = {run.info.run_name: run for run in runs if run is not parent}
    assert sorted(trials) == ["trial_0000", "trial_0001", "trial_0002"]
    for name, lr in zip(sorted(trials), (1e-3, 1e30, 3e-3), strict=True):
        run = trials[name]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        config = json.loads((finished.folder / name / "config.json").read_text())
        flat = flatten_config(config_from_dict(ClassifyConfig, config))
        logged = {key: run.data.params[key] for key in flat}
        assert logged == {key: str(value) for key, value in flat.items()}
        assert float(run.data.params["varied.optim.lr"]) == lr == config["optim"]["lr"]
    assert parent.data.params["space.optim.lr"] == "grid:1e-3,1e30,3e-3"
    assert parent.info.status == "FINISHED"
    assert {run.info.status for run in trials.values()} <= {"FINISHED", "FAILED", "KILLED"}
    assert trials["trial_0001"].info.status == "FAILED"


def test_the_parent_has_the_best_metric_the_table_and_the_pictures(finished: Finished):
    (parent,) = [run for run in finished.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert finished.summary["best_command"] in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["best/val_top1"] == finished.summary["best_metric"]
    files = {file.path for file in finished.client.list_artifacts(parent.info.run_id)}
    assert files >= {
        *("trials.csv", "trials.parquet", "summary.json", "sweep.json"),
        *("parallel_coordinates.png", "metric_over_time.png", "importance.png"),
    }


def test_the_registered_model_takes_images_and_says_what_the_winner_says(finished: Finished):
    uri = finished.summary["registered_model"]
    assert uri == "models:/lr/1"
    winner = load_finetuned(finished.folder / finished.summary["best_trial"])
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        served = ServedModel(winner.model, mean=winner.config.data.mean, std=winner.config.data.std)
        expected = served(torch.from_numpy(images)).numpy()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{finished.folder.parent / 'mlflow.db'}")
    try:
        pyfunc = mlflow.pyfunc.load_model(uri)
        module = mlflow.pytorch.load_model(uri)
    finally:
        mlflow.set_tracking_uri(before)
    assert np.allclose(pyfunc.predict(images), expected, atol=1e-6)
    assert np.allclose(module(torch.from_numpy(images)).detach().numpy(), expected, atol=1e-6)
    assert pyfunc.metadata.signature.inputs.inputs[0].shape == (-1, 64, 64, 3)
    assert pyfunc.metadata.metadata["classes"] == ["red", "green", "blue"]
    with pytest.raises(Exception, match=r"shape|uint8|type"):
        pyfunc.predict(images.astype(np.float32))
    larger = np.random.default_rng(1).integers(0, 256, (3, 80, 96, 3), dtype=np.uint8)
    samples = ClassifySamples(winner.config, num_classes=3)
    middles = [samples.evaluate(Sample(0, bmp(image), {"label": 0}))["image"] for image in larger]
    predicted = winner.task.predict(winner.model, list(larger), torch.device("cpu"))
    scores = pyfunc.predict(np.stack(middles))
    assert np.allclose([p["scores"] for p in predicted], scores, atol=1e-6)


def test_the_same_command_again_reports_again_and_doubles_nothing(finished: Finished):
    before = {run.info.run_id for run in finished.runs()}
    assert sweep(finished.base) == finished.summary
    assert {run.info.run_id for run in finished.runs()} == before
    assert len(finished.client.search_model_versions("name = 'lr'")) == 1


def test_another_sweep_in_the_same_folder_is_refused(finished: Finished):
    with pytest.raises(ValueError, match=r"another sweep .*\n.*optim.layer_decay: 0.8 -> 0.7"):
        sweep(apply_overrides(finished.base, {"optim.layer_decay": 0.7}))
    with pytest.raises(ValueError, match="grace"):
        sweep(finished.base, grace=0.5)
    trial = apply_overrides(
        finished.base, {"run.storage_path": str(finished.folder), "run.name": "trial_0000"}
    )
    with pytest.raises(ValueError, match="is a single run"):
        sweep(trial)


def test_the_winners_command_gives_the_winners_figure(finished: Finished):
    words = shlex.split(finished.summary["best_command"])
    assert words[:5] == ["python", "-m", "jobs.finetune", "classify", "own"]
    config = tyro.cli(ClassifyConfig, default=finished.base, args=words[5:])
    assert config.run.name == "lr-best"
    again = run_finetuning(config)
    assert again["value"] == finished.summary["best_metric"]
    winner = json.loads(
        (finished.folder / finished.summary["best_trial"] / "summary.json").read_text()
    )
    same = [key for key in winner["metrics"] if key.startswith(("val/", "train/"))]
    assert {k: again["metrics"][k] for k in same} == {k: winner["metrics"][k] for k in same}
