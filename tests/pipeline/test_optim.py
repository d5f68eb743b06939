"""The optimiser's parameter groups against the official ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.pretraining import PretrainingModel, create_pretraining_model
from models.weights import OFFICIAL_PREFIXES
from pipeline.optim import build_optimizer, param_groups, set_lr
from tests.pipeline.samples import debug_networks

GOLDEN_FILE = Path(__file__).parents[1] / "golden/extras/param_groups_pixel_pretrain_base.json"


def decay_by_name(model: PretrainingModel, weight_decay: float) -> dict[str, float]:
    """Weight decay of every parameter in a group; fails for one in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [
        (names[id(p)], group["weight_decay"])
        for group in param_groups(model, weight_decay)
        for p in group["params"]
    ]
    assert len(dict(pairs)) == len(pairs), "a parameter is in two groups"
    return dict(pairs)


def official_name(name: str) -> str:
    official, canonical = next(p for p in OFFICIAL_PREFIXES if name.startswith(p[1]))
    return official + name.removeprefix(canonical)


def test_param_groups_of_the_base_model_are_the_official_ones() -> None:
    golden = json.loads(GOLDEN_FILE.read_text())
    decays = [weight_decay for _, weight_decay in golden["groups"]]
    with torch.device("meta"):
        model = create_pretraining_model("itpn_base_patch16_224", mfm_weight=0)
    ours = {official_name(name): d for name, d in decay_by_name(model, 0.05).items()}
    assert ours == {name: decays[group] for name, group in golden["param_to_group"].items()}


@pytest.mark.parametrize("with_mfm", [True, False])
def test_param_groups_cover_every_trainable_parameter_once(with_mfm: bool) -> None:
    model, _ = debug_networks(with_mfm=with_mfm)
    decays = decay_by_name(model, 0.1)
    assert set(decays) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "decoder.pos_embed" not in decays, "the sin-cos table is frozen"
    heads = {f"mfm.pred.{s}.{kind}" for s in (4, 8, 16) for kind in ("weight", "bias")}
    assert {name for name in decays if name.startswith("mfm.")} == (heads if with_mfm else set())
    for name in heads & set(decays):
        assert decays[name] == (0.1 if name.endswith("weight") else 0.0), name


def test_optimizer_gets_betas_and_lr_and_set_lr_reaches_every_group() -> None:
    model, _ = debug_networks()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.05, betas=(0.8, 0.9))
    assert [(g["lr"], g["betas"]) for g in optimizer.param_groups] == [(0.1, (0.8, 0.9))] * 2
    set_lr(optimizer, 0.2)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.2]
