"""Fixtures shared by all tests. The Ray cluster is started once, by the first test that asks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import object_store, storage
from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import debug
from tests.s3_proxy import FaultProxy, fault_proxy
from tests.s3_server import S3Server, environment, s3_server

REPO_ROOT = Path(__file__).resolve().parents[1]
# Where nobody looks at a new counterexample, the same examples every time.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """Golden numbers and time limits assume the two cores of a small machine."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs look at this variable, and `mlflow.set_tracking_uri` sets it; no test inherits it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def levels_of_loggers() -> Iterator[None]:
    """Jobs and benchmarks set levels for their process; those run in this one are undone."""
    ours = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if name.split(".")[0] in ("pipeline", "models", "jobs")
        and isinstance(logger, logging.Logger)
    ]
    levels = [logger.level for logger in ours]
    yield
    for logger, level in zip(ours, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def way_of_products() -> Iterator[None]:
    """`use_onednn` sets it for the process; a test that works as a worker does leaves no trace."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For runs of a tiny model: two threads wait longer for each other than they compute, and 20
    times as long where other processes want the cores, too."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth random images of several sizes and formats, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for i in range(24):
        generator = np.random.default_rng(i)
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        size = (90 + 7 * (i % 4), 80 + 5 * (i % 3))
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        suffix = ("jpg", "png", "webp")[i % 3]
        image.save(folder / ("sub" if i < 2 else "") / f"image_{i:02d}.{suffix}")
    return folder


@pytest.fixture
def debug_config(image_folder: Path, tmp_path: Path) -> PretrainConfig:
    """The debug recipe on the image folder, writing under the test's own folder."""
    return apply_overrides(
        debug(), {"data.path": str(image_folder), "run.storage_path": str(tmp_path / "runs")}
    )


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One local Ray cluster for the session, with a job server; yields the dashboard address."""
    import ray

    from pipeline.cluster import PRIVATE_ENV, QUIET_ENV

    os.environ.update({**QUIET_ENV, **PRIVATE_ENV})
    context = ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        object_store_memory=300 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPO_ROOT), **QUIET_ENV}},
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server for the session, with one bucket."""
    with s3_server() as server:
        yield server


@pytest.fixture
def faulty_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The server behind a proxy that has no faults yet; this process's environment names it.

    In this process the SDK, whose pauses last seconds, tries a request once: retries are ours, and
    more of them, because an upload begins anew for each of its requests that fails.
    """
    monkeypatch.setattr(object_store, "SDK_RETRIES", 0)
    monkeypatch.setattr(storage, "RETRY_PAUSES_S", (0.01,) * 12)
    object_store._connect.cache_clear()
    with fault_proxy(s3.url) as proxy:
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy
    object_store._connect.cache_clear()
