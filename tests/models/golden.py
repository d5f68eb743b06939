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
from models.fast_itpn import FAST_LAYERS
from models.feature_distillation import DistillationHeads, FeatureDistillationModel
from models.hivit import HiViT, TrunkLayers
from models.itpn import ITPN
from models.key_layouts import Layout, official_key
from models.mim import MaskedImageModeling
from models.pretraining import PretrainingModel
from models.pyramid import FeaturePyramid
from models.weights import canonical_name

GOLDEN_DIR = Path(os.environ.get("ITPN_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
MIM_CLASSES = ("iTPNMaskedAutoencoder",)
CLASSIFIER_CLASSES = ("iTPN (itpn_pixel)", "iTPN (itpn_clip)", "Fast_iTPN")
DISTILLATION_CLASSES = ("iTPNClipDistill",)
DETECTION_CLASSES = ("iTPN_pixel (det)", "iTPN_CLIP (det)")
SEGMENTATION_CLASSES = ("iTPN (seg)",)


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


def case_names(classes: tuple[str, ...]) -> list[str]:
    """Names of all cases in the folder that were made with one of the official classes."""
    names = []
    for path in sorted(GOLDEN_DIR.glob("*.json")):
        config = json.loads(path.read_text()).get("config", {})
        if config.get("cls") in classes and path.with_suffix(".safetensors").is_file():
            names.append(path.stem)
    return names


def load_case(name: str) -> GoldenCase:
    info = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    return GoldenCase(name, info, load_file(GOLDEN_DIR / f"{name}.safetensors"))


def norm_eps(config: dict[str, Any]) -> float:
    eps = re.search(r"eps=([0-9.e-]+)", config["norm_layer"])
    assert eps, f"no LayerNorm eps in {config['norm_layer']!r}"
    return float(eps.group(1))


def build_backbone(case: GoldenCase) -> HiViT:
    config = case.config
    is_fast = config["cls"] == "Fast_iTPN"
    mlp_depth = config.get("mlp_depth")
    mlp_depths = [
        config.get(f"mlp_depth{i}", config.get(f"depth_stage{i}", mlp_depth)) for i in (1, 2)
    ]
    # Some official classes keep a table of 196 positions whatever the image size.
    tables = [case.tensors.get(f"w/{key}") for key in ("absolute_pos_embed", "pos_embed")]
    num_positions = next(table.shape[1] for table in tables if table is not None)
    is_decomposed = any(key.endswith("rel_pos_h") for key in case.tensors)
    return HiViT(
        config["embed_dim"],
        depths=(*mlp_depths, config["depth"]),
        num_heads=config["num_heads"],
        img_size=config["img_size"],
        pos_embed_size=round(num_positions**0.5) * config["patch_size"],
        patch_size=config["patch_size"],
        in_chans=config.get("in_chans", 3),
        bridge_mlp_ratio=config["bridge_mlp_ratio"],
        mlp_ratio=config["mlp_ratio"],
        rel_pos_bias=config.get("rpe", False) and not is_decomposed,
        decomposed_rel_pos=is_decomposed,
        init_values=config.get("init_values") or None,
        norm_eps=norm_eps(config),
        layers=FAST_LAYERS if is_fast else TrunkLayers(),
    )


def build_encoder(case: GoldenCase) -> ITPN:
    config, backbone = case.config, build_backbone(case)
    pyramid = FeaturePyramid(
        backbone.stage_dims,
        fpn_dim=config["fpn_dim"],
        fpn_depth=config["fpn_depth"],
        mlp_ratio=config["mlp_ratio"],
        norm_eps=norm_eps(config),
    )
    return ITPN(backbone, pyramid)


def build_mim(case: GoldenCase) -> PretrainingModel:
    config = case.config
    assert config["num_outs"] == 3, "the pixel objective is defined on three pyramid levels"
    encoder = build_encoder(case)
    decoder = Decoder(
        config["fpn_dim"],
        grid=encoder.backbone.grid,
        dim=config["decoder_embed_dim"],
        depth=config["decoder_depth"],
        num_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"],
        norm_eps=norm_eps(config),
    )
    mim = MaskedImageModeling(
        decoder.dim,
        patch_size=config["patch_size"],
        in_chans=config["in_chans"],
        norm_pix_loss=config["norm_pix_loss"],
    )
    return PretrainingModel(encoder, decoder, mim)


def build_distillation(case: GoldenCase) -> FeatureDistillationModel:
    config = case.config
    assert config["num_outs"] == 3, "the distillation objective is defined on three pyramid levels"
    encoder = build_encoder(case)
    heads = DistillationHeads(
        config["fpn_dim"],
        dim=config["embed_dim"],
        num_heads=config["num_heads"],
        grid=encoder.backbone.grid,
        teacher_dim=config["teacher_dim"],
        init_values=config["init_values"],
        mlp_ratio=config["mlp_ratio"],
        norm_eps=norm_eps(config),
    )
    return FeatureDistillationModel(encoder, heads)


def build_classifier(case: GoldenCase) -> ITPNClassifier:
    config = case.config
    assert config.get("num_outs", 1) == 1, "classification golden files have one output"
    return ITPNClassifier(
        build_backbone(case),
        config["num_classes"],
        use_fc_norm=config.get("use_mean_pooling", True),
        norm_eps=norm_eps(config),
    )


def official_grads(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients under the official parameter names (None where a parameter got none)."""
    layout: Layout = "clip" if isinstance(model, FeatureDistillationModel) else "pixel"
    is_fast = any(isinstance(module, HiViT) and module.is_fast for module in model.modules())
    grads: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        key = official_key(canonical_name(model, name), layout, is_fast=is_fast)
        assert key is not None, f"{name} has no official name"
        grads[key] = parameter.grad
    return grads
