"""Verdicts of `jobs/doctor.py`: what facts of nodes mean, and what to do about them.

Surprising: a setting that only slows a run down is a warning; a failure is what would end a run,
or spoil it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warn", "fail"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail")
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_MIB, _GIB = 2**20, 2**30
_STORE_FAIL, _STORE_WARN = 128 * _MIB, 512 * _MIB
_DISK_FAIL, _DISK_WARN = 1 * _GIB, 10 * _GIB
_MEMORY_FAIL, _MEMORY_WARN = 1 * _GIB, 4 * _GIB
_FILES_FAIL, _FILES_WARN = 1024, 65535
_SKEW_FAIL_S, _SKEW_WARN_S = 30.0, 1.0
_PINGS = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check on one node."""

    check: str
    node: str
    """Its address, or 'driver'."""
    status: Status
    found: str
    fix: str = ""
    """What to do; empty if nothing is wrong."""


def verdict(check: str, node: str, problem: str, found: str, fix: str) -> Finding:
    """A check that either succeeds or fails for a reason."""
    if problem:
        return Finding(check=check, node=node, status="fail", found=problem, fix=fix)
    return Finding(check=check, node=node, status="ok", found=found)


def judge_node(
    node: str, facts: Mapping[str, Any], driver: Mapping[str, Any], offers: Mapping[str, float]
) -> Iterator[Finding]:
    """What the facts of a node say.

    Args:
        node: how it is called.
        facts: of `doctor_node.node_facts`, there.
        driver: the same of the driver's own process.
        offers: what Ray thinks the node has.
    """
    yield _versions(node, facts, driver)
    yield _code(node, facts, driver)
    yield verdict(
        *("JPEG decoder", node, facts["decoder"], "decodes"),
        "install the project's dependencies on that node (make install, or the image)",
    )
    yield _cpus(node, facts, offers)
    yield _object_store(node, facts, offers)
    low = "free it, or give the node more"
    free = facts["memory_free_bytes"]
    yield _at_least("memory free", node, free, _MEMORY_FAIL, _MEMORY_WARN, low)
    for folder, room in facts["disk_free_bytes"].items():
        if room is not None:
            name = f"disk free, {folder}"
            yield _at_least(name, node, room, _DISK_FAIL, _DISK_WARN, "free it, or use another")
    yield _open_files(node, facts["open_files"])
    if facts["gpus"] or offers.get("GPU"):
        yield _gpus(node, facts["gpus"], int(offers.get("GPU", 0)))


def judge_gpus_wanted(offers: Mapping[str, Mapping[str, float]]) -> Finding:
    """Whether the cluster has GPUs at all, where a run wants them."""
    count = sum(int(node.get("GPU", 0)) for node in offers.values())
    problem = "" if count else "Ray knows of no GPU on any node"
    return verdict(
        *("GPUs wanted", "all", problem, f"{count} GPUs"),
        "start Ray on nodes whose nvidia-smi lists GPUs, in containers with --gpus all",
    )


def judge_clock(node: str, offset_s: float, bound_s: float) -> Finding:
    """How far a clock is off, at least; `offset_s` is known to within `bound_s`."""
    surely = max(0.0, abs(offset_s) - bound_s)
    status: Status = "ok"
    if surely > _SKEW_WARN_S:
        status = "fail" if surely > _SKEW_FAIL_S else "warn"
    return Finding(
        check="clock",
        node=node,
        status=status,
        found=f"{offset_s:+.3f} s, +/- {bound_s:.3f}",
        fix="" if status == "ok" else "let chrony or NTP set it: S3 refuses requests, times lie",
    )


def measure_clock(ask: Callable[[], float], now: Callable[[], float]) -> tuple[float, float]:
    """Offset of another clock to ours and its bound, in seconds, from the quickest of some answers.

    Args:
        ask: returns the time of the other clock, sometime during the call.
        now: our clock.
    """
    pings = []
    for _ in range(_PINGS):
        sent = now()
        theirs = ask()
        received = now()
        pings.append((received - sent, theirs - (sent + received) / 2))
    round_trip, offset = min(pings)
    return offset, round_trip / 2


def overall(findings: list[Finding]) -> Status:
    """The worst status."""
    return max((f.status for f in findings), key=STATUSES.index, default="ok")


def table(findings: list[Finding]) -> Table:
    """Findings, those that say the same of several nodes in one row, the worst last."""
    rows: dict[tuple[str, Status, str, str], list[str]] = {}
    for f in findings:
        rows.setdefault((f.check, f.status, f.found, f.fix), []).append(f.node)
    shown = Table("check", "nodes", "", "found", "what to fix")
    for (check, status, found, fix), nodes in sorted(
        rows.items(), key=lambda row: STATUSES.index(row[0][1])
    ):
        names = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
        # Text: what is found may hold brackets, which rich would take for markup.
        cells = (Text(check), Text(names), Text(status, _COLOURS[status]), Text(found), Text(fix))
        shown.add_row(*cells)
    return shown


def _versions(node: str, facts: Mapping[str, Any], driver: Mapping[str, Any]) -> Finding:
    theirs, ours = facts["versions"], driver["versions"]
    differing = [
        f"{name} {theirs.get(name, 'absent')} (driver: {ours.get(name, 'absent')})"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    shown = ", ".join(f"{name} {theirs.get(name)}" for name in ("python", "torch", "ray"))
    return verdict(
        *("versions", node, "; ".join(differing), shown),
        "use one image, or one environment, on all nodes and for the driver",
    )


def _code(node: str, facts: Mapping[str, Any], driver: Mapping[str, Any]) -> Finding:
    same = facts["code"] == driver["code"]
    problem = "" if same else f"other code: {facts['code']} (driver: {driver['code']})"
    return verdict(
        *("our code", node, problem, f"digest {facts['code']}"),
        "submit with --working-dir ., and remove older copies from PYTHONPATH and site-packages",
    )


def _cpus(node: str, facts: Mapping[str, Any], offers: Mapping[str, float]) -> Finding:
    has, told = facts["num_cpus"], offers.get("CPU", 0)
    found = f"{told:g} in Ray, {has} cores"
    if told <= has:
        return Finding(check="CPUs", node=node, status="ok", found=found)
    fix = "fine for a trial; for speed give ray start --num-cpus no more than there are"
    return Finding(check="CPUs", node=node, status="warn", found=found, fix=fix)


def _object_store(node: str, facts: Mapping[str, Any], offers: Mapping[str, float]) -> Finding:
    store, shm = int(offers.get("object_store_memory", 0)), facts["shm_bytes"]
    found = _at_least(
        *("object store", node, store, _STORE_FAIL, _STORE_WARN),
        "give it more: ray start --object-store-memory BYTES, containers --shm-size",
    )
    if found.status == "ok" and shm is not None and shm < store:
        return Finding(
            check="object store",
            node=node,
            status="warn",
            found=f"{_size(store)}, but /dev/shm has {_size(shm)}: Ray puts it on a disk",
            fix="enlarge /dev/shm (containers: --shm-size, Kubernetes: an emptyDir in memory)",
        )
    return found


def _open_files(node: str, limit: int) -> Finding:
    status: Status = "ok"
    if 0 <= limit < _FILES_WARN:  # -1: no limit
        status = "fail" if limit < _FILES_FAIL else "warn"
    fix = "" if status == "ok" else f"raise it before ray start: ulimit -n {_FILES_WARN}"
    return Finding(check="open files", node=node, status=status, found=str(limit), fix=fix)


def _gpus(node: str, seen: list[dict[str, Any]], told: int) -> Finding:
    problems = [f"GPU {i}: {gpu['problem']}" for i, gpu in enumerate(seen) if gpu["problem"]]
    if len(seen) < told:
        problems.append(f"Ray offers {told} GPUs, torch sees {len(seen)}")
    found = ", ".join(
        f"{gpu['name']} {_size(gpu['memory_free_bytes'])} of {_size(gpu['memory_bytes'])} free"
        for gpu in seen
        if not gpu["problem"]
    )
    return verdict(
        *("GPUs", node, "; ".join(problems), found),
        "look at nvidia-smi there; a CPU build of torch, or a driver older than it, sees none",
    )


def _at_least(check: str, node: str, value: int, fail: int, warn: int, fix: str) -> Finding:
    status: Status = "fail" if value < fail else "warn" if value < warn else "ok"
    wanted = "" if status == "ok" else f"; {_size(warn)} are wanted"
    return Finding(
        check=check,
        node=node,
        status=status,
        found=f"{_size(value)}{wanted}",
        fix="" if status == "ok" else fix,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.0f} MiB"
