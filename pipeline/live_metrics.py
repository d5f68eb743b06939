"""A run's metrics where Prometheus finds them: at the metrics port of the node of worker 0.

Surprising: these are Ray's gauges, so what a cluster scrapes for Ray anyway has them, and a run
that is over stops being reported. `metrics.jsonl` and MLflow keep the history.
"""

from __future__ import annotations

import logging
import re

from ray.util.metrics import Gauge

logger = logging.getLogger(__name__)
PREFIX = "itpn_"
"""Of every name; Ray adds `ray_` before it."""
_TAGS = ("run", "kind")


def gauge_name(key: str) -> str:
    """`train/loss_mim` -> `itpn_train_loss_mim`; Prometheus knows no slashes."""
    return PREFIX + re.sub(r"\W", "_", key)


class LiveMetrics:
    """Gauges of the newest value of every metric of a run, with the tags `run` and `kind`.

    Args:
        run: name of the run.
        kind: `pretrain` or the task.
    """

    def __init__(self, run: str, kind: str) -> None:
        self._tags = {"run": run, "kind": kind}
        self._gauges: dict[str, Gauge] = {}
        self._is_working = True

    def set(self, step: int, metrics: dict[str, float]) -> None:
        """Take over the metrics of a step. Never raises: a run does not end for its gauges."""
        if not self._is_working:
            return
        try:
            for key, value in {"step": float(step), **metrics}.items():
                if key not in self._gauges:
                    self._gauges[key] = Gauge(gauge_name(key), f"{key} of a run.", _TAGS)
                self._gauges[key].set(value, self._tags)
        except Exception as error:
            self._is_working = False
            logger.warning("no live metrics for Prometheus: %s", error)
