"""Published weights as a folder that `--init` takes: reading, naming, resizing, writing.

Surprising: nothing is dropped silently. What the file holds beside trunk and neck is listed, a key
that no layout knows is an error, and the dimensions are those of the tensors, not of a name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from safetensors.torch import save_file
from torch import Tensor

from models.itpn import ITPN
from models.key_layouts import Layout, recognise
from models.variants import VARIANTS
from models.weight_shapes import EncoderShape, create_encoder, infer_shape
from models.weights import LoadReport, load_weights
from pipeline.checkpoint import ENCODER_FILE
from pipeline.config import PATCH_SIZE, InitConfig
from pipeline.init_weights import read_initial_weights
from pipeline.run_folder import CONFIG_FILE

_LAYOUT_NAMES: dict[Layout, str] = {
    "ours": "itpn-ray",
    "pixel": "official iTPN or Fast-iTPN",
    "clip": "official feature distillation (CLIP iTPN, pre-trained Fast-iTPN)",
    "hivit": "official HiViT, masked autoencoder",
    "mm": "mmdetection or mmsegmentation",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """What to convert, and where to."""

    file: tyro.conf.Positional[str]
    """Weights: .safetensors, .pth or .pt, local or a URI; official iTPN, HiViT, Fast-iTPN,
    mmdetection, mmsegmentation, or ours. Nothing in it is executed."""
    to: Path
    """Folder to write; must not exist yet."""
    image_size: int = 0
    """Side in pixels of the images the position tables are resized for, a multiple of 16; 0: as
    they are."""

    def __post_init__(self) -> None:
        if self.image_size < 0 or self.image_size % PATCH_SIZE:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {PATCH_SIZE}; use e.g. 224, or "
                "0 to keep the tables"
            )


@dataclass(frozen=True)
class Conversion:
    """What was found and written."""

    layout: Layout
    shape: EncoderShape
    report: LoadReport
    folder: Path

    def text(self) -> str:
        """What a person wants to know of it."""
        s = self.shape
        names = ", ".join(s.variants) or "none: give its dimensions where you use it"
        neck = f"{s.fpn_dim} channels, {s.fpn_depth} blocks a step" if s.fpn_dim else "none"
        extras = [
            name
            for name, has in (
                ("layer scale", s.layer_scale),
                ("relative position bias", s.rel_pos_bias),
                ("decomposed relative positions", s.decomposed_rel_pos),
            )
            if has
        ]
        return "\n".join(
            [
                f"layout    {_LAYOUT_NAMES[self.layout]}",
                f"trunk     {'Fast-iTPN' if s.fast else 'HiViT'}, {s.embed_dim} channels, blocks "
                f"{'-'.join(map(str, s.depths))}, {s.num_heads} heads, {s.img_size} px"
                + "".join(f", {name}" for name in extras),
                f"neck      {neck}",
                f"variants  {names}",
                *(f"  {line}" for line in str(self.report).splitlines()),
                f"written   {self.folder}; use it with --init {self.folder}",
            ]
        )


def convert_weights(config: ConversionConfig) -> Conversion:
    """Write `encoder.safetensors` in our layout and a `config.json` that says what it is.

    Raises:
        ValueError: no such trunk in the file, keys nobody knows, or the folder exists.
        FileNotFoundError: no such file.
    """
    if config.to.exists():
        raise ValueError(f"--to {config.to} exists; name a new folder")
    state = read_initial_weights(InitConfig(path=config.file), "FILE").state
    if state is None:
        raise ValueError(f"FILE '{config.file}' names no weights; give a weights file")
    shape = infer_shape(state)
    encoder = _encoder(shape, config.image_size)
    report = load_weights(encoder if shape.fpn_dim else encoder.backbone, state)
    tensors = _tensors(encoder, shape)
    facts = _facts(shape, config)
    config.to.mkdir(parents=True)
    save_file(tensors, config.to / ENCODER_FILE, {k: str(v) for k, v in facts["model"].items()})
    (config.to / CONFIG_FILE).write_text(json.dumps(facts, indent=1) + "\n")
    return Conversion(recognise(state), shape, report, config.to)


def _encoder(shape: EncoderShape, image_size: int) -> ITPN:
    if not image_size:
        return create_encoder(shape)
    return create_encoder(shape, img_size=image_size, pos_embed_size=image_size)


def _tensors(encoder: ITPN, shape: EncoderShape) -> dict[str, Tensor]:
    """Only what was in the file: a random neck must not pass for a pre-trained one."""
    return {
        name: tensor.contiguous()
        for name, tensor in encoder.state_dict().items()
        if shape.fpn_dim or not name.startswith("pyramid.")
    }


def _facts(shape: EncoderShape, config: ConversionConfig) -> dict[str, Any]:
    """What `--init` reads of a run's config."""
    name = shape.variants[0] if shape.variants else ""
    model: dict[str, Any] = {"name": name}
    for key in ("fpn_dim", "fpn_depth"):
        own = getattr(VARIANTS[name], key) if name else 0
        value = getattr(shape, key)
        model[key] = 0 if value == own else value
    return {
        "model": model,
        "data": {"image_size": config.image_size or shape.img_size},
        "converted_from": config.file.rsplit("/", 1)[-1],
    }
