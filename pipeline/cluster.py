"""Joining a Ray cluster, or starting a private one that ends with the run.

Surprising: on one machine the logical CPUs are what the run asks for (training workers + decoding),
not the physical cores. Otherwise two CPU workers on two cores would leave Ray Data none, and the
run would wait for ever without an error.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources

from pipeline.config import TrainingConfig
from pipeline.placement import Node, Work, label_selector, resource_share

logger = logging.getLogger(__name__)
REPO_ROOT = Path(__file__).resolve().parents[1]
QUIET_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
PRIVATE_ENV = {
    "RAY_AUTH_MODE": "disabled",  # nothing outside this process joins
    # A data worker idles while the trainers are busy with what it decoded. Killed after Ray's one
    # second it would spend more CPU on importing than on decoding (measured: half of two cores).
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # Ray warns of more than three times this many processes. The default is the number of cores,
    # and two runs side by side on two cores have more.
    "RAY_worker_maximum_startup_concurrency": "6",
    # How soon Ray Train learns that its workers have ended, or died; the default is two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Nobody takes this one node away; watching for it costs an actor and two seconds of start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Ray Train may still count on a node that has just been lost. It finds out by waiting in vain for
# its workers, by default for a minute.
ELASTIC_ENV = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
_NODE_POLL_S = 1.0
_OBJECT_STORE_BYTES = 512 * 2**20  # uint8 batches in flight; Ray's default takes 30 % of the memory


def needed_cpus(config: TrainingConfig, num_workers: int) -> float:
    """Logical CPUs of a run with so many workers: training and decoding."""
    decoding = max(config.data.num_cpus, num_workers) if config.data.num_cpus else 0
    return num_workers * config.scaling.cpus_per_worker + decoding


@contextlib.contextmanager
def cluster(config: TrainingConfig) -> Iterator[None]:
    """Use the connected cluster, the one of RAY_ADDRESS, or a private local one, for a run.

    Raises:
        ValueError: the cluster is too small for the run.
    """
    if config.scaling.min_workers < config.scaling.max_workers:
        for key, value in ELASTIC_ENV.items():
            os.environ.setdefault(key, value)
    with joined_cluster(math.ceil(needed_cpus(config, config.scaling.max_workers))):
        _check_resources(config)
        yield


@contextlib.contextmanager
def joined_cluster(private_cpus: int) -> Iterator[None]:
    """Use the connected cluster, the one of RAY_ADDRESS, or a private local one.

    A private cluster is stopped at the end; one we joined is only left.

    Args:
        private_cpus: logical CPUs of a private cluster; others have what they have.
    """
    if ray.is_initialized():
        yield
        return
    for key, value in QUIET_ENV.items():
        os.environ.setdefault(key, value)
    # Workers import `models` and `pipeline` from here, however the job was started.
    runtime_env = {"env_vars": {**QUIET_ENV, "PYTHONPATH": _python_path()}}
    with _signal_handlers_kept():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=True, logging_level=logging.WARNING)
        else:
            for key, value in PRIVATE_ENV.items():
                os.environ.setdefault(key, value)
            ray.init(
                address="local",
                num_cpus=private_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=runtime_env,
            )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Take SIGTERM back from `ray.init`: its handlers end a driver at once, with nothing saved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def worker_resources(config: TrainingConfig) -> dict[str, float]:
    """What a training worker takes."""
    scaling = config.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    resources |= {"GPU": scaling.gpus_per_worker} if scaling.use_gpu else {}
    return resources | ({scaling.worker_resource: 1.0} if scaling.worker_resource else {})


def require_room(*works: Work, wait_s: float = 0.0) -> None:
    """Refuse work that no nodes of the connected cluster have room for.

    Args:
        works: each is looked at as if it were alone.
        wait_s: how long an autoscaler may take to bring the nodes.

    Raises:
        ValueError: the room is missing, also then.
    """
    deadline = time.monotonic() + wait_s
    has_asked = False
    try:
        while (refusal := _first_refusal(works)) is not None:
            if time.monotonic() >= deadline:
                waited = f" after {wait_s:g} s" if wait_s else ""
                raise ValueError(f"{refusal}{waited}")
            if not has_asked:
                logger.info("%s; waiting up to %g s for the autoscaler", refusal, wait_s)
                _ask_for_nodes(works)
                has_asked = True
            time.sleep(_NODE_POLL_S)
    finally:
        if has_asked:
            request_resources(bundles=[])  # the run itself holds them from now on


def _first_refusal(works: Sequence[Work]) -> str | None:
    nodes = [
        Node(resources=node["Resources"], labels=node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]
    return next((text for work in works if (text := work.refusal(nodes)) is not None), None)


def _ask_for_nodes(works: Sequence[Work]) -> None:
    wanted = [work for work in works for _ in range(work.count)]
    request_resources(
        bundles=[dict(work.each) for work in wanted],
        bundle_label_selectors=[label_selector(work.labels) for work in wanted],
    )


def _check_resources(config: TrainingConfig) -> None:
    """Refuse a run the cluster is too small for, once its autoscaler has had its time."""
    scaling, data, workers = config.scaling, config.data, config.scaling.min_workers
    works = [
        Work(
            what="a training worker",
            count=workers,
            each=worker_resources(config),
            labels=scaling.worker_labels,
            settings="scaling.num_workers, scaling.cpus_per_worker, scaling.worker_resource or "
            "scaling.worker_labels",
        )
    ]
    if data.worker_resource or data.worker_labels:
        works.append(
            Work(
                what="decoding",
                count=max(data.num_cpus, workers),
                each={"CPU": 1.0, **resource_share(data.worker_resource)},
                labels=data.worker_labels,
                settings="data.num_cpus, data.worker_resource or data.worker_labels",
            )
        )
    if scaling.wait_for_nodes_s:
        require_room(*works, wait_s=scaling.wait_for_nodes_s)
    _check_totals(config)
    require_room(*works)


def _check_totals(config: TrainingConfig) -> None:
    total = ray.cluster_resources()
    scaling, workers = config.scaling, config.scaling.min_workers
    needed, has = needed_cpus(config, workers), total.get("CPU", 0)
    if needed > has:
        decoding = needed - workers * scaling.cpus_per_worker
        raise ValueError(
            f"the cluster has {has:g} CPUs but the run needs {needed:g}: scaling.num_workers="
            f"{workers} x scaling.cpus_per_worker={scaling.cpus_per_worker:g} + "
            f"{decoding:g} for decoding (data.num_cpus, 0 or one a worker); lower one of them"
        )
    if scaling.use_gpu and workers * scaling.gpus_per_worker > total.get("GPU", 0):
        raise ValueError(
            f"the cluster has {total.get('GPU', 0):g} GPUs but scaling.num_workers="
            f"{workers} with scaling.use_gpu needs {scaling.gpus_per_worker:g} each; lower the "
            "workers or pass --scaling.no-use-gpu"
        )


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(p for p in (str(REPO_ROOT), inherited) if p)
