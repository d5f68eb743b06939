"""Checking Kubernetes manifests strictly, without a cluster and without a network.

Kubernetes' own kinds, and pods wherever they stand in another kind, are held against the schemas
that the `kubernetes-validate` package ships; KubeRay's against `kuberay_fields.py`.
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import yaml

from tests.conftest import REPO_ROOT
from tests.docker.kuberay_fields import FIELDS, REQUIRED

KUBERNETES = "1.34"
FOLDER = REPO_ROOT / "docker" / "kuberay"
_SCALARS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
}


def documents() -> dict[str, dict[str, Any]]:
    """All objects of docker/kuberay, by kind; there is one of each."""
    found = [d for f in sorted(FOLDER.glob("*.yaml")) for d in yaml.safe_load_all(f.read_text())]
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with one object: unknown, missing and mistyped fields."""
    if document["apiVersion"].startswith("ray.io/"):
        return _ray_problems(document, document["kind"], document["kind"])
    return _core_problems(document, document["kind"])


def _core_problems(document: dict[str, Any], where: str) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = "/".join(str(part) for part in error.path)
        return [f"{where}: {path}: {error.message}"]
    return []


def _ray_problems(value: Any, type_name: str, where: str) -> list[str]:
    """Problems of a value of a type as `kuberay_fields.py` writes them."""
    if type_name == "any":
        return []
    if type_name.startswith("core:"):
        return _core_problems(_as_object(value, type_name.removeprefix("core:")), where)
    if type_name.startswith("["):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        items = enumerate(value)
        return [p for i, v in items for p in _ray_problems(v, type_name[1:-1], f"{where}[{i}]")]
    if type_name in FIELDS:
        return _object_problems(value, type_name, where)
    if type_name == "map":
        texts = isinstance(value, dict) and all(
            isinstance(part, str) for pair in value.items() for part in pair
        )
        return [] if texts else [f"{where}: {value!r} must map text to text"]
    if type_name in _SCALARS:
        fits = isinstance(value, _SCALARS[type_name]) and (
            type_name == "bool" or not isinstance(value, bool)
        )
        return [] if fits else [f"{where}: {value!r} is no {type_name}"]
    return [] if value in type_name.split("|") else [f"{where}: {value!r} is not {type_name}"]


def _object_problems(value: Any, type_name: str, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no {type_name}"]
    fields = FIELDS[type_name]
    found = [f"{where}: unknown field {key}" for key in value if key not in fields]
    found += [
        f"{where}: {key} is missing" for key in REQUIRED.get(type_name, ()) if key not in value
    ]
    known = (key for key in value if key in fields)
    return found + [p for k in known for p in _ray_problems(value[k], fields[k], f"{where}.{k}")]


def _as_object(value: Any, type_name: str) -> dict[str, Any]:
    """An object with nothing but the value in it, for the schemas are of whole objects."""
    metadata = {"name": "checked"}
    if type_name == "PodTemplateSpec":
        return {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": metadata,
            "template": value,
        }
    if type_name == "Service":
        return {"apiVersion": "v1", "kind": "Service", **value}
    field = {
        "ResourceRequirements": "resources",
        "SecurityContext": "securityContext",
        "Env": "env",
        "EnvFrom": "envFrom",
        "VolumeMounts": "volumeMounts",
    }[type_name]
    container = {"name": "checked", "image": "checked:1", field: value}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": [container]},
    }
