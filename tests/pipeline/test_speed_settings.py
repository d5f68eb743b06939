"""Settings of speed in the loop: the run is the same, but for its last digits."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from tests.pipeline.loop import LocalRun

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {"optim.num_steps": 4, "run.evaluate_every_steps": 2, "run.picture_every_steps": 4}


def histories(
    config: PretrainConfig, folder: Path, settings: dict[str, Any]
) -> list[dict[int, dict[str, float]]]:
    runs = [
        LocalRun(apply_overrides(config, {**STEPS, **changes}), folder / str(number))
        for number, changes in enumerate(({}, settings))
    ]
    for run in runs:
        run()
        assert run.pictures and run.checkpointer.latest()
    return [run.history() for run in runs]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"scaling.grad_checkpointing": True}, 1e-6),
        ({"scaling.bf16": "always"}, 2e-2),
        pytest.param({"scaling.compile": True}, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_it_has_the_losses_of_a_run_without(
    debug_config: PretrainConfig, tmp_path: Path, settings: dict[str, Any], tolerance: float
):
    without, with_it = histories(debug_config, tmp_path, settings)
    for step, record in without.items():
        for key, value in record.items():
            if key.startswith(("train/loss", "val/")) and "knn" not in key:
                assert with_it[step][key] == pytest.approx(value, rel=tolerance), (step, key)
    if "scaling.bf16" in settings:
        assert with_it != without, "it is in use"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"scaling.grad_checkpointing": True}, "models.hivit.checkpoint"),
        ({"scaling.compile": True}, "pipeline.pretrain.compile_training"),
    ],
)
def test_it_is_in_use(
    debug_config: PretrainConfig, tmp_path: Path, settings: dict[str, Any], name: str
):
    module, _, function = name.rpartition(".")
    real = getattr(importlib.import_module(module), function)
    wraps = real if function == "checkpoint" else None  # compiling is tested above
    with mock.patch(name, wraps=wraps) as used:
        histories(debug_config, tmp_path / "off", {})
        assert not used.called
        histories(debug_config, tmp_path / "on", settings)
    assert used.called


def test_bfloat16_is_off_on_cpus_unless_asked_for(debug_config: PretrainConfig, tmp_path: Path):
    gpu, never = histories(debug_config, tmp_path, {"scaling.bf16": "never"})
    assert gpu == never
    with pytest.raises(ValueError, match=r"scaling.bf16='yes' must be one of gpu, always, never"):
        apply_overrides(debug_config, {"scaling.bf16": "yes"})
