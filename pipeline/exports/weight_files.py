"""Weights for those who have our code (`.safetensors`) or timm (a folder as timm's hub has it).

Surprising: the header of a safetensors file knows strings only, so lists in it are JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.classifier import ITPNClassifier
from pipeline.exports.exportable import Exportable, ExportFailedError

Part = Literal["backbone", "encoder", "full"]
"""The trunk; trunk and neck; a whole fine-tuned model."""
TIMM_FOLDER = "timm"
_CREATE = {
    "encoder": "create_itpn",
    "classifier": "create_classifier",
    "segmenter": "create_segmenter",
    "detector": "create_detector",
}


def part_of(exportable: Exportable, part: str) -> Part:
    """The part to export: the one that is asked for or, where that is empty, the largest.

    Raises:
        ValueError: the model has no such part.
    """
    is_encoder = exportable.kind == "encoder"
    if not part:
        return "encoder" if is_encoder else "full"
    if part not in get_args(Part):
        raise ValueError(f"--part '{part}' is unknown; use one of {', '.join(get_args(Part))}")
    if part == "full" and is_encoder:
        raise ValueError(
            "--part full is for fine-tuned models: what pre-training has beside the encoder serves "
            "only to go on training and stays in its checkpoints; use --part encoder"
        )
    if part == "encoder" and exportable.encoder is None:
        raise ValueError(
            "--part encoder wants a neck, which a classifier does not have; use --part backbone or "
            "full"
        )
    return part  # type: ignore[return-value]


def write_safetensors(
    exportable: Exportable, part: Part, path: Path, *, licence: str
) -> dict[str, str]:
    """Write one part with its metadata in the header; returns the metadata."""
    module: nn.Module | None = {
        "backbone": exportable.backbone,
        "encoder": exportable.encoder,
        "full": exportable.model,
    }[part]
    assert module is not None, "part_of allows no part that is not there"
    # A bare trunk has the names it has in an encoder, so that every reader knows it for one.
    prefix = "backbone." if part == "backbone" else ""
    state = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    metadata = _metadata(exportable, part, licence)
    _save(state, path, metadata)
    return metadata


def _metadata(exportable: Exportable, part: Part, licence: str) -> dict[str, str]:
    is_whole = part == "full" or exportable.kind == "encoder"
    return {
        "format": "pt",  # what safetensors' own readers look for
        "part": part,
        "model_name": exportable.model_name,
        "create": _CREATE[exportable.kind] if is_whole else "create_itpn",
        "model_args": json.dumps(
            dict(exportable.model_args if is_whole else exportable.encoder_args)
        ),
        "image_size": str(exportable.image_size),
        "mean": json.dumps(exportable.mean),
        "std": json.dumps(exportable.std),
        "classes": json.dumps(exportable.classes),
        "licence": licence,
        "source": exportable.source,
    }


def check_is_for_timm(exportable: Exportable) -> None:
    """Refuse a model that is no image classifier.

    Raises:
        ValueError: it is a segmenter or a detector.
    """
    if exportable.kind not in ("encoder", "classifier"):
        raise ValueError(
            f"--format timm holds image classifiers, not a {exportable.kind}; use --format "
            "safetensors, or export the pre-training run it started from"
        )


def write_timm(exportable: Exportable, folder: Path, *, licence: str) -> None:
    """Write `model.safetensors` and `config.json` as timm's `save_for_hf` lays them out.

    An encoder becomes a classifier without classes: the pooled features, through a norm that is
    still at its initial values.
    """
    model = exportable.model
    if not isinstance(model, ITPNClassifier):
        model = ITPNClassifier(exportable.backbone, 0).eval()
    folder.mkdir()
    _save(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config = timm_config(exportable, model, licence=licence)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def timm_config(exportable: Exportable, model: ITPNClassifier, *, licence: str) -> dict[str, Any]:
    """What timm's `load_model_config_from_path` reads."""
    side = exportable.image_size
    config: dict[str, Any] = {
        "architecture": exportable.model_name,
        "num_classes": model.num_classes,
        "num_features": exportable.backbone.embed_dim,
        "global_pool": model.global_pool,
        "model_args": timm_model_args(exportable),
        "pretrained_cfg": {
            "tag": exportable.source,
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop_ratio(side),
            "crop_mode": "center",
            "mean": list(exportable.mean),
            "std": list(exportable.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": "backbone.patch_embed.proj",
            "classifier": "head",
            "license": licence,
        },
    }
    if exportable.classes:
        config["label_names"] = list(exportable.classes)
    return config


def timm_model_args(exportable: Exportable) -> dict[str, Any]:
    """Arguments of `timm.create_model` beside the name and the number of classes."""
    backbone = exportable.backbone
    return {
        "img_size": exportable.image_size,
        "rel_pos_bias": backbone.rel_pos_bias,
        "decomposed_rel_pos": backbone.decomposed_rel_pos,
    }


def crop_ratio(image_size: int) -> float:
    """Side of the middle crop over the short side of the resized image, as in evaluation."""
    return 0.875 if image_size <= 224 else 1.0


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file, and read it back.

    Raises:
        ExportFailedError: a weight is not the one that was written.
    """
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    found = load_file(path)
    wrong = [name for name, tensor in state.items() if not torch.equal(tensor, found[name])]
    if wrong:
        raise ExportFailedError(
            f"{path} reads back other than it was written, such as {wrong[0]} (or the model holds "
            "NaN); look at the model and the disk"
        )
