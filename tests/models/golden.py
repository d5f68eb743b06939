"""Golden cases: a json with the official constructor arguments beside a tensor file.

`ITPN_GOLDEN_DIR` (default `tests/golden`) is searched for `*.json` + `*.safetensors` pairs; nothing
about a case is written here except how the official class names map to our constructors.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from models.classifier import ITPNClassifier
from models.decoder import Decoder
from models.hivit import HiViT
from models.itpn import ITPN
from models.mim import MaskedImageModeling
from models.pretraining import PretrainingModel
from models.pyramid import FeaturePyramid

GOLDEN_DIR = Path(os.environ.get("ITPN_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
MIM_CLASS = "iTPNMaskedAutoencoder"
CLASSIFIER_CLASS = "iTPN (itpn_pixel)"


@dataclass
class GoldenCase:
    """One json + safetensors pair."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under `w/`, `in/`, `out/` or `grad/`, without the prefix."""
        return {k[len(prefix) :]: t for k, t in self.tensors.items() if k.startswith(prefix)}


def case_names(cls: str) -> list[str]:
    """Names of all cases in the folder that were made with an official class."""
    names = []
    for path in sorted(GOLDEN_DIR.glob("*.json")):
        config = json.loads(path.read_text()).get("config", {})
        if config.get("cls") == cls and path.with_suffix(".safetensors").is_file():
            names.append(path.stem)
    return names


def load_case(name: str) -> GoldenCase:
    info = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    return GoldenCase(name, info, load_file(GOLDEN_DIR / f"{name}.safetensors"))


def build_backbone(config: dict[str, Any]) -> HiViT:
    eps = re.search(r"eps=([0-9.e-]+)", config["norm_layer"])
    assert eps, f"no LayerNorm eps in {config['norm_layer']!r}"
    mlp_depths = [config.get(f"mlp_depth{i}", config.get("mlp_depth")) for i in (1, 2)]
    return HiViT(
        config["embed_dim"],
        depths=(*mlp_depths, config["depth"]),
        num_heads=config["num_heads"],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        in_chans=config["in_chans"],
        bridge_mlp_ratio=config["bridge_mlp_ratio"],
        mlp_ratio=config["mlp_ratio"],
        rel_pos_bias=config["rpe"],
        norm_eps=float(eps.group(1)),
    )


def build_mim(config: dict[str, Any]) -> PretrainingModel:
    assert config["num_outs"] == 3, "the pixel objective is defined on three pyramid levels"
    backbone = build_backbone(config)
    eps = backbone.patch_embed.norm.eps
    pyramid = FeaturePyramid(
        backbone.stage_dims,
        fpn_dim=config["fpn_dim"],
        fpn_depth=config["fpn_depth"],
        mlp_ratio=config["mlp_ratio"],
        norm_eps=eps,
    )
    decoder = Decoder(
        config["fpn_dim"],
        grid=backbone.grid,
        dim=config["decoder_embed_dim"],
        depth=config["decoder_depth"],
        num_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"],
        norm_eps=eps,
    )
    mim = MaskedImageModeling(
        decoder.dim,
        patch_size=config["patch_size"],
        in_chans=config["in_chans"],
        norm_pix_loss=config["norm_pix_loss"],
    )
    return PretrainingModel(ITPN(backbone, pyramid), decoder, mim)


def build_classifier(config: dict[str, Any]) -> ITPNClassifier:
    assert config["num_outs"] == 1, "classification golden files have one output"
    backbone = build_backbone(config)
    eps = backbone.patch_embed.norm.eps
    return ITPNClassifier(backbone, config["num_classes"], norm_eps=eps)


def official_grads(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients under the official parameter names (None where a parameter got none)."""
    from models.weights import OFFICIAL_PREFIXES, _canonical_name

    grads: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        key = _canonical_name(model, name)
        official, canonical = next(p for p in OFFICIAL_PREFIXES if key.startswith(p[1]))
        grads[official + key.removeprefix(canonical)] = parameter.grad
    return grads
