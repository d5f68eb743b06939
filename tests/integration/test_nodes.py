"""Data nodes and trainer nodes: each kind of work stays where it was told, or says why it cannot.

Every node has CPUs to spare for all of it, so that only the placement keeps work apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray.cluster_utils import Cluster

from pipeline.metrics_file import read_records
from tests.integration.nodes import nodes, run_script

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(400)]

_RUN = """
import json, logging, os, ray
from ray.util.state import list_actors, list_tasks
from pipeline.config_values import apply_overrides
from pipeline.pretraining_run import run_pretraining
from pipeline.recipes import debug

if os.environ.get("RAY_ADDRESS"):
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
config = apply_overrides(debug(), json.loads({settings!r}))
run_pretraining(config)
if ray.is_initialized():
    roles = {{node["NodeID"]: node["Labels"].get("role", "head") for node in ray.nodes()}}
    job = ray.get_runtime_context().get_job_id()
    mine = [("job_id", "=", job)]
    tasks = list_tasks(filters=[*mine, ("type", "=", "NORMAL_TASK")], limit=5000, detail=True)
    actors = list_actors(filters=mine, limit=1000, detail=True)
    print("FOUND", json.dumps({{
        "tasks": sorted((task.name, roles[task.node_id]) for task in tasks if task.node_id),
        "actors": sorted((a.class_name, roles[a.node_id]) for a in actors if a.node_id),
    }}))
"""


class Nodes(NamedTuple):
    cluster: Cluster
    environment: dict[str, str]


@pytest.fixture(scope="module")
def two_kinds() -> Iterator[Nodes]:
    data = {"num_cpus": 4, "resources": {"data_node": 4}, "labels": {"role": "data"}}
    trainer = {"num_cpus": 4, "resources": {"trainer": 2}, "labels": {"role": "trainer"}}
    with nodes(data, trainer) as (cluster, environment):
        yield Nodes(cluster, environment)


def settings(images: Path, storage: Path, **more: Any) -> dict[str, Any]:
    """A run of two workers; most of its samples come through Ray Data, in several tasks."""
    return {
        **{"data.path": str(images), "run.storage_path": str(storage), "optim.num_steps": 100},
        **{"scaling.num_workers": 2, "data.num_cpus": 2, "tracking.system_metrics": False},
        **more,
    }


def losses(storage: Path) -> dict[int, dict[str, float]]:
    return {
        record["step"]: {k: v for k, v in record.items() if k.startswith(("train/loss", "val/"))}
        for record in read_records(storage / "debug" / "metrics.jsonl")
    }


@pytest.fixture(scope="module")
def on_one_node(
    image_folder: Path, two_kinds: Nodes, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, float]]:
    storage = tmp_path_factory.mktemp("one-node")
    environment = {k: v for k, v in two_kinds.environment.items() if k != "RAY_ADDRESS"}
    script = _RUN.format(settings=json.dumps(settings(image_folder, storage)))
    run_script(script, environment)
    return losses(storage)


@pytest.mark.parametrize(
    "placement",
    [
        {"data.worker_resource": "data_node", "scaling.worker_labels": ["role=trainer"]},
        {"data.worker_labels": ["role=!trainer"], "scaling.worker_resource": "trainer"},
    ],
    ids=["resource-and-label", "label-and-resource"],
)
def test_decoding_stays_on_data_nodes_and_training_on_trainer_nodes_with_the_same_losses(
    placement: dict[str, Any],
    image_folder: Path,
    two_kinds: Nodes,
    on_one_node: dict[int, dict[str, float]],
    tmp_path: Path,
):
    script = _RUN.format(settings=json.dumps(settings(image_folder, tmp_path, **placement)))
    printed = run_script(script, two_kinds.environment)
    found = json.loads(printed.split("FOUND ")[1].splitlines()[0])
    trainers = [role for name, role in found["actors"] if "TrainWorker" in name]
    assert trainers == ["trainer", "trainer"], found
    data_tasks = [(name, role) for name, role in found["tasks"] if "MapBatches" in name]
    assert len(data_tasks) >= 2 and {role for _, role in data_tasks} == {"data"}, found
    others = {name for name, role in found["tasks"] if role == "trainer"}
    assert not others, "no task of any name on a trainer node"
    assert losses(tmp_path) == on_one_node, "to the last digit"


def test_preparing_and_embedding_stay_on_the_nodes_they_are_told(
    image_folder: Path, two_kinds: Nodes, tmp_path: Path
):
    script = f"""
    import json, logging, ray, torch
    from ray.util.state import list_actors, list_tasks
    from models.itpn import create_itpn
    from safetensors.torch import save_file
    from pipeline.embed import EmbedConfig, embed
    from pipeline.prepare.job import prepare
    from pipeline.prepare.settings import PrepareConfig

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    save_file(create_itpn("itpn_debug").state_dict(), {str(tmp_path / "w.safetensors")!r})
    data = dict(worker_labels=("role=data",), worker_resource="data_node")
    prepare(PrepareConfig(
        source={str(image_folder)!r}, out={str(tmp_path / "set")!r}, shard_mb=0.01, **data))
    embed(EmbedConfig(
        run={str(tmp_path / "w.safetensors")!r}, model_name="itpn_debug", image_size=64,
        images={str(tmp_path / "set" / "train")!r}, out={str(tmp_path / "vectors")!r},
        num_actors=2, batch_size=4, num_pictures=0, num_neighbours=0,
        worker_labels=("role=trainer",)))
    roles = {{node["NodeID"]: node["Labels"].get("role", "head") for node in ray.nodes()}}
    mine = [("job_id", "=", ray.get_runtime_context().get_job_id())]
    tasks = [(t.name, roles[t.node_id])
             for t in list_tasks(filters=[*mine, ("type", "=", "NORMAL_TASK")], detail=True)]
    actors = [(a.class_name, roles[a.node_id]) for a in list_actors(filters=mine, detail=True)]
    print("FOUND", json.dumps([tasks, actors]))
    """
    printed = run_script(script, two_kinds.environment)
    tasks, actors = json.loads(printed.split("FOUND ")[1].splitlines()[0])
    writers = [role for name, role in tasks if "_write_shard_task" in name]
    assert len(writers) > 1 and set(writers) == {"data"}, tasks
    workers = [role for name, role in actors if "MapWorker" in name]
    assert workers == ["trainer", "trainer"], actors


_REFUSED = """
import json, logging, ray, time
from pipeline.cluster import cluster
from pipeline.config_values import apply_overrides
from pipeline.recipes import debug

ray.init(log_to_driver=False, logging_level=logging.ERROR)
for settings in json.loads({settings!r}):
    base = {{"scaling.worker_resource": "trainer", "data.path": "x"}}
    start = time.monotonic()
    try:
        with cluster(apply_overrides(debug(), base | settings)):
            print("taken", flush=True)
    except ValueError as error:
        print(f"{{time.monotonic() - start:.1f}} s: {{error}}", flush=True)
"""


def test_a_placement_that_no_node_offers_is_refused_at_once_with_what_there_is(two_kinds: Nodes):
    impossible = [
        {"data.worker_resource": "nowhere"},
        {"data.worker_labels": ["role=nobody"]},
        {"data.worker_labels": ["role=data"], "data.num_cpus": 5},  # four CPUs there, nine in all
        {"scaling.worker_labels": ["role=data"]},  # where there is no `trainer`
        {"scaling.num_workers": 4},  # two of the resource there are
        {"scaling.worker_labels": ["role=nobody"], "scaling.wait_for_nodes_s": 2.0},
    ]
    lines = run_script(
        _REFUSED.format(settings=json.dumps(impossible)), two_kinds.environment
    ).splitlines()
    assert len(lines) == len(impossible), lines
    expected = [
        "decoding takes 1 CPU + 0.001 nowhere, and the cluster has room for 0 of 2",
        "decoding takes 1 CPU on a node labelled role=nobody, and the cluster has room for 0 of 2",
        "decoding takes 1 CPU on a node labelled role=data, and the cluster has room for 4 of 5",
        "takes 1 CPU + 1 trainer on a node labelled role=data, and the cluster has room for 0 of 1",
        "a training worker takes 1 CPU + 1 trainer, and the cluster has room for 2 of 4",
        "takes 1 CPU + 1 trainer on a node labelled role=nobody, and",
    ]
    for line, part in zip(lines, expected, strict=True):
        assert part in line
    assert all(float(line.split(" s:")[0]) < 2 for line in lines[:-1]), lines
    assert float(lines[-1].split(" s:")[0]) >= 2 and lines[-1].endswith("after 2 s")


def test_a_run_that_may_wait_begins_when_the_node_has_come(two_kinds: Nodes):
    late = [{"scaling.worker_labels": ["role=late"], "scaling.wait_for_nodes_s": 120.0}]
    script = _REFUSED.format(settings=json.dumps(late))
    with ThreadPoolExecutor(1) as driver:
        run = driver.submit(run_script, script, two_kinds.environment)
        time.sleep(8)
        assert not run.done(), run.exception()
        node = two_kinds.cluster.add_node(
            num_cpus=1,
            object_store_memory=2**27,
            resources={"trainer": 1},
            labels={"role": "late"},
        )
        try:
            assert run.result(200).split() == ["taken"]
        finally:
            two_kinds.cluster.remove_node(node)


def test_the_doctor_finds_the_node_that_has_another_version_or_a_small_object_store(
    two_kinds: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One more node, whose Python finds another timm; all stores of these tests are small."""
    metadata = tmp_path / "older" / "timm-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    with monkeypatch.context() as on_that_node:
        path = f"{metadata.parents[1]}:{two_kinds.environment['PYTHONPATH']}"
        on_that_node.setenv("PYTHONPATH", path)
        odd = two_kinds.cluster.add_node(num_cpus=1, object_store_memory=2**29)
    try:
        report = tmp_path / "found.json"
        script = f"""
        from pipeline.doctor import DoctorConfig, examine
        examine(DoctorConfig(storage_path={str(tmp_path / "runs")!r}, json={str(report)!r}))
        """
        run_script(script, two_kinds.environment)
    finally:
        two_kinds.cluster.remove_node(odd)
    told = json.loads(report.read_text())
    by_check: dict[str, dict[str, str]] = {}
    for finding in told["findings"]:
        by_check.setdefault(finding["check"], {})[finding["node"]] = finding["status"]
        if finding["check"] == "versions" and finding["status"] == "fail":
            assert "timm 0.0.1 (driver: " in finding["found"]
    assert told["status"] == "fail"
    assert sorted(by_check["versions"].values()) == ["fail", "ok", "ok", "ok"]
    assert sorted(by_check["object store"].values()) == ["fail", "fail", "fail", "ok"]
    shared = by_check[f"shared {tmp_path / 'runs'}"]
    assert len(shared) == 4 and set(shared.values()) == {"ok"}, "each read the files of all"
    assert set(by_check["clock"].values()) == {"ok"}
