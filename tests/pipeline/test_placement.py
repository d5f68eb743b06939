"""Where work may land, and what does not fit: counted as Ray counts, node by node."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.config_values import apply_overrides, config_diff, config_to_dict
from pipeline.placement import Node, Work, matches, remote_args
from pipeline.recipes import debug

DATA = Node(resources={"CPU": 16, "data_node": 16}, labels={"role": "data"})
TRAINER = Node(resources={"CPU": 16, "GPU": 8, "trainer": 8}, labels={"role": "trainer"})


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ((), ["data", "trainer", None]),
        (("role=data",), ["data"]),
        (("role=!data",), ["trainer", None]),
        (("role=in(data, spare)",), ["data"]),
        (("role=!in(data,spare)",), ["trainer", None]),
        (("role=data", "zone=a"), []),
    ],
)
def test_labels_match_as_ray_matches_them(wanted: tuple[str, ...], fits: list[str | None]):
    nodes = {role: {"role": role} if role else {} for role in ("data", "trainer", None)}
    assert [role for role, labels in nodes.items() if matches(wanted, labels)] == fits


@pytest.mark.parametrize(
    ("each", "labels", "room"),
    [
        ({"CPU": 1.0}, (), 32),
        ({"CPU": 1.0, "trainer": 1.0}, (), 8),
        ({"CPU": 1.0, "data_node": 0.001}, (), 16),
        ({"CPU": 9.0}, (), 2),  # 32 CPUs in all, but nine at a time on each node only once
        ({"CPU": 17.0}, (), 0),
        ({"CPU": 0.1}, ("role=data",), 160),  # 16 / 0.1 is 159.99... in floating point
        ({"CPU": 1.0, "GPU": 0.0}, ("role=data",), 16),
        ({"CPU": 1.0, "GPU": 1.0}, ("role=data",), 0),
    ],
)
def test_room_is_counted_node_by_node(each: dict[str, float], labels: tuple[str, ...], room: int):
    work = Work(what="a task", count=room, each=each, labels=labels, settings="x")
    assert work.room([DATA, TRAINER]) == room
    assert work.refusal([DATA, TRAINER]) is None
    more = Work(what="a task", count=room + 1, each=each, labels=labels, settings="x")
    assert f"room for {room} of {room + 1}" in str(more.refusal([DATA, TRAINER]))


def test_a_refusal_says_what_is_wanted_what_there_is_and_what_to_change():
    work = Work(
        what="decoding", count=2, each={"CPU": 1.0}, labels=("role=spare",), settings="data.labels"
    )
    assert work.refusal([DATA, Node(resources={"CPU": 2})]) == (
        "decoding takes 1 CPU on a node labelled role=spare, and the cluster has room for 0 of 2 "
        "(its nodes: 16 CPU, role=data; 2 CPU); add such nodes, or change data.labels"
    )


def test_no_wish_adds_nothing_to_a_task():
    assert remote_args("", ()) == {}
    assert remote_args("a", ("b=c",)) == {
        "resources": {"a": 0.001},
        "label_selector": {"b": "c"},
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.worker_labels": ("role",)}, "data.worker_labels=('role',): 'role' is not KEY="),
        ({"scaling.worker_labels": ("=a",)}, "scaling.worker_labels=('=a',): '=a' is not KEY="),
        ({"scaling.wait_for_nodes_s": -1.0}, "scaling.wait_for_nodes_s=-1.0 must be 0 or more"),
        ({"data.worker_resource": "a"}, "training workers could take all their CPUs"),
        ({"data.worker_resource": "a", "data.num_cpus": 0}, "data.num_cpus=0 decodes in the"),
    ],
)
def test_placements_that_would_mislead_are_refused(overrides: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_overrides(debug(), overrides)


def test_a_run_may_go_on_on_other_nodes_and_older_runs_have_no_placement():
    old = config_to_dict(debug())
    placed = {
        **{"data.worker_resource": "a", "data.worker_labels": ("b=c",)},
        **{"scaling.worker_resource": "d", "scaling.worker_labels": ("e=f",)},
        "scaling.wait_for_nodes_s": 60.0,
    }
    new = config_to_dict(apply_overrides(debug(), placed))
    assert config_diff(old, new) == []
    for section, key in (name.split(".") for name in placed):
        del old[section][key]
    assert config_diff(old, new) == []
