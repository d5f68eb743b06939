"""Distillation from a frozen teacher on the session's Ray cluster, with a sharded student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from models.itpn import create_itpn
from models.weights import load_weights
from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import run_pretraining
from pipeline.tracking import default_tracking_uri
from tests.pipeline.loop import LocalRun

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_two_sharded_workers_distil_on_ray_as_the_loop_does_in_one_process(
    debug_config: PretrainConfig, tmp_path: Path
):
    torch.manual_seed(3)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), weights)
    config = apply_overrides(
        debug_config,
        {
            "objective.kind": "distillation",
            "objective.teacher": "timm/test_vit",
            "objective.teacher_weights": str(weights),
            "optim.num_steps": 4,
        },
    )
    alone = LocalRun(config, tmp_path / "alone")
    alone()
    weights_before = weights.read_bytes()
    sharded = {"scaling.sharding": "full", "scaling.grad_checkpointing": True}
    config = apply_overrides(
        config, {"scaling.num_workers": 2, "run.name": "two", "data.num_cpus": 0, **sharded}
    )
    summary = run_pretraining(config)
    folder = Path(config.run.storage_path) / "two"
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        for key in (k for k in record if k.startswith(("train/loss", "val/"))):
            expected = alone.records[record["step"]][key]
            assert record[key] == pytest.approx(expected, rel=1e-4), (record["step"], key)
    assert {"train/loss_main", "train/loss_auxiliary"} <= set(records[-1])
    assert summary["main_loss_over_baseline"] == records[-1]["val/main_loss_over_baseline"]
    assert [p.name for p in (folder / "reconstructions").iterdir()] == ["step_00000004.png"]
    report = load_weights(create_itpn("itpn_debug"), folder / "encoder.safetensors")
    assert not report.new and not report.dropped
    assert weights.read_bytes() == weights_before
    client = MlflowClient(default_tracking_uri(Path(config.run.storage_path)))
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["objective.teacher"] == "timm/test_vit"
    assert run.data.metrics["train/loss_main"] == records[-1]["train/loss_main"]
