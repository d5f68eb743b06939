"""Which nodes work may land on: custom resources and node labels of Ray, and whether there is room.

Surprising: Ray waits without end, and without an error, for a node that nobody will ever add. So
room is counted before anything starts (`cluster.py` does it, from the nodes of the cluster).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_SHARE = 0.001  # of a custom resource: says where, not how many; CPUs and GPUs say how many
_EPS = 1e-6
_LABEL = re.compile(r"([\w./-]+)=(.+)")
_SET = re.compile(r"(!?)in\((.*)\)")


@dataclass(frozen=True, kw_only=True)
class Node:
    """An alive node: what it offers in all, busy or not, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Processes of one kind that have to fit into a cluster."""

    what: str
    """In the user's words, e.g. 'a training worker'."""
    count: int
    """How many run at the same time."""
    each: Mapping[str, float]
    """Resources of one."""
    labels: tuple[str, ...] = ()
    settings: str
    """What a user may change."""

    def room(self, nodes: Iterable[Node]) -> int:
        """How many fit, had they the nodes for themselves."""
        return sum(
            min(int(node.resources.get(k, 0) / v + _EPS) for k, v in self.each.items() if v)
            for node in nodes
            if matches(self.labels, node.labels)
        )

    def refusal(self, nodes: Iterable[Node]) -> str | None:
        """Why it does not fit, or None."""
        nodes = list(nodes)
        if (room := self.room(nodes)) >= self.count:
            return None
        needs = " + ".join(f"{value:g} {key}" for key, value in self.each.items() if value)
        where = f" on a node labelled {' '.join(self.labels)}" if self.labels else ""
        offers = "; ".join(_describe(node, self.each, self.labels) for node in nodes) or "none"
        return (
            f"{self.what} takes {needs}{where}, and the cluster has room for {room} of {self.count}"
            f" (its nodes: {offers}); add such nodes, or change {self.settings}"
        )


def require_labels(key: str, labels: tuple[str, ...]) -> None:
    """A ValueError unless each is KEY=VALUE."""
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ValueError(
                f"{key}={labels}: '{label}' is not KEY=VALUE; give e.g. itpn-ray/role=data, "
                "or itpn-ray/role=!trainer for all others"
            )


def label_selector(labels: tuple[str, ...]) -> dict[str, str]:
    """As Ray wants them."""
    return dict(label.split("=", 1) for label in labels)


def remote_args(resource: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a Ray task or actor that keep it to nodes; none for no wishes.

    Args:
        resource: custom resource the nodes offer; a sliver of it is taken.
        labels: KEY=VALUE, also KEY=!VALUE, KEY=in(A,B), KEY=!in(A,B).
    """
    args: dict[str, Any] = {"resources": {resource: _SHARE}} if resource else {}
    return args | ({"label_selector": label_selector(labels)} if labels else {})


def resource_share(resource: str) -> dict[str, float]:
    """What `remote_args` takes of the resource."""
    return {resource: _SHARE} if resource else {}


def matches(labels: tuple[str, ...], of_node: Mapping[str, str]) -> bool:
    """Whether a node has what a label selector wants."""
    return all(_fits(of_node.get(k), wanted) for k, wanted in label_selector(labels).items())


def _fits(value: str | None, wanted: str) -> bool:
    if found := _SET.fullmatch(wanted):
        is_in = value in [one.strip() for one in found[2].split(",")]
        return is_in != bool(found[1])
    if wanted.startswith("!"):
        return value != wanted[1:]
    return value == wanted


def _describe(node: Node, keys: Iterable[str], labels: tuple[str, ...]) -> str:
    offers = [f"{node.resources.get(key, 0):g} {key}" for key in keys]
    told = [f"{k}={node.labels[k]}" for k in label_selector(labels) if k in node.labels]
    return ", ".join([*offers, *told])
