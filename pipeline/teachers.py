"""The teacher of a pre-training run: reading what `--objective.teacher` names, and building it.

Surprising: the driver reads a frozen teacher's weights, once, and the workers get them through
Ray's object store; so a download or a path is needed on one machine only. Checkpoints do not hold
them: a run that goes on reads them again.
"""

from __future__ import annotations

import difflib
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from models.itpn import create_itpn
from models.pos_embed import resize_pos_embed
from models.teacher import FrozenBackbone, FrozenTeacher
from models.weights import load_weights
from pipeline import storage
from pipeline.config import InitConfig
from pipeline.encoder_settings import pretrained_encoder_kwargs
from pipeline.init_weights import read_initial_weights, read_tensors, run_config
from pipeline.pretrain_config import ObjectiveConfig, PretrainConfig

EMA = "ema"
TIMM = "timm/"
_SETTING = "--objective.teacher"


@dataclass(frozen=True)
class TeacherWeights:
    """A frozen teacher as the driver read it."""

    state: dict[str, Tensor]
    """Its tensors, with the keys of its own model."""
    source: str
    """Where they are from, for people."""
    name: str
    """Name of the timm model, or the variant of our own."""
    encoder_kwargs: dict[str, Any] = field(default_factory=dict)
    """Of our own: what `create_itpn` builds it from."""


def read_teacher(config: PretrainConfig) -> TeacherWeights | None:
    """Read the weights of a frozen teacher; None for the moving average, or without any teacher.

    Raises:
        ValueError: an unknown timm model, weights that do not fit it, or that cannot be had.
        FileNotFoundError: a path that does not exist.
    """
    objective = config.objective
    if objective.teacher == EMA or not config.has_teacher:
        return None
    if objective.teacher.startswith(TIMM):
        return _read_timm(objective)
    weights = read_initial_weights(InitConfig(path=objective.teacher), _SETTING)
    if weights.state is None or not weights.model_name:
        raise ValueError(
            f"{_SETTING} '{objective.teacher}' does not say which variant it is; give the folder "
            f"of its run, '{EMA}', or '{TIMM}NAME'"
        )
    kwargs = pretrained_encoder_kwargs(
        weights.model_name, config.data.image_size, weights.state, run_config(objective.teacher)
    )
    return TeacherWeights(weights.state, weights.source, weights.model_name, kwargs)


def _read_timm(objective: ObjectiveConfig) -> TeacherWeights:
    name = objective.teacher.removeprefix(TIMM)
    model = _create_timm(name)
    if objective.teacher_weights:
        filesystem, path = storage.resolve(objective.teacher_weights)
        state = _fitted(model, read_tensors(filesystem, path, f"{_SETTING}-weights"))
        source = f"{objective.teacher} with {objective.teacher_weights}"
    else:
        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # no network, no weights for this name: timm has many
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"timm cannot give the weights of '{name}' ({type(error).__name__}: {reason}); "
                "download them elsewhere and name the file: --objective.teacher-weights FILE"
            ) from error
        source = objective.teacher
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [textwrap.shorten(line, 200, placeholder=" ...") for line in str(error).split("\n")]
        raise ValueError(f"{source} does not fit {name}: {' '.join(lines[1:4])}") from error
    return TeacherWeights(state, source, name)


def _create_timm(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except RuntimeError as error:
        known = timm.list_models() + timm.list_pretrained()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; see timm.list_models()"
        raise ValueError(f"{_SETTING} '{TIMM}{name}': timm has no such model{hint}") from error


def _fitted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of another layout (OpenAI's and open_clip's towers among them) as timm names them."""
    if state.keys() == model.state_dict().keys() or not isinstance(model, VisionTransformer):
        return state
    if "class_embedding" in state:  # a tower on its own, as OpenAI's class saves it
        state = {f"visual.{key}": tensor for key, tensor in state.items()}
    return checkpoint_filter_fn(state, model)


def frozen_teacher(
    config: PretrainConfig, weights: TeacherWeights | None, device: torch.device
) -> FrozenBackbone | FrozenTeacher | None:
    """A frozen teacher on the device; None where the run has none.

    Args:
        config: the run.
        weights: what `read_teacher` gave.
        device: where it runs.

    Raises:
        ValueError: the weights do not fit.
    """
    if weights is None:
        return None
    if config.objective.teacher.startswith(TIMM):
        return _frozen_timm(config, weights).to(device)
    encoder = create_itpn(weights.name, **weights.encoder_kwargs)
    load_weights(encoder.backbone, weights.state)
    return FrozenBackbone(encoder.backbone).to(device)


def _frozen_timm(config: PretrainConfig, weights: TeacherWeights) -> FrozenTeacher:
    objective = config.objective
    model = _create_timm(weights.name)
    wanted = timm.data.resolve_model_data_config(model)
    size = wanted["input_size"][-2:]
    state = weights.state
    if objective.teacher_size and (objective.teacher_size,) * 2 != tuple(size):
        size = (objective.teacher_size,) * 2
        if isinstance(model, VisionTransformer):
            model = _create_timm(weights.name, img_size=size)
            state = state | {"pos_embed": _positions(state["pos_embed"], model)}
    model.load_state_dict(state)
    return FrozenTeacher(
        model,
        image_size=tuple(size),
        mean=wanted["mean"],
        std=wanted["std"],
        student_mean=config.data.mean,
        student_std=config.data.std,
        project=objective.teacher_projection,
        released_scaling=objective.released_teacher_scaling,
    )


def _positions(table: Tensor, model: nn.Module) -> Tensor:
    """A ViT's position table (1, prefix + N, D) for another grid, as the released code resizes it
    (golden d3): bicubically by scale factor, prefix tokens as they are."""
    wanted = model.get_parameter("pos_embed").shape[1]
    prefix = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    grid = math.isqrt(wanted - prefix)
    patches = resize_pos_embed(table[:, prefix:].float(), (grid, grid), "scale_factor")
    return torch.cat([table[:, :prefix].float(), patches], dim=1)
