"""The objective of a run by its name."""

from __future__ import annotations

from pipeline.distillation import DistillationObjective
from pipeline.masked_modeling import MaskedObjective
from pipeline.objective import Objective
from pipeline.pretrain_config import PretrainConfig


def objective_of(config: PretrainConfig) -> Objective:
    """What `--objective.kind` names."""
    if config.objective.kind == "distillation":
        return DistillationObjective(config)
    return MaskedObjective(config)
