"""Whole fine-tuning runs on the session's Ray cluster: what they write, what a kill changes."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.checkpoint import MODEL_FILE
from pipeline.config_values import config_to_dict
from pipeline.data import made_ahead
from pipeline.downstream.finetuned import load_finetuned
from pipeline.evaluate import evaluate_task
from pipeline.evaluation_data import share_of
from pipeline.finetune_config import FinetuneConfig
from pipeline.finetuning_run import VALIDATION, open_data, run_finetuning
from pipeline.logbook import Logbook
from pipeline.metrics_file import read_records
from pipeline.onednn_products import use_onednn
from pipeline.report import final_finetune_report
from pipeline.run_folder import RunFolder
from pipeline.tracking import default_tracking_uri
from tests.pipeline.finetune_loop import EVERY, NUM_STEPS, LocalFinetune, finetune_config
from tests.pipeline.inference_runs import pretrained_run
from tests.pipeline.labelled_sets import CLASSES
from tests.pipeline.test_pretrain import assert_same_state

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster", "one_thread"),
]
NUM_VAL = 7


class FinishedRun(NamedTuple):
    """A run on Ray that came to its end."""

    config: FinetuneConfig
    summary: dict[str, Any]

    @property
    def path(self) -> Path:
        return RunFolder(self.config).path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(default_tracking_uri(self.path.parent))


def metrics_by_step(run: FinishedRun) -> dict[int, dict[str, float]]:
    records = list(read_records(run.path / "metrics.jsonl"))
    assert [r["step"] for r in records] == list(range(1, NUM_STEPS + 1)), "none missed, none twice"
    return {r["step"]: r for r in records}


def assert_mlflow_has_each_record_once(run: FinishedRun) -> None:
    """Every value of metrics.jsonl, under the step it was logged at."""
    written = {
        (key, step): value
        for step, record in metrics_by_step(run).items()
        for key, value in record.items()
        if key not in ("step", "time")
    }
    points = [
        (key, metric.step, metric.value)
        for key in {key for key, _ in written}
        for metric in run.client.get_metric_history(run.summary["mlflow_run_id"], key)
    ]
    found = {(key, step): value for key, step, value in points}
    assert len(points) == len(found), "none doubled"
    assert set(found) >= set(written), "none lost"
    # Speeds of steps that were lost and computed again may be those of the first time.
    exact = [k for k in written if k[0].startswith(("train/", "val/", "optim/"))]
    assert {k: found[k] for k in exact} == {k: written[k] for k in exact}


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Segmentation on two workers, from the encoder of a pre-training run."""
    folder = tmp_path_factory.mktemp("segment")
    pretrained, _ = pretrained_run(folder / "pretrained")
    config = finetune_config(
        "segment",
        folder / "data",
        init__path=str(pretrained),
        run__storage_path=str(folder / "runs"),
        run__name="two-workers",
        scaling__num_workers=2,
        tracking__experiment="shapes",
        tracking__system_metrics=False,
    )
    return FinishedRun(config, run_finetuning(config))


def test_two_workers_on_ray_have_the_losses_of_the_loop_in_one_process(
    segmented: FinishedRun, tmp_path: Path
) -> None:
    alone = LocalFinetune(segmented.config, tmp_path / "alone")
    alone()
    together = metrics_by_step(segmented)
    assert list(alone.records) == list(together)
    for step, record in alone.records.items():
        losses = [key for key in record if key.startswith("train/loss")]
        assert losses == ["train/loss", "train/loss_seg", "train/loss_aux"]
        for key in losses:
            # Gradients are summed in another order; seven steps of AdamW widen that.
            assert together[step][key] == pytest.approx(record[key], rel=2e-4), (step, key)
        assert together[step]["optim/lr"] == record["optim/lr"]
        assert together[step]["scaling/num_workers"] == 2


def test_the_run_folder_holds_the_model_its_classes_and_figures(segmented: FinishedRun) -> None:
    config, summary = segmented
    path = segmented.path
    assert json.loads((path / "config.json").read_text()) == config_to_dict(config)
    assert json.loads((path / "summary.json").read_text()) == summary
    assert summary["steps"] == NUM_STEPS and summary["restarts"] == 0
    assert (summary["task"], summary["init"]) == ("segment", config.init.path)
    assert summary["metric"] == "val/miou"
    assert summary["value"] == summary["metrics"]["val/miou"]
    assert summary["metrics"]["val/num_samples"] == NUM_VAL, "none twice over two workers"
    labels = json.loads((path / "classes.json").read_text())
    assert labels == {"classes": CLASSES["segment"], "pretrain_size": 64}
    checkpoints = sorted(p.name for p in (path / "checkpoints").iterdir())
    assert checkpoints == [f"step_{step:08d}" for step in (2 * EVERY, NUM_STEPS)], "the last two"
    for kind in ("predictions", "confusion"):
        (picture,) = (path / kind).iterdir()
        assert picture.name == f"step_{NUM_STEPS:08d}.png"
        pixels = np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert("RGB"))
        assert pixels.std() > 1, f"{kind} shows something"
    with safe_open(path / MODEL_FILE, "pt") as file:
        assert file.metadata()["model"] == "itpn_debug"
        assert file.metadata()["step"] == str(NUM_STEPS)
    report = final_finetune_report(config, summary)
    assert f"val/miou = {summary['value']:.2f} on {NUM_VAL} validation images" in report
    assert str(path / "predictions") in report and str(path / MODEL_FILE) in report


def test_the_kept_model_scores_what_the_run_says_of_it(segmented: FinishedRun) -> None:
    task, model, config, classes = load_finetuned(segmented.path)
    assert list(classes) == CLASSES["segment"]
    _, val, _ = open_data(config)
    maker = VALIDATION(config, val)
    metrics, _ = evaluate_task(task, model, made_ahead(maker, share_of(maker, 2)))
    logged = segmented.summary["metrics"]
    assert metrics["val/num_samples"] == NUM_VAL and "val/miou" in metrics
    for key, value in metrics.items():
        assert logged[key] == pytest.approx(value, rel=1e-6), key


def test_mlflow_holds_params_metrics_pictures_weights_and_a_finished_status(
    segmented: FinishedRun,
) -> None:
    client, run_id = segmented.client, segmented.summary["mlflow_run_id"]
    run = client.get_run(run_id)
    state = json.loads((segmented.path / "state.json").read_text())
    assert run.info.status == state["status"] == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "shapes"
    assert run.data.params["model.name"] == "itpn_debug"
    assert run.data.params["init.path"] == segmented.config.init.path
    assert run.data.params["segmenter.channels"] == "16"
    assert run.data.params["scaling.num_workers"] == "2"
    assert_mlflow_has_each_record_once(segmented)
    (score,) = client.get_metric_history(run_id, "val/miou")
    assert (score.step, score.value) == (NUM_STEPS, segmented.summary["value"])
    artifacts = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert {"config.json", "summary.json", "metrics.jsonl", "classes.json"} <= artifacts
    assert {MODEL_FILE, "checkpoints", "predictions", "confusion"} <= artifacts
    pictures = client.list_artifacts(run_id, "predictions")
    assert [p.path for p in pictures] == [f"predictions/step_{NUM_STEPS:08d}.png"]


def test_a_finished_run_is_not_overwritten(segmented: FinishedRun) -> None:
    files = [p for p in segmented.path.rglob("*") if p.is_file()]
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in files}
    with pytest.raises(ValueError, match=r"run.name='two-workers' is finished .* another name"):
        run_finetuning(segmented.config)
    files = [p for p in segmented.path.rglob("*") if p.is_file()]
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in files} == before


def dies_once(after_step: int, marker: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The training worker, killed when it has logged a step, if it never was before.

    Args:
        after_step: the step; the checkpoint of `EVERY` is whole by then.
        marker: file that says it was killed.
    """

    def worker(job: dict[str, Any]) -> dict[str, Any]:
        import os
        import signal
        import time

        from pipeline import tracking, train_worker

        log = tracking.Tracker.log

        def log_and_die(self: Any, step: int, metrics: dict[str, float]) -> None:
            log(self, step, metrics)
            if step != after_step or marker.exists():
                return
            saved = self.run_dir / "checkpoints" / f"step_{EVERY:08d}"
            until = time.monotonic() + 60
            while not saved.exists() and time.monotonic() < until:
                time.sleep(0.05)
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        tracking.Tracker.log = log_and_die  # type: ignore[method-assign]
        return train_worker.train_worker(job)

    return worker


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_run_whose_worker_is_killed_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixup, cutmix, erasing, drop path, a moving average; killed two steps after a checkpoint."""
    config = finetune_config(
        "classify",
        tmp_path / "data",
        run__storage_path=str(tmp_path / "runs"),
        tracking__system_metrics=False,
    )
    assert config.optim.ema_decay and config_to_dict(config)["augment"]["mixup"]
    use_onednn()  # as workers do, for the same last bits
    calm = LocalFinetune(config, tmp_path / "calm")
    expected = calm()
    marker = tmp_path / "was_killed"
    monkeypatch.setattr("pipeline.trainer.train_worker", dies_once(EVERY + 2, marker))
    run = FinishedRun(config, run_finetuning(config))

    assert marker.exists()
    assert run.summary["restarts"] == 1 and run.summary["lost_steps"] == 2
    events = Counter(event["event"] for event in Logbook(run.path / "events.jsonl").read())
    assert events["start"] == events["resume"] == 2
    records = metrics_by_step(run)
    for step, record in calm.records.items():
        exact = {k: v for k, v in record.items() if k.startswith(("train/", "val/", "optim/"))}
        assert {"train/loss", "train/grad_norm", "optim/lr"} <= set(exact)
        assert {k: records[step].get(k) for k in exact} == exact, step
    assert run.summary["metric"] == "val/top1"
    assert run.summary["value"] == expected["metrics"]["val/top1"]
    whole = load_file(calm.folder / f"step_{NUM_STEPS:08d}" / MODEL_FILE)
    assert_same_state(load_file(run.path / MODEL_FILE), whole)
    (picture,) = (run.path / "predictions").iterdir()
    assert picture.read_bytes() == calm.pictures["predictions"]
    assert_mlflow_has_each_record_once(run)
    assert run.client.get_run(run.summary["mlflow_run_id"]).info.status == "FINISHED"
