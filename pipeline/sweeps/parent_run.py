"""The MLflow run of a sweep, under which its trials are shown."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.cluster import REPO_ROOT
from pipeline.config_values import flatten_config
from pipeline.metrics_file import MetricsFile
from pipeline.mlflow_delivery import connect
from pipeline.reproducibility import environment, git_commit
from pipeline.run_folder import write_json
from pipeline.sweeps.pictures import draw_pictures
from pipeline.sweeps.plan import SweepPlan
from pipeline.sweeps.registry import register_best
from pipeline.sweeps.report import TrialRow, as_markdown

logger = logging.getLogger(__name__)
_STATE_FILE = "state.json"
_DESCRIPTION = "mlflow.note.content"


class ParentRun:
    """One MLflow run over all starts of a sweep.

    Args:
        plan: the sweep.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.uri = plan.base.tracking.uri
        self._state_file = plan.folder / _STATE_FILE
        self._files: list[Path] = []
        self._tags: dict[str, str] = {}
        self._run_id = ""

    def open(self) -> str:
        """Create or reopen the run; its id, which is kept in the sweep's folder.

        Raises:
            ValueError: MLflow takes no new run, or does not know the old one.
        """
        state = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
        state.setdefault("mlflow_key", tracking.new_key())
        write_json(self._state_file, state)
        asked = self.plan.as_asked()
        space = {f"space.{axis.key}": axis.text for axis in self.plan.axes}
        sweep = {f"sweep.{key}": value for key, value in asked["sweep"].items()}
        self._run_id = tracking.open_run(
            self.uri,
            experiment=self.plan.base.tracking.experiment,
            artifact_root=self.plan.base.tracking.artifact_root,
            artifact_folder=Path(self.plan.base.run.storage_path) / "mlartifacts",
            name=self.plan.base.run.name,
            run_id=state.get("mlflow_run_id"),
            key=state["mlflow_key"],
            params={**flatten_config(self.plan.base), **sweep, **space},
            tags={**environment(), "git_commit": git_commit(REPO_ROOT)},
        )
        write_json(self._state_file, state | {"mlflow_run_id": self._run_id})
        return self._run_id

    def log(self, rows: list[TrialRow], summary: dict[str, Any], files: list[Path]) -> None:
        """Metrics, pictures and files of a sweep that has come to its end.

        The step of a metric is the number of the trial: the best so far rises along it.
        """
        folder = self.plan.folder
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        metrics = MetricsFile(folder / "metrics.jsonl", start_step=0)
        name, best, now = self.plan.metric.replace("/", "_"), None, round(time.time(), 3)
        for number, row in enumerate(rows):
            if row.outcome == "finished" and row.value is not None:
                best = row.value if best is None else max(best, row.value)
                metrics.append({"step": number, "time": now, f"best/{name}": best})
        counts = {key: float(value) for key, value in summary.items() if key.startswith("num_")}
        last = {f"sweep/{key}": value for key, value in counts.items()}
        hours = {f"sweep/{key}": summary[key] for key in ("trial_hours", "hours_saved")}
        metrics.append({"step": len(rows), "time": now, **last, **hours})
        metrics.close()
        pictures = draw_pictures(folder, rows, self.plan.axes, self.plan.metric)
        self._files = [*files, *pictures]
        self._tags = {_DESCRIPTION: as_markdown(rows, self.plan.metric, summary)}

    def register(self, best: TrialRow) -> str | None:
        """Put the model of the best trial into the registry, under the sweep's name; its URI.

        None, with a warning, where that is not possible: the sweep has its result all the same.
        """
        name, folder = self.plan.base.run.name, self.plan.folder / best.name
        try:
            registered = register_best(
                self.uri,
                run_id=self._run_id,
                name=name,
                folder=folder,
                trial_run_id=best.mlflow_run_id,
            )
        except Exception as error:  # of MLflow, of a server, of torch.export
            logger.warning("the best model is not registered: %s; it is in %s", error, folder)
            return None
        if registered is None:
            logger.info("a detector cannot be exported; the best model is in %s", folder)
        return registered

    def close(self, status: str) -> None:
        """End the run; warns of a dead server."""
        folder = self.plan.folder
        names = ("sweep.json", "summary.json", "trials.jsonl")
        files = [*self._files, *(folder / name for name in names)]
        problem = tracking.close_run(
            self.uri, self._run_id, status, run_dir=folder, files=files, tags=self._tags
        )
        if problem is not None:
            logger.warning(
                "MLflow at %s lacks something of sweep '%s': %s; the same command delivers it",
                *(self.uri, self.plan.base.run.name, problem),
            )

    def links(self, run_ids: list[str]) -> dict[str, str]:
        """Addresses of the runs' pages on a tracking server; none for a local file."""
        if not self.uri.startswith("http"):
            return {}
        client = connect(self.uri)
        experiment = client.get_run(self._run_id).info.experiment_id
        page = f"{self.uri.rstrip('/')}/#/experiments/{experiment}/runs/"
        return {run_id: page + run_id for run_id in run_ids}
