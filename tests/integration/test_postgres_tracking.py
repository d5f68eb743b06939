"""MLflow with PostgreSQL, as on a cluster: both die under a run, and every metric is there once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.config_values import apply_overrides
from pipeline.metrics_file import read_records
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import run_pretraining
from pipeline.run_folder import RunFolder
from tests.integration.postgres import Postgres
from tests.integration.test_tracking_faults import (
    MlflowServer,
    assert_mlflow_has_it_all_once,
    last_step,
    slowly,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    database = Postgres()
    try:
        yield database
    finally:
        database.remove()


@pytest.fixture
def server(postgres: Postgres, tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path, postgres.uri, {"PGPASSWORD": postgres.password})
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_database_and_server_killed_and_restarted_in_mid_run_lose_and_double_nothing(
    debug_config: PretrainConfig,
    postgres: Postgres,
    server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """First the database dies, so that the server answers with errors; then the server as well."""
    settings = {"data.synthetic": True, "optim.num_steps": 60, "tracking.uri": server.uri}
    config = apply_overrides(debug_config, settings)
    is_back = tmp_path / "is_back"
    wait = (
        "import os, time\nuntil = time.monotonic() + 240\n"
        f"while step == 41 and not os.path.exists({str(is_back)!r}) and time.monotonic() < until:\n"
        "    time.sleep(0.05)"
    )
    monkeypatch.setattr("pipeline.trainer.train_worker", slowly(wait))
    with ThreadPoolExecutor(1) as driver:
        run: Future[dict[str, Any]] = driver.submit(run_pretraining, config)
        try:
            wait_until(lambda: run.done() or last_step(config) >= 8, 240, "8 steps are done")
            assert not run.done(), run.exception()
            postgres.kill()
            killed_at = last_step(config)
            wait_until(lambda: last_step(config) >= killed_at + 10, 60, "training goes on")
            server.kill()
            wait_until(lambda: last_step(config) >= 41, 120, "training goes on without both")
            assert killed_at <= 20, "many steps were done without a database"
            postgres.start()
            server.start()
        finally:
            is_back.touch()
        summary = run.result(240)
    assert summary["steps"] == 60 and summary["restarts"] == 0
    assert_mlflow_has_it_all_once(config)
    assert_postgres_holds_the_file(config, postgres, summary["mlflow_run_id"])


def assert_postgres_holds_the_file(config: PretrainConfig, postgres: Postgres, run_id: str) -> None:
    """Row by row, past MLflow's own API, which might hide a double."""
    rows = postgres.query(
        f"select key, step, value from metrics where run_uuid = '{run_id}' order by key, step"
    )
    stored = [(key, int(step), float(value)) for key, step, value in parsed(rows)]
    records = read_records(RunFolder(config).path / "metrics.jsonl")
    written = [
        (key, record["step"], float(value))
        for record in records
        for key, value in record.items()
        if key not in ("step", "time")
    ]
    mine = [row for row in stored if not row[0].startswith("system/")]
    assert sorted(mine) == sorted(written)
    status = postgres.query(f"select status from runs where run_uuid = '{run_id}'")
    assert status == "FINISHED"


def parsed(rows: str) -> Iterator[list[str]]:
    return (row.split("|") for row in rows.splitlines())
