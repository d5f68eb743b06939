"""A training worker on a disk that is really full: it says so, and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.mlflow_run import MlflowRun
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretraining_run import PretrainSession
from pipeline.quarantine import BadSample, read_quarantine
from pipeline.run_folder import RunFolder
from pipeline.train_state import Worker
from tests.pipeline.storage_faults import fill_disk, small_disk


class Remarks(list[str]):
    """Stands for `ProgressBoard.say` of a Ray actor."""

    @property
    def say(self) -> Remarks:
        return self

    def remote(self, text: str) -> None:
        self.append(text)


def test_pictures_and_quarantine_without_room_are_told_and_stop_nothing(
    debug_config: PretrainConfig, tmp_path: Path
):
    with small_disk(tmp_path / "disk", 200) as disk:
        config = apply_overrides(debug_config, {"run.storage_path": str(disk)})
        folder = RunFolder(config)
        config = apply_overrides(config, {"tracking.uri": f"sqlite:///{tmp_path / 'mlflow.db'}"})
        mlflow_run = MlflowRun(config, folder)
        said = Remarks()
        job: dict[str, Any] = {
            "config": config_to_dict(config),
            "mlflow": {"uri": mlflow_run.uri, "run_id": mlflow_run.open(num_samples=24)},
            "board": said,
            "bad_files": [],
        }
        session = PretrainSession(job, Worker(0, 1, torch.device("cpu")))
        session._on_start(0)
        filler = fill_disk(disk, 0)
        bad = [BadSample(f"{i}.jpg", i, "OSError", "cut") for i in range(2)]
        session._on_picture(1, "reconstructions", b"png" * 10_000)
        session._on_quarantine(bad[:1])
        picture, quarantine = said
        assert picture.startswith("the picture of step 1 was not saved: [Errno 28] No space left")
        assert "quarantine.parquet was not written: [Errno 28]" in quarantine
        filler.unlink()
        session._on_picture(2, "reconstructions", b"png" * 10_000)
        session._on_quarantine(bad)
        session.close()
        assert len(said) == 2
        pictures = [path.name for path in (folder.path / "reconstructions").iterdir()]
        assert pictures == ["step_00000002.png"]
        assert read_quarantine(str(folder.path / "quarantine.parquet")) == bad
        leftovers = [path for path in folder.path.rglob("*") if path.suffix == ".part"]
        assert not leftovers
