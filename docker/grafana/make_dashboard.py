"""Writes itpn-ray.json, the Grafana dashboard: `python docker/grafana/make_dashboard.py`.

Panels are rows of the table below; where they stand follows from their order. Nothing but the
standard library is needed. A test holds the file to what this writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("itpn-ray.json")
COLUMNS, HEIGHT = 24, 8
RUN = 'run=~"$run"'
NODE = 'SessionName=~"$session"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(NamedTuple):
    """One panel: its title, its unit, and what is drawn, as (legend, PromQL)."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    about: str = ""
    kind: str = "timeseries"
    width: int = 8


def of(*metrics: str) -> tuple[tuple[str, str], ...]:
    """Lines for metrics of the chosen runs; the legend is the run and the metric's last words."""
    return tuple(
        (f"{{{{run}}}} {metric.split('_', 1)[1]}" if len(metrics) > 1 else "{{run}}",
         f"ray_itpn_{metric}{{{RUN}}}")
        for metric in metrics
    )  # fmt: skip


ROWS: dict[str, tuple[Panel, ...]] = {
    "Where it stands": (
        Panel("Step", "none", of("step"), kind="stat", width=4),
        Panel("Images per second", "none", of("perf_images_per_s"), kind="stat", width=4),
        Panel("Waiting for data", "percentunit", of("perf_data_wait_frac"), kind="stat", width=4),
        Panel("Workers", "none", of("scaling_num_workers"), kind="stat", width=4),
        Panel("Restarts", "none", of("fault_restarts"), kind="stat", width=4),
        Panel("Bad images", "none", of("data_bad_samples"), kind="stat", width=4),
    ),
    "Learning": (
        Panel(
            "Held-out loss over the best trivial predictor",
            "none",
            of("val_mim_loss_over_baseline", "val_mfm_loss_over_baseline"),
            "1 is nothing learnt.",
        ),
        Panel("Loss: pixels", "none", of("train_loss_mim")),
        Panel(
            "Loss: features of the stages",
            "none",
            of("train_loss_mfm4", "train_loss_mfm8", "train_loss_mfm16"),
        ),
        Panel(
            "Size of stage 16",
            "none",
            of("val_stage16_abs_mean"),
            "Several times its start: the learning rate is too high for features to be reused.",
        ),
        Panel("Gradient norm", "none", of("train_grad_norm"), "Before clipping."),
        Panel("Learning rate", "sci", of("optim_lr")),
        Panel(
            "Scores downstream",
            "none",
            of("val_top1", "val_box_ap", "val_mask_ap", "val_miou", "val_knn_top1"),
            "Per cent.",
            width=24,
        ),
    ),
    "Speed": (
        Panel("Images per second", "none", of("perf_images_per_s")),
        Panel(
            "Share of the time waiting for data",
            "percentunit",
            of("perf_data_wait_frac"),
            "Above a few per cent: more data.num_cpus, data nodes, or prepared data.",
        ),
        Panel("Most memory of worker 0", "gbytes", of("memory_peak_gib")),
    ),
    "Faults": (
        Panel(
            "Restarts, failed checkpoints, skipped steps",
            "none",
            of("fault_restarts", "fault_failed_checkpoints", "train_skipped_steps"),
        ),
        Panel("Steps computed again", "none", of("fault_lost_steps")),
        Panel(
            "Checkpoints: writing, and training standing still for it",
            "s",
            of("checkpoint_save_s", "checkpoint_stall_s"),
        ),
    ),
    "Nodes": (
        Panel("CPU", "percent", (("{{instance}}", f"ray_node_cpu_utilization{{{NODE}}}"),)),
        Panel("Memory in use", "bytes", (("{{instance}}", f"ray_node_mem_used{{{NODE}}}"),)),
        Panel("GPU", "percent", (("{{instance}}", f"ray_node_gpus_utilization{{{NODE}}}"),)),
        Panel(
            "Object store in use",
            "bytes",
            (("{{instance}}", f"ray_object_store_used_memory{{{NODE}}}"),),
        ),
        Panel("Disk free", "bytes", (("{{instance}}", f"ray_node_disk_free{{{NODE}}}"),)),
        Panel(
            "Network received",
            "Bps",
            (("{{instance}}", f"ray_node_network_receive_speed{{{NODE}}}"),),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": []})
        panels[-1]["gridPos"] = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        x, y = 0, y + 1
        height = 4 if row[0].kind == "stat" else HEIGHT
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            panels.append({**drawn(panel), "gridPos": place})
            x += panel.width
        y += height
    for number, panel_json in enumerate(panels, 1):
        panel_json["id"] = number
    return {
        "title": "itpn-ray",
        "uid": "itpn-ray",
        "schemaVersion": 39,
        "tags": ["itpn-ray"],
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def drawn(panel: Panel) -> dict[str, Any]:
    """A panel without its place."""
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
        for i, (legend, expr) in enumerate(panel.lines)
    ]
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}}
    if panel.kind == "timeseries":
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": options,
    }


def variables() -> list[dict[str, Any]]:
    """What is chosen at the top: the data source, the cluster, the runs."""

    def values_of(name: str, label: str, query: str) -> dict[str, Any]:
        return {
            "type": "query",
            "name": name,
            "label": label,
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }

    source = {"type": "datasource", "name": "datasource", "label": "source", "query": "prometheus"}
    session = "label_values(ray_node_cpu_utilization, SessionName)"
    runs = "label_values(ray_itpn_step, run)"
    return [source, values_of("session", "cluster", session), values_of("run", "run", runs)]


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
