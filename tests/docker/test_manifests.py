"""The Kubernetes manifests: known fields only, and what they promise about security and scaling."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.docker.manifests import documents, problems

KINDS = ["NetworkPolicy", "PersistentVolumeClaim", "RayCluster", "RayJob"]


def test_there_are_manifests_of_every_kind():
    assert sorted(documents()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_known_and_of_its_type(kind: str):
    assert problems(documents()[kind]) == []


def plant(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with a value at a path such as `spec.workerGroupSpecs.0.replicas`; None removes."""
    changed = json.loads(json.dumps(document))  # YAML's anchors share what deepcopy would, too
    *parents, last = path.split(".")
    place: Any = changed
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


HEAD = "spec.headGroupSpec"
POD = f"{HEAD}.template.spec"


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("RayCluster", "spec.workers", 2, "unknown field workers"),
        ("RayCluster", "spec.headGroupSpec", None, "headGroupSpec is missing"),
        ("RayCluster", "spec.workerGroupSpecs.0.maxReplicas", None, "maxReplicas is missing"),
        ("RayCluster", "spec.workerGroupSpecs.0.replicas", "2", "is no int"),
        ("RayCluster", f"{HEAD}.resources.CPU", 0, "must map text to text"),
        ("RayCluster", "spec.authOptions.mode", "password", "is not disabled|token"),
        ("RayCluster", f"{POD}.container", [], "'container' was unexpected"),
        ("RayCluster", f"{POD}.containers", None, "'containers' is a required property"),
        ("RayCluster", f"{POD}.containers.0.volumeMounts.0.path", "/x", "'path' was unexpected"),
        ("RayCluster", "spec.autoscalerOptions.resources.limit", {}, "'limit' was unexpected"),
        ("RayJob", "spec.entryPoint", "true", "unknown field entryPoint"),
        ("RayJob", "spec.rayClusterSpec.rayVersions", "2", "unknown field rayVersions"),
        ("PersistentVolumeClaim", "spec.accessMode", "ReadWriteMany", "was unexpected"),
        ("NetworkPolicy", "spec.podSelector", {"app": "x"}, "was unexpected"),
    ],
)
def test_a_planted_mistake_is_found(kind: str, path: str, value: Any, message: str):
    found = problems(plant(documents()[kind], path, value))
    assert len(found) == 1 and message in found[0], found


def test_the_job_has_the_same_cluster_as_the_standing_one():
    standing, job = documents()["RayCluster"], documents()["RayJob"]
    assert job["spec"]["rayClusterSpec"] == standing["spec"]


def pods() -> dict[str, dict[str, Any]]:
    """The pods of the manifests by who they are."""
    cluster, job = documents()["RayCluster"]["spec"], documents()["RayJob"]["spec"]
    groups = {g["groupName"]: g["template"]["spec"] for g in cluster["workerGroupSpecs"]}
    head = cluster["headGroupSpec"]["template"]["spec"]
    submitter = job["submitterPodTemplate"]["spec"]
    return {"head": head, **groups, "submitter": submitter}


@pytest.mark.parametrize("who", ["head", "trainers", "data-nodes", "submitter"])
def test_no_pod_is_root_or_may_become_it(who: str):
    pod = pods()[who]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    # The head's autoscaler asks the API server for pods; nobody else needs it.
    assert pod["automountServiceAccountToken"] == (who == "head")
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        assert not container["image"].endswith(":latest") and ":" in container["image"]


def test_credentials_come_from_secrets_and_stand_nowhere():
    for who, pod in pods().items():
        for entry in pod["containers"][0].get("env", []):
            is_secret = any(word in entry["name"] for word in ("KEY", "PASSWORD", "TOKEN", "USER"))
            assert ("valueFrom" in entry) == is_secret, (who, entry)
    assert "Secret" not in documents(), "a manifest with a secret in it would be committed"


def test_trainers_have_gpus_data_nodes_have_none_and_come_and_go():
    spec = documents()["RayCluster"]["spec"]
    trainers, data = spec["workerGroupSpecs"]
    gpus = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in (trainers, data)]
    assert gpus[0]["nvidia.com/gpu"] == trainers["resources"]["GPU"] == "8"
    assert "nvidia.com/gpu" not in gpus[1] and "GPU" not in data["resources"]
    assert trainers["template"]["spec"]["containers"][0]["image"].endswith("-cuda")
    assert data["template"]["spec"]["containers"][0]["image"].endswith("-cpu")
    assert trainers["minReplicas"] == trainers["maxReplicas"]
    assert spec["enableInTreeAutoscaling"] and data["minReplicas"] == 0 < data["maxReplicas"]
    assert spec["headGroupSpec"]["resources"] == {"CPU": "0"}, "no work on the head"
    roles = [group["labels"]["itpn-ray/role"] for group in (spec["headGroupSpec"], trainers, data)]
    assert roles == ["head", "trainer", "data"]
