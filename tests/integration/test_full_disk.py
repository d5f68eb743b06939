"""A real small disk that fills up under the checkpoints of a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.config_values import apply_overrides
from pipeline.logbook import Logbook
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import run_pretraining
from pipeline.run_folder import RunFolder
from pipeline.trainer import RunFailedError
from tests.pipeline.storage_faults import small_disk

pytestmark = [
    *(pytest.mark.ray, pytest.mark.slow, pytest.mark.faults),
    pytest.mark.usefixtures("ray_cluster"),
]
ROOM_KIB = 3000  # two checkpoints of 1,260 KiB, but not the third beside them


def config_on(disk: Path, config: PretrainConfig, **more: Any) -> PretrainConfig:
    settings = {
        "data.synthetic": True,
        "data.path": "",
        "run.checkpoint_path": str(disk),
        "run.checkpoint_every_steps": 5,
    }
    return apply_overrides(config, settings | {k.replace("__", "."): v for k, v in more.items()})


def events(config: PretrainConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in Logbook(RunFolder(config).events_file).read() if e["event"] == kind]


def test_a_run_trains_on_over_a_full_disk_and_is_finished_when_there_is_room(
    debug_config: PretrainConfig, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", ROOM_KIB) as disk:
        config = config_on(disk, debug_config)
        message = r"the checkpoint of step 20 was not written: .*Make room, and the same command"
        with pytest.raises(RunFailedError, match=message):
            run_pretraining(config)
        folder = RunFolder(config)
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 20, "it trained to the end"
        assert [e["step"] for e in events(config, "checkpoint")] == [5, 10]
        assert [e["step"] for e in events(config, "checkpoint_failed")] == [15, 20]
        kept = sorted(path.name for path in (disk / config.run.name).iterdir())
        assert kept == ["step_00000005", "step_00000010"], "no remains"

        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        summary = run_pretraining(config)
    assert summary["steps"] == 20 and summary["restarts"] == 1 and summary["lost_steps"] == 10
    assert events(config, "resume")[-1]["step"] == 10
    assert (folder.path / "encoder.safetensors").exists()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 21))


def test_a_run_told_to_stop_at_a_full_disk_stops_soon_after(
    debug_config: PretrainConfig, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", ROOM_KIB) as disk:
        config = config_on(disk, debug_config, run__on_checkpoint_error="stop")
        config = apply_overrides(config, {"optim.num_steps": 400})
        with pytest.raises(RunFailedError, match=r"was not written: .*Make room"):
            run_pretraining(config)
        assert [e["step"] for e in events(config, "checkpoint")] == [5, 10]
        lines = (RunFolder(config).path / "metrics.jsonl").read_text().splitlines()
        assert 15 <= json.loads(lines[-1])["step"] < 100
