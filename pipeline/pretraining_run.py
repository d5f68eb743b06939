"""A pre-training run on Ray: its data, what each worker does, its figures.

The loop itself is in `pretrain.py`, the driver in `trainer.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

import ray
import torch

from models.weights import LoadReport, load_weights
from pipeline.between_steps import Hooks
from pipeline.checkpoint import Checkpointer
from pipeline.config_values import config_from_dict
from pipeline.data import SampleFactory, SyntheticBatches, TrainingBatches
from pipeline.datasets import DataSets
from pipeline.frozen_features import OnlineKnn
from pipeline.objectives import objective_of
from pipeline.pretrain import Batch, pretrain
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_weights import PretrainWeights, read_pretrain_weights
from pipeline.teachers import frozen_teacher
from pipeline.train_state import Worker
from pipeline.train_worker import WorkerSession
from pipeline.trainer import RunPlan, describe_batches, run_training


def run_pretraining(config: PretrainConfig) -> dict[str, Any]:
    """Run, or resume, a pre-training run; returns its summary.

    Raises:
        ValueError: anything in the config, the data or the run folder a user can fix.
        RunFailedError: training failed.
        KeyboardInterrupt: the run was interrupted; its newest checkpoint is kept.
    """
    return run_training(config, lambda: _plan(config))


def _plan(config: PretrainConfig) -> RunPlan:
    weights = read_pretrain_weights(config)
    report = load_report(config, weights)
    data = DataSets.open(config)
    return RunPlan(
        session=PretrainSession,
        num_samples=data.num_samples,
        header=describe(config, data, weights, report),
        train=data.train,
        val=data.val,
        job={},
        shared={"weights": weights},
        headline=objective_of(config).headline,
    )


def load_report(config: PretrainConfig, weights: PretrainWeights) -> LoadReport | None:
    """What becomes of every initial weight, tried on a model of the driver; None for random ones.

    Raises:
        ValueError: they do not fit, with the keys.
    """
    if weights.init.state is None:
        return None
    model = objective_of(config).build(frozen_teacher(config, weights.teacher, torch.device("cpu")))
    try:
        return load_weights(model, weights.init.state)
    except ValueError as error:
        raise ValueError(f"--init {weights.init.source} does not fit: {error}") from error


def describe(
    config: PretrainConfig,
    data: DataSets,
    weights: PretrainWeights,
    report: LoadReport | None,
) -> str:
    """The header of a run: data, batch and learning-rate arithmetic, patches, weights."""
    kind = "synthetic images" if config.data.synthetic else "images"
    lines = [
        f"{describe_batches(config, data.num_samples, kind)}; "
        f"{config.num_visible} of {config.data.num_patches} patches visible"
    ]
    if report is not None:
        lines += [f"weights   {weights.init.source}"]
        lines += [f"  {line}" for line in str(report).splitlines()]
    if weights.teacher is not None:
        lines += [f"teacher   {weights.teacher.source}, frozen"]
    return "\n".join(lines)


class PretrainSession(WorkerSession):
    """One worker's part in a pre-training run.

    Args:
        job: what the driver sent (see `trainer.run_training`).
        worker: this process.
    """

    config: PretrainConfig

    def __init__(self, job: dict[str, Any], worker: Worker) -> None:
        super().__init__(job, worker, config_from_dict(PretrainConfig, job["config"]))

    def train(self, hooks: Hooks) -> dict[str, Any]:
        """Run the loop; returns what it returns."""
        return pretrain(
            self.config,
            num_samples=self.job["num_samples"],
            batches_from=self._batches_from,
            evaluation_batch=self._evaluation_batch(),
            weights=ray.get(self.job["weights"][0]),
            probe=self._knn() or (lambda encoder: {}),
            checkpointer=self.checkpointer,
            worker=self.worker,
            hooks=hooks,
        )

    def _batches_from(self, step: int) -> Iterable[Batch]:
        if self.config.data.synthetic:
            return SyntheticBatches(self.config)
        return TrainingBatches(
            self.config,
            self.job["train_index"][0],
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            start_step=step,
            num_steps=self.config.num_steps(self.job["num_samples"]),
        )

    def _evaluation_batch(self) -> Batch:
        if self.config.data.synthetic:
            return SyntheticBatches(self.config).batch
        held_out = SampleFactory.build(self.config, ray.get(self.job["val_index"][0]))
        return held_out.evaluation_batch(self.worker.rank, self.worker.world_size)

    def _knn(self) -> OnlineKnn | None:
        train, val = (ray.get(self.job[f"{part}_index"][0]) for part in ("train", "val"))
        if train is None or not self.config.data.val_path:
            return None
        return OnlineKnn.where_labelled(self.config, train, val, self.worker)

    def _on_non_finite(self, dump: dict[str, Any]) -> None:
        """Leave a dump that replays under nonfinite/."""
        folder = self.folder.non_finite_dumps
        writer = Checkpointer(folder, keep=1, facts=self.checkpointer.facts)
        prefix = "encoder."
        encoder = {
            k.removeprefix(prefix): v for k, v in dump["model"].items() if k.startswith(prefix)
        }
        writer.save(dump["step"], dump, encoder)
        writer.wait()
        if (failed := writer.finished()[-1].error) is not None:
            self.postscript = f". The dump was not written: {failed}"
            return
        path = writer.fetch(dump["step"])
        with contextlib.suppress(OSError):  # to read by eye; the state holds it, too
            (path / "streak.json").write_text(json.dumps(dump["streak"], indent=1))
        self.postscript = f". To look into it: python -m jobs.replay {path}"
