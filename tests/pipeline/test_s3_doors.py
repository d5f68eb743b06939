"""Everything that reads or writes on S3, through faults: the same as on a local disk."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow.store.artifact import s3_artifact_repo

from pipeline import artifact_store, mlflow_delivery, storage, tracking
from pipeline.checkpoint import Checkpointer, load_state
from pipeline.config import InitConfig
from pipeline.config_values import apply_overrides
from pipeline.dry_run import dry_run
from pipeline.embed import EmbedConfig, embed
from pipeline.init_weights import read_initial_weights
from pipeline.predict import PredictConfig, predict
from pipeline.prepare import job as driver
from pipeline.prepare.job import PreparationFailedError, prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.pretrain_config import PretrainConfig
from pipeline.quarantine import BadSample, read_quarantine
from pipeline.reading import SampleReader, UnreadableSampleError
from pipeline.sources import build_index
from pipeline.storage import StorageRefusedError, StorageUnavailableError
from tests.pipeline import inference_runs
from tests.pipeline.mlflow_stores import steps_of, write_metrics
from tests.pipeline.preparing import no_ray
from tests.pipeline.samples import write_images, write_prepared
from tests.s3_proxy import FaultProxy, Kind, nth, seeded
from tests.s3_server import BUCKET, S3Server

pytestmark = pytest.mark.usefixtures("one_thread")
WEATHER: dict[Kind, float] = {"503": 0.06, "500": 0.02, "reset": 0.04, "lost_answer": 0.04}
WEATHER |= {"truncated": 0.04}
NAMES = [f"{folder}/{i:02d}.png" for folder in ("a", "b", "c") for i in range(8)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", NAMES)
    return tmp_path / "images"


@pytest.fixture
def home(request: pytest.FixtureRequest) -> str:
    """A folder of the bucket for each test."""
    return re.sub(r"\W+", "-", request.node.name)


# ---- data ----


def prepared_on_s3(s3: S3Server, home: str) -> dict[str, bytes]:
    """What a preparation wrote, with the source's place taken out of the manifests."""
    found = s3.objects(f"{home}/out")
    for name in found:
        if name.endswith("_manifest.json"):
            manifest = json.loads(found[name])
            del manifest["preparation"]["settings"]["source"]
            found[name] = json.dumps(manifest).encode()
    return found


@pytest.mark.usefixtures(no_ray.__name__)
def test_a_set_prepared_from_s3_to_s3_through_faults_and_a_kill_has_the_local_ones_bytes(
    images: Path,
    home: str,
    s3: S3Server,
    faulty_s3: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (images / "a" / "bad.png").write_bytes(b"<html>")
    settings: dict[str, Any] = {"shard_mb": 0.02, "val_fraction": 0.25, "max_bad_fraction": 0.1}
    local = PrepareConfig(source=str(images), out=str(images.parent / "out"), **settings)
    prepare(local)
    s3.put_folder(images.parent / "out", f"{home}/local/out")
    expected = prepared_on_s3(s3, f"{home}/local")
    assert len([name for name in expected if name.endswith(".parquet")]) > 6

    source = s3.put_folder(images, f"{home}/source")
    config = PrepareConfig(source=source, out=f"s3://{BUCKET}/{home}/out", **settings)
    faulty_s3.rule = seeded(WEATHER, seed=1)
    write, written = driver._write_shard_task, []

    def killed(row: dict[str, Any], *, out: str) -> dict[str, Any]:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(row["number"])
        return write(row, out=out)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_write_shard_task", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert not any(name.endswith("_manifest.json") for name in s3.objects(f"{home}/out"))
    prepare(config)
    ours = prepared_on_s3(s3, home)
    quarantined = [name for name in expected if "_quarantine" in name]  # it names the source
    assert [n for n in ours if "_quarantine" in n] == quarantined
    (bad,) = read_quarantine(f"s3://{BUCKET}/{home}/out/{quarantined[0]}")
    assert (bad.path, bad.error) == (f"{source}/a/bad.png", "UnidentifiedImageError")
    for found in (ours, expected):
        del found[quarantined[0]]
    assert ours == expected, "the same files with the same bytes, and no working folder"
    assert faulty_s3.met.total() > 30 and len(faulty_s3.met) == len(WEATHER)


@pytest.mark.usefixtures(no_ray.__name__)
def test_a_preparation_that_may_not_write_says_so_before_it_lists_anything(
    images: Path, home: str, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    source = s3.put_folder(images, f"{home}/source")
    faulty_s3.rule = nth("403", methods=("PUT", "POST"))
    config = PrepareConfig(source=source, out=f"s3://{BUCKET}/{home}/out")
    with pytest.raises(PreparationFailedError, match=r"writing .* the store refuses access"):
        prepare(config)
    assert not any("source" in request for request in faulty_s3.requests)


@pytest.mark.parametrize("kind", ["files", "prepared"])
def test_samples_read_from_s3_through_faults_are_the_local_ones(
    kind: str, images: Path, home: str, s3: S3Server, faulty_s3: FaultProxy, tmp_path: Path
) -> None:
    folder = images
    if kind == "prepared":
        folder = tmp_path / "prepared"
        content = [(images / name).read_bytes() for name in NAMES]
        write_prepared(folder, content, rows_per_shard=10, rows_per_group=4)
    uri = s3.put_folder(folder, f"{home}/data")
    faulty_s3.rule = seeded(WEATHER, seed=2)
    local = SampleReader(build_index(str(folder)))
    remote = SampleReader(build_index(uri))
    assert len(remote) == len(local) == len(NAMES)
    rows = list(range(0, len(NAMES), 2)) + list(range(1, len(NAMES), 2))
    remote.plan(rows)  # which fetches ahead, in threads
    for row in rows:
        assert remote.read(row) == local.read(row)
    assert faulty_s3.met.total() >= 3


def test_absence_makes_a_sample_bad_but_neither_an_outage_nor_lost_rights(
    images: Path, home: str, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    uri = s3.put_folder(images, f"{home}/data")
    reader = SampleReader(build_index(uri))
    s3.client.delete_object(Bucket=BUCKET, Key=f"{home}/data/a/00.png")
    with pytest.raises(UnreadableSampleError) as caught:
        reader.read(0)
    assert BadSample.of("a", 1, caught.value).error == "FileNotFoundError"
    faulty_s3.rule = nth("reset", part="/a/01")
    with pytest.raises(StorageUnavailableError, match=r"a/01.png failed 13 times"):
        reader.read(1)
    faulty_s3.rule = nth("403", part="/a/01")
    with pytest.raises(StorageRefusedError, match=r"refuses access; credentials come from"):
        reader.read(1)
    faulty_s3.rule = None
    assert reader.read(1).encoded == (images / "a" / "01.png").read_bytes()


# ---- checkpoints ----


def checkpoints(home: str, keep: int = 2) -> Checkpointer:
    return Checkpointer(f"s3://{BUCKET}/{home}/run", keep=keep, facts={"model": "itpn_debug"})


def save(checkpointer: Checkpointer, step: int) -> str | None:
    state = {"step": step, "weights": torch.full((1000,), float(step))}
    checkpointer.save(step, state, {"weight": torch.full((1000,), float(step))})
    checkpointer.wait()
    (saved,) = checkpointer.finished()
    return saved.error


def steps_on(s3: S3Server, home: str) -> set[str]:
    return {name.split("/")[0] for name in s3.objects(f"{home}/run")}


def test_checkpoints_are_written_pruned_and_found_through_faults(
    home: str, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    faulty_s3.rule = seeded(WEATHER, seed=5)
    checkpointer = checkpoints(home)
    for step in (1, 2, 3, 4):
        assert save(checkpointer, step) is None
    assert steps_on(s3, home) == {"step_00000003", "step_00000004"}
    assert set(s3.objects(f"{home}/run/step_00000004")) == {
        *("state.pt", "encoder.safetensors", "manifest.json")
    }
    again = checkpoints(home)  # as another process would look
    folder = again.latest()
    assert folder is not None and load_state(folder)["step"] == 4
    assert faulty_s3.met.total() > 10


def uploads(request: str) -> bool:
    return request.startswith("POST") and "uploads" in request


def test_the_manifest_is_written_last_and_deleted_first(
    home: str, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    checkpointer = checkpoints(home, keep=1)
    assert save(checkpointer, 1) is None
    begun = [r for r in faulty_s3.requests if uploads(r)]
    assert [re.findall(r"step_\d+/([\w.]+)", r)[0] for r in begun] == [
        *("state.pt", "encoder.safetensors", "manifest.json")
    ]
    faulty_s3.requests.clear()
    assert save(checkpointer, 2) is None
    deleted = [r for r in faulty_s3.requests if r.startswith("DELETE") or "?delete" in r]
    deleted = [r for r in deleted if "step_00000001" in r or "?delete" in r]
    assert "step_00000001/manifest.json" in deleted[0] and len(deleted) >= 2


@pytest.mark.parametrize("file", ["state.pt", "encoder.safetensors", "manifest.json"])
def test_a_checkpoint_that_cannot_be_uploaded_leaves_the_one_before(
    file: str, home: str, s3: S3Server, faulty_s3: FaultProxy
) -> None:
    checkpointer = checkpoints(home)
    assert save(checkpointer, 1) is None
    faulty_s3.rule = nth("503", methods=("PUT", "POST"), part=f"step_00000002/{file}")
    error = save(checkpointer, 2)
    assert error is not None and re.search(rf"writing .*{file} failed 13 times.*SLOW_DOWN", error)
    faulty_s3.rule = None
    again = checkpoints(home)  # its copies live as long as it does
    folder = again.latest()
    assert folder is not None and load_state(folder)["step"] == 1
    assert steps_on(s3, home) == {"step_00000001"}, "nothing is left of the other"
    assert save(checkpointer, 3) is None and steps_on(s3, home) == {
        "step_00000001",
        "step_00000003",
    }


def test_a_killed_upload_is_passed_over_and_an_outage_is_not_mistaken_for_damage(
    home: str, s3: S3Server, faulty_s3: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = checkpoints(home)
    assert save(checkpointer, 1) is None
    s3.client.put_object(Bucket=BUCKET, Key=f"{home}/run/step_00000002/state.pt", Body=b"x")
    folder = checkpoints(home).latest()
    assert folder is not None and folder.name == "step_00000001"
    assert "step_00000002 is passed over: FileNotFoundError" in caplog.text
    faulty_s3.rule = nth("503", part="step_00000001")
    with pytest.raises(StorageUnavailableError):  # and not: starting again from nothing
        checkpoints(home).latest()


def test_initial_weights_come_from_a_run_or_a_checkpoint_on_s3(
    home: str, s3: S3Server, faulty_s3: FaultProxy, tmp_path: Path
) -> None:
    run, encoder = inference_runs.pretrained_run(tmp_path / "run")
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    shutil.copy(run / "encoder.safetensors", run / "checkpoints" / "step_00000010")
    uri = s3.put_folder(run, f"{home}/run")
    faulty_s3.rule = seeded(WEATHER, seed=4)
    for path in (uri, f"{uri}/checkpoints/step_00000010", f"{uri}/encoder.safetensors"):
        weights = read_initial_weights(InitConfig(path=path))
        assert weights.model_name == "itpn_debug"
        assert weights.state is not None
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(weights.state[key], tensor), key
    with pytest.raises(FileNotFoundError, match=rf"--init '{uri}/none' does not exist"):
        read_initial_weights(InitConfig(path=f"{uri}/none"))


# ---- inference ----


def rows_of(objects: dict[str, bytes]) -> list[dict[str, Any]]:
    """Rows of all shards, in order, without where the images were."""
    rows: list[dict[str, Any]] = []
    for name in sorted(objects):
        if name.endswith(".parquet") and not name.startswith("_"):
            rows += pq.read_table(io.BytesIO(objects[name])).to_pylist()
    for row in rows:
        row["path"] = Path(row["path"]).name
    return rows


@pytest.mark.parametrize("job", ["embed", "predict"])
def test_each_row_is_inferred_once_from_s3_to_s3_through_faults(
    job: str, home: str, s3: S3Server, faulty_s3: FaultProxy, tmp_path: Path
) -> None:
    folder = inference_runs.image_folder(tmp_path / "images")
    if job == "embed":
        run, _ = inference_runs.pretrained_run(tmp_path / "run")
    else:
        run = inference_runs.finetuned_run(tmp_path / "run", "classify")
    places = {
        "local": (str(run), str(folder), str(tmp_path / "out")),
        "s3": (
            s3.put_folder(run, f"{home}/run") if job == "embed" else str(run),
            s3.put_folder(folder, f"{home}/images"),
            f"s3://{BUCKET}/{home}/out",
        ),
    }
    faulty_s3.rule = seeded(WEATHER, seed=6)
    for where, (model, images, out) in places.items():
        if job == "embed":
            config = EmbedConfig(run=model, images=images, out=out, max_bad_fraction=0.5)
            inferred = embed(config, with_ray=False)
        else:
            options = PredictConfig(run=model, images=images, out=out, max_bad_fraction=0.5)
            inferred = predict(options, with_ray=False)
        assert inferred.num_rows == len(inference_runs.SIZES), where
        assert [Path(bad.path).name for bad in inferred.bad] == ["3_bad.jpg"]
    s3.put_folder(tmp_path / "out", f"{home}/local-out")
    ours, local = s3.objects(f"{home}/out"), s3.objects(f"{home}/local-out")
    assert set(ours) == set(local), "the same files; nothing says unfinished"
    assert rows_of(ours) == rows_of(local)
    assert faulty_s3.met.total() >= 5


# ---- artifacts ----


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_delivery, "_RETRY_S", 0.05)
    monkeypatch.setattr(tracking, "_CLOSE_PAUSES_S", (0.05,) * 4)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # of boto3, whose pauses last seconds, too
    s3_artifact_repo._cached_get_s3_client.cache_clear()  # it knows the proxy of another test


def open_run(tmp_path: Path, root: str) -> tuple[str, str]:
    uri = tracking.default_tracking_uri(tmp_path)
    run_id = tracking.open_run(
        uri,
        experiment="tests",
        artifact_folder=tmp_path / "artifacts",
        artifact_root=root,
        name="run",
        run_id=None,
        key=tracking.new_key(),
        params={},
        tags={},
    )
    return uri, run_id


def test_artifacts_lie_on_s3_each_once_through_faults(
    home: str, s3: S3Server, faulty_s3: FaultProxy, tmp_path: Path, short_waits: None
) -> None:
    uri, run_id = open_run(tmp_path, f"s3://{BUCKET}/{home}")
    faulty_s3.rule = seeded({"503": 0.2, "reset": 0.2, "lost_answer": 0.2}, seed=8)
    tracker = tracking.Tracker(tmp_path, uri=uri, run_id=run_id, start_step=0, system_metrics=False)
    for step in range(5):
        tracker.log(step, {"train/loss": float(step)})
        tracker.log_picture(step, "reconstructions", b"picture %d" % step * 100)
    tracker.close()
    problem = tracking.close_run(
        uri, run_id, "FINISHED", run_dir=tmp_path, files=[tmp_path / "metrics.jsonl"]
    )
    assert problem is None and faulty_s3.met.total() >= 2
    expected = {
        f"reconstructions/step_{step:08d}.png": b"picture %d" % step * 100 for step in range(5)
    }
    expected["metrics.jsonl"] = (tmp_path / "metrics.jsonl").read_bytes()
    assert s3.objects(f"{home}/{run_id}/artifacts") == expected
    assert steps_of(uri, run_id) == list(range(5))


def test_a_store_of_artifacts_that_is_down_costs_no_metric_and_is_filled_later(
    home: str, s3: S3Server, faulty_s3: FaultProxy, tmp_path: Path, short_waits: None
) -> None:
    uri, run_id = open_run(tmp_path, f"s3://{BUCKET}/{home}")
    write_metrics(tmp_path, range(3))
    files = [tmp_path / "metrics.jsonl"]
    faulty_s3.rule = nth("503")
    problem = tracking.close_run(uri, run_id, "FINISHED", run_dir=tmp_path, files=files)
    assert problem is not None and "SlowDown" in problem
    assert steps_of(uri, run_id) == [0, 1, 2] and s3.objects(home) == {}
    faulty_s3.rule = None
    assert tracking.close_run(uri, run_id, "FINISHED", run_dir=tmp_path, files=files) is None
    assert set(s3.objects(f"{home}/{run_id}/artifacts")) == {"metrics.jsonl"}
    assert steps_of(uri, run_id) == [0, 1, 2]


def test_an_experiment_keeps_its_artifacts_in_one_place(tmp_path: Path) -> None:
    _, first = open_run(tmp_path, f"{tmp_path}/a")
    assert open_run(tmp_path, f"{tmp_path}/a")[1] != first
    assert open_run(tmp_path, "")[1]
    with pytest.raises(ValueError, match=r"artifact_root='s3://b/m', but the experiment 'tests'"):
        open_run(tmp_path, "s3://b/m")


def test_artifacts_on_s3_without_boto3_are_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty_s3: FaultProxy
) -> None:
    monkeypatch.setattr(artifact_store.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"it needs boto3; pip install boto3"):
        artifact_store.check_artifact_root(f"s3://{BUCKET}/mlflow")
    with pytest.raises(ValueError, match=r"it needs boto3; pip install boto3"):
        open_run(tmp_path, f"s3://{BUCKET}/mlflow")
    assert not faulty_s3.requests


# ---- before a run ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run.checkpoint_path": "s3://nowhere/x"}, "run.checkpoint_path='s3://nowhere/x/.*bucket"),
        ({"tracking.artifact_root": "s3://nowhere/x"}, "artifact_root='s3://nowhere/x' cannot be"),
        ({"data.path": "s3://nowhere/x"}, "data.path='s3://nowhere/x' does not exist"),
        ({"data.path": f"s3://{BUCKET}/none"}, "data.path='s3://vault/none' does not exist"),
        ({"run.checkpoint_path": "s3://me:hunter2@b/x"}, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_dry_run_finds_what_is_wrong_with_the_storage(
    settings: dict[str, str], message: str, debug_config: PretrainConfig, faulty_s3: FaultProxy
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        dry_run(apply_overrides(debug_config, settings))
    assert "hunter2" not in str(caught.value)


def test_a_dry_run_finds_credentials_that_are_not_accepted(
    debug_config: PretrainConfig, faulty_s3: FaultProxy
) -> None:
    faulty_s3.rule = nth("403")
    for key, value in (
        ("data.path", f"s3://{BUCKET}/data"),
        ("run.checkpoint_path", f"s3://{BUCKET}/x"),
    ):
        with pytest.raises((ValueError, OSError), match=rf"{key}='{value}.*AWS_ACCESS_KEY_ID"):
            dry_run(apply_overrides(debug_config, {key: value}))


def test_the_folder_of_a_run_is_no_object_storage(debug_config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match=r"must be a folder on a disk.*--run.checkpoint-path"):
        apply_overrides(debug_config, {"run.storage_path": f"s3://{BUCKET}/runs"})


def test_retries_are_those_of_the_module(faulty_s3: FaultProxy) -> None:
    assert storage.RETRY_PAUSES_S == (0.01,) * 12, "or the tests above would wait for minutes"
