"""Passwords in URIs are refused wherever a URI is taken, and never repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config_values import apply_overrides
from pipeline.credentials import require_no_password, without_passwords
from pipeline.doctor import DoctorConfig
from pipeline.embed import EmbedConfig
from pipeline.prepare.settings import PrepareConfig
from pipeline.recipes import debug
from pipeline.tracking import tracking_uri

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("uri", "way"),
    [
        ("https://me:hunter2@mlflow.example.com", "MLFLOW_TRACKING_PASSWORD"),
        ("http://me:hunter2@127.0.0.1:5000/path", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql+psycopg2://me:hunter2@db/mlflow", "PGPASSWORD"),
        ("s3://AKIA:hunter2@bucket/folder", "AWS_SECRET_ACCESS_KEY"),
        ("s3://AKIA:hun/ter2@bucket/folder", "AWS_SECRET_ACCESS_KEY"),
        ("abfs://me:hunter2@container", "environment variables"),
    ],
)
def test_a_password_in_a_uri_is_refused_with_the_variable_to_set(uri: str, way: str):
    with pytest.raises(ValueError, match=way) as error:
        require_no_password("key", uri)
    assert "hun" not in str(error.value) and str(error.value).startswith("key='")


@pytest.mark.parametrize(
    "uri",
    [
        *("", "runs", "/mnt/a:b@c", "s3://bucket/a@b", "http://127.0.0.1:5000", "databricks"),
        *("sqlite:////mnt/runs/mlflow.db", "postgresql://mlflow@db:5432/mlflow", "http://me@host"),
        *("s3://bucket/at:9@noon.parquet", "http://host:5000/proxy@home"),
    ],
)
def test_other_uris_and_paths_are_taken(uri: str):
    require_no_password("key", uri)
    assert without_passwords(uri) == uri


URI = "s3://AKIA:hunter2@bucket/x"


@pytest.mark.parametrize(
    "key", ["data.path", "data.val_path", "run.checkpoint_path", "tracking.uri"]
)
def test_a_run_refuses_it(key: str):
    with pytest.raises(ValueError, match=key) as error:
        apply_overrides(debug(), {key: URI})
    assert SECRET not in str(error.value)


def test_the_other_jobs_refuse_it():
    makers = [
        lambda: PrepareConfig(source=URI, out="a"),
        lambda: PrepareConfig(source="a", out=URI),
        lambda: EmbedConfig(run="a", images=URI, out="b"),
        lambda: EmbedConfig(run="a", images="b", out=URI),
        lambda: DoctorConfig(tracking_uri=URI),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="held a password") as error:
            make()
        assert SECRET not in str(error.value)


def test_the_uri_of_the_environment_is_used_where_none_is_given_and_may_hold_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert tracking_uri("", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri("", tmp_path) == "http://mlflow:5000"
    assert tracking_uri("http://other", tmp_path) == "http://other"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI='http://") as error:
        tracking_uri("", tmp_path)
    assert SECRET not in str(error.value)
