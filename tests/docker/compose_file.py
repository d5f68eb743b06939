"""docker/compose.yaml as Compose reads it, for tests that run its commands or compare its parts."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.docker.linters import DOCKER

_VARIABLE = re.compile(r"\$\{(\w+)(:\?[^}]*)?\}")


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    """The file with its anchors resolved and its variables left as they are."""
    document: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return document


def service(name: str, values: dict[str, str] | None = None) -> dict[str, Any]:
    """One service; with values, its variables are replaced as by docker/.env."""
    found: dict[str, Any] = compose()["services"][name]
    return _replaced(found, values) if values is not None else found


def variables() -> dict[str, bool]:
    """Variables of the file: whether each is required everywhere it stands."""
    found: dict[str, bool] = {}
    for name, rule in _VARIABLE.findall((DOCKER / "compose.yaml").read_text()):
        found[name] = bool(rule) and found.get(name, True)
    return found


def _replaced(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(part, values) for key, part in value.items()}
    if isinstance(value, list):
        return [_replaced(part, values) for part in value]
    return _VARIABLE.sub(lambda m: values[m[1]], value) if isinstance(value, str) else value
