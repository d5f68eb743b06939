"""The encoder a config asks for, as arguments of `models.itpn.create_itpn`.

Apart from the config classes because these must not import torch: data processes read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.token_reduction import TokenGathering, TokenMigration
from models.variants import get_variant
from models.weight_shapes import infer_shape
from pipeline.config import EncoderConfig


def encoder_kwargs(model: EncoderConfig) -> dict[str, Any]:
    """Arguments in which the encoder differs from its variant.

    Raises:
        ValueError: numbers of tokens or blocks that make no sense.
    """
    kwargs: dict[str, Any] = {"drop_path_rate": model.drop_path_rate}
    kwargs |= {key: value for key in ("fpn_dim", "fpn_depth") if (value := getattr(model, key))}
    if model.migrate_after_block >= 0:
        kwargs["token_migration"] = TokenMigration(
            after_block=model.migrate_after_block, keep_ratio=model.migrate_keep_ratio
        )
    if model.gather_window:
        kwargs["token_gathering"] = TokenGathering(
            window=model.gather_window,
            num_tokens=model.gather_tokens,
            global_every=model.gather_global_every,
        )
    return kwargs


def plain_encoder_kwargs(model: EncoderConfig) -> dict[str, Any]:
    """The same for a model that is no longer trained, as JSON has it: dicts for dataclasses."""
    options = (TokenMigration, TokenGathering)
    return {
        key: dataclasses.asdict(value) if isinstance(value, options) else value
        for key, value in encoder_kwargs(model).items()
        if key != "drop_path_rate"
    }


def pretrained_encoder_kwargs(
    name: str, image_size: int, state: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `create_itpn`, as JSON has them, for weights of pre-training.

    Args:
        name: the variant.
        image_size: side in pixels of the images it will see.
        state: the weights; their shapes decide on tables and neck.
        facts: the config of their run; empty where there is none.

    Raises:
        ValueError: there is no trunk among the weights.
    """
    names = {field.name for field in dataclasses.fields(EncoderConfig)}
    settings = {key: value for key, value in facts.get("model", {}).items() if key in names}
    shape, variant = infer_shape(state), get_variant(name)
    return plain_encoder_kwargs(EncoderConfig(**settings)) | {
        "img_size": image_size,
        "rel_pos_bias": shape.rel_pos_bias,
        "decomposed_rel_pos": shape.decomposed_rel_pos,
        "fpn_dim": shape.fpn_dim or variant.fpn_dim,
        "fpn_depth": shape.fpn_depth or variant.fpn_depth,
    }
