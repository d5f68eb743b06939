"""Whole runs on the session's Ray cluster: worker counts, resume, worker loss, artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from safetensors import safe_open

from models.itpn import create_itpn
from models.weights import load_weights
from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.data import SampleFactory, TrainingBatches, micro_batches, sample_stream
from pipeline.evaluation_data import EvaluationBatches
from pipeline.html_report.number_format import number
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import run_pretraining
from pipeline.quarantine import QUARANTINE_FILE, read_quarantine
from pipeline.reproducibility import stable_id
from pipeline.sources import build_index
from pipeline.tracking import default_tracking_uri
from pipeline.trainer import RunFailedError
from tests.pipeline.samples import (
    bad_images,
    encode,
    noise_image,
    write_parquet,
    write_prepared,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def read_metrics(run_path: Path) -> dict[int, dict[str, float]]:
    lines = (run_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records}), "no step twice"
    return {r["step"]: r for r in records}


@pytest.fixture(scope="module")
def finished(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[PretrainConfig, dict[str, Any]]]:
    """The debug recipe for 20 steps with 1 x 16 and with 2 x 8, both under one storage path."""
    from pipeline.recipes import debug

    storage = tmp_path_factory.mktemp("storage")
    runs = {}
    for workers in (1, 2):
        config = apply_overrides(
            debug(),
            {
                "data.path": str(image_folder),
                "run.storage_path": str(storage),
                "run.name": f"workers-{workers}",
                "scaling.num_workers": workers,
                "tracking.system_metrics": workers == 2,
            },
        )
        runs[workers] = (config, run_pretraining(config))
    return runs


def run_path(config: PretrainConfig) -> Path:
    return Path(config.run.storage_path) / config.run.name


def test_one_worker_and_two_give_the_same_losses_over_20_steps(finished: dict[int, Any]):
    one, two = (read_metrics(run_path(finished[w][0])) for w in (1, 2))
    assert list(one) == list(two) == list(range(1, 21))
    for step in one:
        for key in (k for k in one[step] if k.startswith(("train/loss", "val/"))):
            assert one[step][key] == pytest.approx(two[step][key], rel=1e-4), (step, key)


def test_the_run_folder_holds_what_the_readme_promises(finished: dict[int, Any]):
    config, summary = finished[1]
    path = run_path(config)
    assert json.loads((path / "config.json").read_text()) == config_to_dict(config)
    stored = json.loads((path / "summary.json").read_text())
    assert stored == summary
    assert stored["steps"] == 20
    assert stored["images_per_s"] > 0 and 0 <= stored["data_wait_frac"] <= 1
    assert stored["mim_loss_over_baseline"] > 0 and stored["mfm_loss_over_baseline"] > 0
    assert [p.name for p in (path / "reconstructions").iterdir()] == ["step_00000020.png"]
    report_page = (path / "report.html").read_text()
    assert ">finished<" in report_page and 'alt="Reconstructions at step 20' in report_page
    assert number(stored["mim_loss_over_baseline"]) in report_page
    with safe_open(path / "encoder.safetensors", "pt") as file:
        assert file.metadata()["model"] == "itpn_debug" and file.metadata()["step"] == "20"
    report = load_weights(create_itpn("itpn_debug"), path / "encoder.safetensors")
    assert not report.new and not report.dropped


def test_mlflow_holds_params_metrics_pictures_checkpoints_and_a_finished_status(
    finished: dict[int, Any],
):
    config, summary = finished[2]
    client = MlflowClient(default_tracking_uri(Path(config.run.storage_path)))
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.name"] == "itpn_debug"
    assert run.data.params["scaling.num_workers"] == "2"
    assert run.data.tags["torch"] and run.data.tags["git_commit"]
    history = client.get_metric_history(summary["mlflow_run_id"], "train/loss_mfm8")
    logged = {m.step: m.value for m in history}
    written = {s: r["train/loss_mfm8"] for s, r in read_metrics(run_path(config)).items()}
    assert len(history) == 20 and logged == written
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "encoder.safetensors", "summary.json", "checkpoints"} <= artifacts
    assert "report.html" in artifacts
    pictures = client.list_artifacts(run.info.run_id, "reconstructions")
    assert [p.path for p in pictures] == ["reconstructions/step_00000020.png"]
    assert len(client.search_runs([run.info.experiment_id])) == 2, "one MLflow run per run"


@pytest.mark.parametrize("kind", ["files", "parquet", "prepared"])
def test_workers_together_see_exactly_the_samples_crops_and_masks_of_one(
    kind: str, debug_config: PretrainConfig, tmp_path: Path
):
    images = [encode(noise_image(seed)) for seed in range(40)]
    if kind == "parquet":
        write_parquet(tmp_path / "data" / "a.parquet", list(images[:25]), row_group_size=4)
        write_parquet(tmp_path / "data" / "b.parquet", list(images[25:]), row_group_size=5)
    elif kind == "prepared":
        write_prepared(tmp_path / "data", images, rows_per_shard=15, rows_per_group=4)
    settings = {"data.shuffle_window": 10}
    if kind != "files":
        settings["data.path"] = str(tmp_path / "data")
    one = apply_overrides(debug_config, settings)
    index = build_index(one.data.path)
    index_ref = ray.put(index)
    batches: dict[tuple[int, int], dict[int, bytes]] = {}
    # Two CPUs for decoding; or none, that is, in a thread of the training process.
    for workers, num_cpus in ((1, 2), (2, 2), (4, 2), (1, 0), (2, 0)):
        settings = {"scaling.num_workers": workers, "data.num_cpus": num_cpus}
        config = apply_overrides(one, settings)
        seen = batches[workers, num_cpus] = {}
        for rank in range(workers):
            source = TrainingBatches(
                config, index_ref, rank=rank, world_size=workers, start_step=3, num_steps=45
            )
            for batch in source:
                for i, position in enumerate(batch["position"].tolist()):
                    assert position not in seen, "no sample twice"
                    seen[position] = batch["image"][i].tobytes() + batch["mask"][i].tobytes()
    first = batches.pop((1, 2))
    assert all(others == first for others in batches.values())
    assert sorted(first) == list(range(3 * 16, 45 * 16)), "no replay, ends with the run"
    factory, stream = SampleFactory.build(one, index), sample_stream(one, index)
    for step in (3, 44):
        (draws,) = micro_batches(stream, one, step, rank=0)
        direct = factory.batch(draws)
        for i, position in enumerate(draws.positions.tolist()):
            expected = direct["image"][i].tobytes() + direct["mask"][i].tobytes()
            assert first[position] == expected


def test_blocks_are_whole_micro_batches_that_nothing_cuts_or_joins(debug_config: PretrainConfig):
    index_ref = ray.put(build_index(debug_config.data.path))
    source = TrainingBatches(debug_config, index_ref, start_step=0, num_steps=40)
    bundles = source._dataset(0, 40).iter_internal_ref_bundles()
    rows = [entry.metadata.num_rows for bundle in bundles for entry in bundle.blocks]
    assert source.steps_per_task == 32 and source.micros_per_block == 16
    assert rows == [16 * 16, 16 * 16, 8 * 16], "two blocks of the first task, one of the second"


def test_without_cpus_for_decoding_neither_training_nor_evaluation_starts_ray_data(
    debug_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
):
    config = apply_overrides(debug_config, {"data.num_cpus": 0})
    index_ref = ray.put(build_index(config.data.path))
    monkeypatch.setattr("pipeline.evaluation_data._SMALL_SHARE", 0)
    for name in ("pipeline.data.ray.data.range", "pipeline.evaluation_data.ray.data.range"):
        monkeypatch.setattr(name, None)
    training = TrainingBatches(config, index_ref, start_step=0, num_steps=40)
    assert sum(len(batch["row"]) for batch in training) == 40 * 16
    evaluation = EvaluationBatches(config, index_ref, SampleFactory.build)
    num_images = len(SampleFactory.build(config, ray.get(index_ref)).reader)
    assert sum(len(batch["row"]) for batch in evaluation) == num_images


@pytest.mark.faults
def test_a_run_over_bad_data_ends_well_and_lists_them_in_its_folder_and_mlflow(
    debug_config: PretrainConfig, tmp_path: Path
):
    """Two workers, bad images in a Parquet file, and beside it one that has no footer."""
    folder = tmp_path / "data"
    good = [encode(noise_image(seed)) for seed in range(26)]
    bad = [bad_images()[name] for name in ("page.jpg", "truncated.jpg", "zero.jpg")]
    images = [*good, *(content for content, _ in bad)]
    write_parquet(folder / "a.parquet", images, row_group_size=4)
    (folder / "cut.parquet").write_bytes(b"PAR1")
    met = {
        f"{folder}/a.parquet:{row // 4}:{row % 4}": (stable_id(f"a.parquet:{row}"), error)
        for row, (_, error) in enumerate(bad, len(good))
    }
    config = apply_overrides(
        debug_config,
        {
            "data.path": str(folder),
            "data.max_bad_fraction": 0.2,
            "optim.num_steps": 4,  # 64 uses of 29 samples: all of them are met
            "scaling.num_workers": 2,
        },
    )
    summary = run_pretraining(config)
    assert summary["steps"] == 4
    rows = read_quarantine(str(run_path(config) / QUARANTINE_FILE))
    expected = met | {str(folder / "cut.parquet"): (None, "ArrowInvalid")}
    assert {row.path: (row.sample_id, row.error) for row in rows} == expected
    assert len(rows) == len(expected) and all(row.message for row in rows)
    assert summary["bad_samples"] == sorted(met)
    assert read_metrics(run_path(config))[4]["data/bad_samples"] == 3
    client = MlflowClient(default_tracking_uri(Path(config.run.storage_path)))
    artifacts = {a.path for a in client.list_artifacts(summary["mlflow_run_id"])}
    assert QUARANTINE_FILE in artifacts


def test_a_finished_run_is_not_overwritten(finished: dict[int, Any]):
    config, _ = finished[1]
    before = (run_path(config) / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"run.name='workers-1' is finished .* another name"):
        run_pretraining(config)
    assert (run_path(config) / "metrics.jsonl").read_text() == before


def test_a_crash_in_the_loop_is_reported_with_its_own_message(
    debug_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
):
    def broken(job: dict[str, Any]) -> dict[str, Any]:
        from pipeline import pretraining_run, train_worker

        def crash(*_: Any, **__: Any) -> None:
            raise RuntimeError("the disk under the worker is gone")

        pretraining_run.pretrain = crash
        return train_worker.train_worker(job)

    monkeypatch.setattr("pipeline.trainer.train_worker", broken)
    settings = {"run.max_failures": 0, "data.synthetic": True, "data.path": ""}
    config = apply_overrides(debug_config, settings)
    message = (
        r"1 restarts in a row reached no new checkpoint, run.max_failures=0 allows no more; last: "
        r"worker 0: RuntimeError: the disk under the worker is gone"
    )
    with pytest.raises(RunFailedError, match=message):
        run_pretraining(config)
    state = json.loads((run_path(config) / "state.json").read_text())
    client = MlflowClient(default_tracking_uri(Path(config.run.storage_path)))
    assert state["status"] == client.get_run(state["mlflow_run_id"]).info.status == "FAILED"
    artifacts = {a.path for a in client.list_artifacts(state["mlflow_run_id"])}
    page = (run_path(config) / "report.html").read_text()
    assert "report.html" in artifacts and ">failed<" in page
    assert "RuntimeError: the disk under the worker is gone" in page and "No metrics yet" in page
