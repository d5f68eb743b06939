"""One trial of a sweep, as Ray Tune sees it: an actor that drives an ordinary fine-tuning run.

Surprising: Tune never stops a trial, because it would kill it after ten seconds. A trial that is to
end finds a file, and its run then ends as after Ctrl-C, with a checkpoint and a closed MLflow run.
A run that fails is no error of Tune's either: its reason is its last result.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from pathlib import Path
from typing import Any

from ray import tune

from pipeline.config_values import config_from_dict
from pipeline.finetune_config import CONFIG_CLASSES, FinetuneConfig
from pipeline.finetuning_run import run_finetuning
from pipeline.run_folder import RunFolder

logger = logging.getLogger(__name__)
STEP, VALUE = "step", "value"
"""Of an evaluation: optimiser steps done, the task's main metric."""
ERROR = "error"
"""Why the run failed; empty if it did not."""
_JOIN_S = 120.0
_BEAT_S = 1.0

_Told = dict[str, Any] | BaseException
"""A result for Tune, or what went wrong with this actor itself."""


class TrialRun(tune.Trainable):
    """Drives the run of one trial.

    Its config: task; run, the trial's config as a plain dict; metric, the name of the main one;
    stop_files, any of which says that the run is to end.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Called by Tune; nothing starts before the first step."""
        self.metric: str = config["metric"]
        self.run_config: FinetuneConfig = config_from_dict(
            CONFIG_CLASSES[config["task"]], config["run"]
        )
        self._stop_files = [Path(path) for path in config["stop_files"]]
        self._news: queue.Queue[_Told] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem = ""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune to use this process, which has imported everything, for another trial."""
        self.cleanup()  # Tune does not call it in between
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next evaluation, or the end of the run; every second nothing, to look for the files.

        Raises:
            BaseException: whatever the run ended with that is not the run's own failure.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._drive, name="trial", daemon=True)
            self._thread.start()
        if any(path.exists() for path in self._stop_files):
            self._stop.set()
        try:
            told = self._news.get(timeout=_BEAT_S)
        except queue.Empty:
            return {"done": False}
        if isinstance(told, BaseException):
            raise told
        return told

    def _drive(self) -> None:
        """The run, in a thread; its last word has done=True."""
        try:
            if not RunFolder(self.run_config).is_finished:
                run_finetuning(self.run_config, stop=self._stop, on_record=self._hear)
            self._news.put({"done": True, ERROR: ""})
        except KeyboardInterrupt:  # told to stop
            self._news.put({"done": True, ERROR: self._problem})
        except Exception as error:
            self._news.put({"done": True, ERROR: str(error) or type(error).__name__})
        except BaseException as error:
            self._news.put(error)

    def _hear(self, step: int, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            return
        value = metrics[self.metric]
        if not math.isfinite(value):
            self._problem = f"{self.metric} is {value} at step {step}"
            self._stop.set()  # raising here would leave the workers at work
        else:
            self._news.put({"done": False, STEP: step, VALUE: value})

    def cleanup(self) -> None:
        """Called by Tune when the actor is no longer needed; its run has ended long since, unless
        Tune itself fails."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            logger.warning("run '%s' did not end in %g s", self.run_config.run.name, _JOIN_S)
