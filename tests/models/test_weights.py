"""Loading weights: official and own layouts, reports, resized tables, refusals and unsafe files."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.classifier import ITPNClassifier
from models.itpn import ITPN, create_itpn
from models.pos_embed import sincos_pos_embed_2d
from models.pretraining import create_pretraining_model
from models.weights import LoadReport, load_weights, to_official
from tests.models import tiny
from tests.models.golden import GOLDEN_DIR

BIAS_TABLE = "relative_position_bias_table"
Change = Callable[[dict[str, Tensor]], object]


def fresh_encoder(**kwargs: object) -> ITPN:
    return create_itpn("itpn_debug", **kwargs)


def fresh_classifier(**kwargs: object) -> ITPNClassifier:
    return ITPNClassifier(fresh_encoder(**kwargs).backbone, 10)


@pytest.fixture
def official() -> dict[str, Tensor]:
    """An official pre-training state dict in miniature, with random weights."""
    return to_official(tiny.pretraining_model(mfm_weight=0))


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def part_of(official: dict[str, Tensor], *excluded: str) -> dict[str, Tensor]:
    """The official tensors outside the given prefixes."""
    return {k: t for k, t in official.items() if not k.startswith(excluded)}


DECODER_PREFIXES = ("mask_token", "decoder_")
NECK_PREFIXES = ("align_dim_", "split_", "block_", "fpn_modules")


# ---- official layout into each of our models ----


def test_official_pretraining_loads_into_pretraining_with_only_mfm_heads_new(
    official: dict[str, Tensor],
):
    model = create_pretraining_model("itpn_debug", mfm_weight=0.3)
    report = load_weights(model, official)
    assert len(report.matched) == len(official)
    assert not (report.resized or report.dropped)
    assert {name.split(".")[0] for name in report.new} == {"mfm"}
    assert_same(to_official(model), official)


def test_official_pretraining_loads_into_the_encoder_without_its_decoder(
    official: dict[str, Tensor],
):
    model = fresh_encoder()
    report = load_weights(model, official)
    assert not (report.new or report.resized)
    assert {key.split(".")[0] for key in report.dropped} == {"decoder", "mim"}
    assert_same(to_official(model), part_of(official, *DECODER_PREFIXES))


def test_official_pretraining_loads_into_the_backbone_without_neck_and_decoder(
    official: dict[str, Tensor],
):
    model = fresh_encoder().backbone
    report = load_weights(model, official)
    assert not (report.new or report.resized)
    assert len(report.matched) + len(report.dropped) == len(official)
    assert_same(to_official(model), part_of(official, *DECODER_PREFIXES, *NECK_PREFIXES))


def test_official_pretraining_loads_into_a_classifier_with_head_and_bias_tables_new(
    official: dict[str, Tensor],
):
    model = fresh_classifier(rel_pos_bias=True)
    report = load_weights(model, official)
    assert [name for name in report.new if BIAS_TABLE not in name] == [
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    ]
    assert len(report.new) == 4 + 1, "one attention block has one table"
    loaded = to_official(model)
    assert_same(
        {key: loaded[key] for key in part_of(official, *DECODER_PREFIXES, *NECK_PREFIXES)},
        part_of(official, *DECODER_PREFIXES, *NECK_PREFIXES),
    )


def official_state(variant: str) -> dict[str, Tensor]:
    """A full-size official state dict on the meta device."""
    keys = json.loads((GOLDEN_DIR / "full" / f"{variant}.json").read_text())["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape, *_ in keys}


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("task", ["finetune", "seg"])
def test_full_size_transfer_counts_are_the_official_ones(size: str, task: str):
    source = f"pixel_pretrain_{size}"
    target = {"finetune": f"pixel_finetune_{size}", "seg": f"seg_pixel_{size}"}[task]
    transfers = json.loads((GOLDEN_DIR / "extras" / "transfer_report.json").read_text())
    expected = transfers[f"{source} -> {target}"]
    with torch.device("meta"):
        model: nn.Module = create_itpn(f"itpn_{size}_patch16_224", rel_pos_bias=True)
        if task == "finetune":
            model = ITPNClassifier(model.backbone, 1000)
    report = load_weights(model, official_state(source))
    assert len(report.matched) == expected["loaded"]
    assert report.resized == []
    # the index is recomputed from the grid, never stored
    missing = {
        k: n for k, n in expected["missing_in_ckpt"].items() if k != "relative_position_index"
    }
    assert len(report.new) == sum(missing.values())
    assert len(report.dropped) == sum(expected["unused_from_ckpt"].values())


# ---- round trips ----


def round_trip_models() -> dict[str, Callable[[], nn.Module]]:
    return {
        "pretraining": lambda: create_pretraining_model("itpn_debug", mfm_weight=0),
        "encoder": fresh_encoder,
        "encoder with bias": lambda: fresh_encoder(rel_pos_bias=True),
        "backbone": lambda: fresh_encoder(rel_pos_bias=True).backbone,
        "classifier": lambda: fresh_classifier(rel_pos_bias=True),
    }


@pytest.mark.parametrize("kind", round_trip_models())
def test_official_layout_round_trip_is_exact(kind: str):
    build = round_trip_models()[kind]
    source, target = tiny.randomize(build()), build()
    report = load_weights(target, to_official(source))
    assert not (report.new or report.dropped or report.resized)
    assert_same(target.state_dict(), source.state_dict())


def test_own_encoder_file_round_trips_into_every_model(tmp_path: Path):
    source = tiny.randomize(fresh_encoder(rel_pos_bias=True))
    path = tmp_path / "encoder.safetensors"
    save_file(source.state_dict(), path)

    encoder = fresh_encoder(rel_pos_bias=True)
    report = load_weights(encoder, path)
    assert not (report.new or report.dropped or report.resized)
    assert_same(encoder.state_dict(), source.state_dict())

    backbone = fresh_encoder(rel_pos_bias=True).backbone
    report = load_weights(backbone, path)
    assert {".".join(key.split(".")[:2]) for key in report.dropped} == {"encoder.pyramid"}
    assert_same(backbone.state_dict(), source.backbone.state_dict())

    classifier = fresh_classifier(rel_pos_bias=True)
    load_weights(classifier, path)
    assert_same(classifier.backbone.state_dict(), source.backbone.state_dict())


def test_own_pretraining_state_restores_a_pretraining_model_with_its_mfm_heads():
    source = tiny.pretraining_model(mfm_weight=0.3)
    target = create_pretraining_model("itpn_debug", mfm_weight=0.3)
    report = load_weights(target, source.state_dict())
    assert not (report.new or report.dropped or report.resized)
    assert_same(target.state_dict(), source.state_dict())


def test_an_encoder_starts_a_pretraining_model_and_the_rest_is_new():
    source = tiny.randomize(fresh_encoder())
    target = create_pretraining_model("itpn_debug", mfm_weight=0.3)
    report = load_weights(target, source.state_dict())
    assert {name.split(".")[0] for name in report.new} == {"decoder", "mim", "mfm"}
    assert_same(target.encoder.state_dict(), source.state_dict())


def test_loading_copies_the_tensors(official: dict[str, Tensor]):
    model = fresh_encoder()
    load_weights(model, official)
    official["absolute_pos_embed"].zero_()
    assert bool(model.backbone.pos_embed.any())


# ---- resized tables ----


@pytest.mark.parametrize("img_size", [32, 96])
def test_tables_of_another_image_size_are_resized_and_reported(img_size: int):
    source = tiny.randomize(fresh_encoder(rel_pos_bias=True))
    target = fresh_encoder(rel_pos_bias=True, img_size=img_size)
    report = load_weights(target, source.state_dict())
    table_name = f"backbone.blocks.4.attn.{BIAS_TABLE}"
    assert report.resized == ["backbone.pos_embed", table_name]
    assert len(report.matched) == len(source.state_dict()) - 2

    side = img_size // 16
    grid = source.backbone.pos_embed.reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(side, side), mode="bicubic").flatten(2).transpose(1, 2)
    # the same interpolation called on another memory layout
    torch.testing.assert_close(target.backbone.pos_embed, expected, atol=1e-6, rtol=0)
    table = source.get_parameter(table_name).T.reshape(1, 2, 7, 7)
    offsets = (2 * side - 1, 2 * side - 1)
    expected = F.interpolate(table, size=offsets, mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(target.get_parameter(table_name), expected, atol=1e-6, rtol=0)


def test_the_decoders_fixed_positions_are_those_of_the_target_grid(official: dict[str, Tensor]):
    model = create_pretraining_model("itpn_debug", mfm_weight=0, img_size=96)
    report = load_weights(model, official)
    assert report.resized == ["encoder.backbone.pos_embed", "decoder.pos_embed"]
    assert torch.equal(model.decoder.pos_embed[0], sincos_pos_embed_2d(32, (6, 6)))


def test_bias_tables_are_dropped_by_a_model_without_relative_bias():
    source = tiny.randomize(fresh_encoder(rel_pos_bias=True))
    report = load_weights(fresh_encoder(), source.state_dict())
    assert report.dropped == [f"encoder.backbone.blocks.4.attn.{BIAS_TABLE}"]


# ---- refusals ----

BIAS = "patch_embed.proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"teacher.x": torch.zeros(1)}), "unexpected key teacher.x$"),
        (
            lambda s: s.update({"blocks.0.gamma_1": torch.zeros(1)}),
            "unexpected key encoder.backbone.blocks.0.gamma_1$",
        ),
        (lambda s: s.pop(BIAS), f"missing key backbone.{BIAS}$"),
        (lambda s: s.pop("split_8to4.norm.bias"), "missing key pyramid.split_8to4.norm.bias$"),
        (
            lambda s: s.update({BIAS: torch.zeros(5)}),
            rf"backbone.{BIAS}: shape \(5,\) does not fit \(8,\)$",
        ),
        (
            lambda s: s.update({"absolute_pos_embed": torch.zeros(1, 16, 48)}),
            r"backbone.pos_embed: shape \(1, 16, 48\) does not fit \(1, 16, 32\)$",
        ),
        # a class token makes 17 positions, of which no square grid can be interpolated
        (
            lambda s: s.update({"absolute_pos_embed": torch.zeros(1, 17, 32)}),
            r"backbone.pos_embed: shape \(1, 17, 32\) does not fit \(1, 16, 32\)$",
        ),
        # BEiT keeps three more rows for its class token
        (
            lambda s: s.update({f"blocks.4.attn.{BIAS_TABLE}": torch.zeros(52, 2)}),
            rf"backbone.blocks.4.attn.{BIAS_TABLE}: shape \(52, 2\) does not fit \(49, 2\)$",
        ),
    ],
    ids=[
        "unknown key",
        "unexpected key",
        "missing backbone key",
        "missing neck key",
        "bias shape",
        "position width",
        "class token",
        "bias table rows",
    ],
)
def test_what_does_not_fit_is_named_and_the_model_left_unchanged(
    official: dict[str, Tensor], change: Change, message: str
):
    model = fresh_encoder(rel_pos_bias=True)
    before = copy_of_state(model)
    change(official)
    with pytest.raises(ValueError, match=f"^1 keys do not fit ITPN.*\n  {message}"):
        load_weights(model, official)
    assert_same(model.state_dict(), before)


def test_a_model_of_other_dimensions_is_refused_with_the_way_out(official: dict[str, Tensor]):
    model = create_itpn("itpn_nano_patch16_224")
    with pytest.raises(ValueError, match=r"build the model with the dimensions of the checkpoint"):
        load_weights(model, official)


@pytest.mark.parametrize("wrapper", ["optimizer", "model_ema"])
def test_a_file_in_which_no_weight_is_found_is_refused(
    official: dict[str, Tensor], tmp_path: Path, wrapper: str
):
    torch.save({wrapper: official, "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"ITPN|x\.pth"):
        load_weights(fresh_encoder(), tmp_path / "x.pth")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module"])
def test_weights_are_found_in_the_usual_wrappers(
    official: dict[str, Tensor], tmp_path: Path, wrapper: str
):
    torch.save({wrapper: official, "epoch": 3}, tmp_path / "x.pth")
    model = fresh_encoder()
    load_weights(model, tmp_path / "x.pth")
    assert_same(to_official(model), part_of(official, *DECODER_PREFIXES))


def test_a_model_that_is_no_state_dict_is_refused(tmp_path: Path):
    torch.save({"model": 5}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds a int as 'model', not a state dict"):
        load_weights(fresh_encoder(), tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"fpn_dim": 24}, r"its neck has fpn_dim 24, not 16 \(--model\.fpn-dim 24\)"),
        ({"fpn_depth": 2}, r"its neck has fpn_depth 2, not 1 \(--model\.fpn-depth 2\)"),
    ],
)
def test_a_neck_of_other_dimensions_is_refused_with_the_setting(changes: dict[str, int], hint: str):
    with pytest.raises(ValueError, match=hint):
        load_weights(fresh_encoder(), fresh_encoder(**changes).state_dict())


def test_half_a_neck_is_refused_with_the_way_out(official: dict[str, Tensor]):
    """Published Fast-iTPN files have some layers of one."""
    half = {k: t for k, t in official.items() if not k.startswith(("split_", "block_"))}
    with pytest.raises(ValueError, match=r"its neck is not whole; leave it out \(--no-init\.neck"):
        load_weights(fresh_encoder(), half)


def test_a_model_of_another_kind_is_refused(official: dict[str, Tensor]):
    with pytest.raises(ValueError, match="cannot load weights into Linear; use a PretrainingModel"):
        load_weights(nn.Linear(2, 2), official)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere\.pth"):
        load_weights(fresh_encoder(), tmp_path / "nowhere.pth")


# ---- files ----


def test_an_official_pth_with_its_namespace_loads(official: dict[str, Tensor], tmp_path: Path):
    path = tmp_path / "official.pth"
    content = {"model": official, "epoch": 1599, "args": argparse.Namespace(lr=1e-3, name="base")}
    torch.save(content, path)
    model = create_pretraining_model("itpn_debug", mfm_weight=0)
    load_weights(model, path)
    assert_same(to_official(model), official)


def test_a_bare_pth_loads(official: dict[str, Tensor], tmp_path: Path):
    torch.save(official, tmp_path / "bare.pth")
    model = create_pretraining_model("itpn_debug", mfm_weight=0)
    load_weights(model, str(tmp_path / "bare.pth"))
    assert_same(to_official(model), official)


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pth_that_would_run_code_is_refused_and_runs_nothing(
    official: dict[str, Tensor], tmp_path: Path
):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"model": official, "args": Malicious(trace)}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_weights(fresh_encoder(), path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file is truly malicious: a careless reader runs its code"


def test_namespace_is_allowed_only_while_a_file_is_read(
    official: dict[str, Tensor], tmp_path: Path
):
    torch.save({"model": official}, tmp_path / "x.pth")
    load_weights(fresh_encoder(), tmp_path / "x.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_the_printed_report_counts_what_became_of_the_keys():
    report = LoadReport(
        matched=["backbone.blocks.0.a", "backbone.blocks.1.a"], dropped=["decoder.norm.bias"]
    )
    lines = [line.split() for line in str(report).splitlines()]
    assert lines == [
        ["matched", "2", "backbone.blocks", "(2)"],
        ["resized", "0"],
        ["new", "0"],
        ["dropped", "by", "design", "1", "decoder.norm", "(1)"],
    ]
