"""The weights a pre-training run starts from and learns from, as the driver reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.init_weights import InitialWeights, read_initial_weights
from pipeline.pretrain_config import PretrainConfig
from pipeline.teachers import TeacherWeights, read_teacher

_RANDOM = InitialWeights(None, "random weights")


@dataclass(frozen=True)
class PretrainWeights:
    """Initial weights, and those of a frozen teacher."""

    init: InitialWeights = field(default=_RANDOM)
    """What the student starts from."""
    teacher: TeacherWeights | None = None
    """A frozen teacher; None for the moving average, or none at all."""


def read_pretrain_weights(config: PretrainConfig) -> PretrainWeights:
    """Read what `--init` and `--objective.teacher` name.

    Raises:
        ValueError: it holds no weights, or not those of the model of the config.
        FileNotFoundError: it does not exist.
    """
    init = read_initial_weights(config.init)
    if init.model_name and init.model_name != config.model.name:
        raise ValueError(
            f"model.name='{config.model.name}', but {init.source} holds a {init.model_name}; give "
            f"--model.name {init.model_name}, or other weights"
        )
    return PretrainWeights(init, read_teacher(config))
