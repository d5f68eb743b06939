"""The Grafana dashboard asks for what is exported, and is the one that its script writes."""

from __future__ import annotations

import json
import re
import runpy
import time
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import promql_parser
import pytest
import ray

from pipeline.live_metrics import gauge_name
from tests.conftest import REPO_ROOT
from tests.docs.test_pages import documented

GRAFANA = REPO_ROOT / "docker" / "grafana"
DASHBOARD = json.loads((GRAFANA / "itpn-ray.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
ONLY_WITH_GPUS = {"ray_node_gpus_utilization"}


def metrics_of(expression: str) -> set[str]:
    """Names of the series an expression asks for, by a real parser of PromQL."""
    text = re.sub(r"\$\w+", ".*", expression)
    return set(_names(promql_parser.parse(text)))


def _names(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for part in ("expr", "lhs", "rhs", "vector_selector", "vs", "args"):
        inner = getattr(node, part, None)
        for child in inner if isinstance(inner, list) else [inner]:
            if child is not None:
                yield from _names(child)


def test_the_file_is_what_the_script_writes() -> None:
    written = runpy.run_path(str(GRAFANA / "make_dashboard.py"))["dashboard"]()
    assert written == DASHBOARD, "run: python docker/grafana/make_dashboard.py"


def test_our_metrics_in_it_are_those_of_runs() -> None:
    exported = {f"ray_{gauge_name(key)}" for key in (*documented(), "step")}
    asked = set().union(*map(metrics_of, EXPRESSIONS))
    ours = {name for name in asked if name.startswith("ray_itpn_")}
    assert len(ours) > 20
    assert not ours - exported


@pytest.mark.ray
def test_the_metrics_of_nodes_in_it_are_those_ray_exports(ray_cluster: str) -> None:
    node = next(node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    asked = set().union(*map(metrics_of, EXPRESSIONS))
    missing = {name for name in asked if not name.startswith("ray_itpn_")} - ONLY_WITH_GPUS
    assert len(missing) > 4
    deadline = time.monotonic() + 60
    while missing and time.monotonic() < deadline:  # a node reports every ten seconds
        with urllib.request.urlopen(url, timeout=10) as answer:
            missing -= set(re.findall(r"^(ray_\w+)\{", answer.read().decode(), re.M))
        time.sleep(0.5)
    assert not missing


def test_a_name_inside_functions_is_found() -> None:
    expression = "sum by (run) (rate(ray_a{run=~'$run'}[2m])) / on (run) ray_b"
    assert metrics_of(expression) == {"ray_a", "ray_b"}
    with pytest.raises(ValueError):
        metrics_of("sum by (ray_a{")


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_above, (one, other)


def test_variables_used_are_defined() -> None:
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__all"}
    assert used == {variable["name"] for variable in DASHBOARD["templating"]["list"]}
