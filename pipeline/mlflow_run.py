"""The MLflow run that belongs to a run folder, as the driver opens and closes it.

Surprising: `mlflow_pending` in state.json is true from the start until MLflow has taken the end of
the run. Whatever kept it from that, an outage or a kill of the driver, the same command delivers
later, also when the run itself is finished.
"""

from __future__ import annotations

import json
import logging
import time

from pipeline import tracking
from pipeline.cluster import REPO_ROOT
from pipeline.config import TrainingConfig
from pipeline.config_values import flatten_config
from pipeline.reproducibility import environment, git_commit
from pipeline.run_folder import RunFolder
from pipeline.train_worker import run_checkpointer

logger = logging.getLogger(__name__)


class MlflowRun:
    """The driver's side of tracking.

    Args:
        config: the run.
        folder: its folder.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self.uri = tracking.tracking_uri(config.tracking.uri, folder.storage_path)

    def deliver_late(self) -> None:
        """Deliver what MLflow could not take at the end of a finished run; else do nothing.

        Raises:
            ValueError: MLflow still does not take it.
        """
        state = self.folder.state
        run_id = state.get("mlflow_run_id")
        if not (self.folder.is_finished and run_id and state.get("mlflow_pending", False)):
            return
        name = self.config.run.name
        ended_at = state.get("ended_at") or self.folder.summary_file.stat().st_mtime
        problem = self._deliver(run_id, "FINISHED", ended_at)
        if problem is not None:
            raise ValueError(
                f"run.name='{name}' is finished ({self.folder.path}), but MLflow at {self.uri} "
                f"still lacks something of it: {problem}; start that server and give the same "
                "command again"
            )
        logger.info("run '%s' is finished, and now MLflow at %s has all of it", name, self.uri)

    def settle(self) -> None:
        """End the MLflow run of a run that nobody will go on with, if a kill has left it open, and
        deliver what it lacks; warns where that is not possible."""
        state = self.folder.state
        if not state.get("mlflow_run_id") or not state.get("mlflow_pending", False):
            return
        status = "FINISHED" if self.folder.is_finished else state["status"]
        self.close(state["mlflow_run_id"], "KILLED" if status == "RUNNING" else status)

    def open(self, *, num_samples: int) -> str:
        """Open the folder and the MLflow run; returns the id of the latter.

        Raises:
            ValueError: a new run cannot be created; no other command is blocked by what is left.
        """
        config, known_id = self.config, self.folder.state.get("mlflow_run_id")
        self.folder.open()
        facts = {**environment(), "git_commit": git_commit(REPO_ROOT)}
        self.folder.environment_file.write_text(json.dumps(facts, indent=1))
        parent = config.tracking.parent_run_id
        nesting = {"mlflow.parentRunId": parent} if parent else {}
        settings = flatten_config(config)
        key = self.folder.state.get("mlflow_key") or tracking.new_key()
        self.folder.update_state(mlflow_key=key)  # a kill from here on leaves no second run
        varied = {f"varied.{key}": settings[key] for key in config.tracking.varied}
        try:
            run_id = tracking.open_run(
                self.uri,
                experiment=config.tracking.experiment,
                artifact_root=config.tracking.artifact_root,
                artifact_folder=self.folder.storage_path / "mlartifacts",
                name=config.run.name,
                run_id=known_id,
                key=key,
                params={**settings, **varied, "num_samples": num_samples, "lr": config.lr},
                tags=facts | nesting,
            )
        except BaseException:
            if known_id is None:
                self.folder.withdraw()
            raise
        self.folder.update_state(
            mlflow_run_id=run_id, status="RUNNING", ended_at=None, mlflow_pending=True
        )
        return run_id

    def close(self, run_id: str, status: str) -> None:
        """End the MLflow run; warns of a dead server or a full disk: the run ended as it did."""
        ended_at = round(time.time(), 3)
        try:
            self.folder.update_state(status=status, ended_at=ended_at)
        except OSError as error:
            logger.warning("%s: %s; its state.json is not up to date", self.folder.path, error)
        problem = self._deliver(run_id, status, ended_at)
        if problem is not None:
            logger.warning(
                "MLflow at %s lacks something of run '%s': %s; nothing is lost, the same command "
                "delivers it when the server is back",
                *(self.uri, self.config.run.name, problem),
            )

    def _deliver(self, run_id: str, status: str, ended_at: float) -> str | None:
        """Deliver what MLflow lacks; why it still does, or None."""
        checkpoints = run_checkpointer(self.config, self.folder, run_id)
        try:
            newest = checkpoints.latest() if self.config.tracking.checkpoint_artifact else None
            facts = json.loads(self.folder.environment_file.read_text())
            problem = tracking.close_run(
                self.uri,
                run_id,
                status,
                run_dir=self.folder.path,
                files=self.folder.files_for_artifacts(),
                checkpoint=newest,
                tags=facts,
                ended_at_s=ended_at,
            )
            if problem is None:
                self.folder.update_state(mlflow_pending=False)
            return problem
        except (OSError, ValueError) as error:  # the disk, or the storage of checkpoints
            return f"{type(error).__name__}: {error}"
