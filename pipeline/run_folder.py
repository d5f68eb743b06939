"""The folder of a run: what lies where, and whether the same command may go on in it.

`<run.storage_path>/<run.name>/` holds config.json, state.json (MLflow run id, status),
metrics.jsonl, events.jsonl (starts, checkpoints, faults), checkpoints/, pictures by kind, and at
the end encoder.safetensors (a fine-tuning run: model.safetensors), summary.json and report.html.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.artifact_store import check_artifact_root
from pipeline.checkpoint import ENCODER_FILE, MODEL_FILE
from pipeline.config import TrainingConfig
from pipeline.config_values import config_diff, config_from_dict, config_to_dict
from pipeline.pretrain_config import PretrainConfig
from pipeline.quarantine import QUARANTINE_FILE

CONFIG_FILE = "config.json"
CLASSES_FILE = "classes.json"
"""What a fine-tuned model predicts."""
REPORT_FILE = "report.html"
"""The run on one page."""


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.export_file = ENCODER_FILE if isinstance(config, PretrainConfig) else MODEL_FILE
        """Weights to go on with, in the folder and in each checkpoint."""
        self.storage_path = Path(config.run.storage_path).absolute()
        self.path = self.storage_path / config.run.name
        self.checkpoints = str(self.path / "checkpoints")
        if config.run.checkpoint_path:
            self.checkpoints = f"{config.run.checkpoint_path.rstrip('/')}/{config.run.name}"
        self.events_file = self.path / "events.jsonl"
        self.non_finite_dumps = self.path / "nonfinite"
        self.summary_file = self.path / "summary.json"
        self.environment_file = self.path / "environment.json"
        self._config_file = self.path / CONFIG_FILE
        self._state_file = self.path / "state.json"

    def check(self) -> None:
        """Refuse what must not happen silently.

        Raises:
            ValueError: the run is finished, was started with another configuration, or has no place
                for its checkpoints or artifacts.
        """
        storage.resolve(self.checkpoints)
        name = self.config.run.name
        if self.is_finished:
            raise ValueError(
                f"run.name='{name}' is finished ({self.path}); pick another name with --run.name, "
                "or delete that folder to train again. To train it longer, remove its summary.json "
                "and pass a larger --optim.num-steps with --run.allow-config-change"
            )
        self.check_config()
        # Across a network this is asked before training: hours later is too late to learn it.
        if self.config.run.checkpoint_path:
            storage.check_writable(self.checkpoints, "run.checkpoint_path")
        check_artifact_root(self.config.tracking.artifact_root)

    def check_config(self) -> None:
        """Refuse a folder that another configuration began.

        Raises:
            ValueError: the configurations differ, with every difference.
        """
        name = self.config.run.name
        if not self._config_file.exists() or self.config.run.allow_config_change:
            return
        before = json.loads(self._config_file.read_text())
        with contextlib.suppress(ValueError, TypeError):  # settings it did not know yet
            before = config_to_dict(config_from_dict(type(self.config), before))
        changes = config_diff(before, config_to_dict(self.config))
        if changes:
            shown = "\n  ".join(changes)
            raise ValueError(
                f"run.name='{name}' was started with another configuration ({self.path}):\n"
                f"  {shown}\npick another --run.name, resume with --run.allow-config-change, or "
                "delete that folder"
            )

    def open(self) -> None:
        """Create the folder and write the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self._config_file, config_to_dict(self.config))

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder, replacing an older one in one go."""
        write_json(self.path / name, content)

    def withdraw(self) -> None:
        """Undo `open` for a run that never started, so that it holds no other to its config."""
        self._config_file.unlink(missing_ok=True)

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary_file.exists()

    @property
    def state(self) -> dict[str, Any]:
        """Facts that outlive a restart of the driver, such as the MLflow run id."""
        if not self._state_file.exists():
            return {}
        state: dict[str, Any] = json.loads(self._state_file.read_text())
        return state

    def update_state(self, **facts: Any) -> None:
        """Add facts to the state."""
        write_json(self._state_file, {**self.state, **facts})

    def finish(self, summary: dict[str, Any], checkpoint: Path) -> None:
        """Publish the weights, then the summary that marks the run as finished."""
        shutil.copyfile(checkpoint / self.export_file, self.path / self.export_file)
        write_json(self.summary_file, summary)

    def files_for_artifacts(self) -> list[Path]:
        """Small files worth a copy in MLflow at the end of the run."""
        names = (
            *(CONFIG_FILE, "metrics.jsonl", "events.jsonl", "summary.json", "environment.json"),
            *(QUARANTINE_FILE, CLASSES_FILE, REPORT_FILE, self.export_file),
        )
        return [self.path / name for name in names]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a small file in one go: a kill or a full disk leaves the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
