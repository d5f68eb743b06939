"""Our models against the official classes: stored outputs, losses and gradients.

Tolerances: atol 1e-5 / rtol 1e-4 in float32. The smallest known mistake (tanh instead of exact
GELU) moves outputs by 5e-5, a LayerNorm eps of 1e-5 by 1.1e-4.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.detector import PyramidBackbone
from models.feature_maps import fold_cells, segmentation_levels
from models.itpn import ITPN
from models.pos_embed import resize_pos_embed
from models.segmenter import ITPNSegmenter
from models.tokens import gather_tokens, split_tokens
from models.weights import load_weights
from tests.models import golden

ATOL, RTOL = 1e-5, 1e-4
LevelsOf = Callable[[Tensor, int], list[Tensor]]
"""(image, number of levels) -> levels, finest first."""


def assert_matches(name: str, ours: Tensor, official: Tensor) -> None:
    torch.testing.assert_close(
        ours.reshape(official.shape).to(official.dtype),
        official,
        atol=ATOL,
        rtol=RTOL,
        msg=lambda message: f"{name}: {message}",
    )


def assert_gradients_match(case: golden.GoldenCase, model: torch.nn.Module) -> None:
    grads = golden.official_grads(model)
    norms = case.info.get("grad_norm", {})
    without = {name for name, grad in grads.items() if grad is None}
    assert without == set(case.info.get("params_without_grad", ())), "parameters without gradient"
    assert set(norms) == set(grads) - without, "the same parameters receive a gradient"
    for name, norm in norms.items():
        assert float(grads[name].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    for name, grad in case.group("grad/").items():
        assert_matches(f"grad of {name}", grads[name], grad)


@pytest.mark.parametrize(
    "classes",
    [
        golden.MIM_CLASSES,
        golden.DISTILLATION_CLASSES,
        golden.CLASSIFIER_CLASSES,
        golden.DETECTION_CLASSES,
        golden.SEGMENTATION_CLASSES,
    ],
)
def test_the_folder_holds_cases_of_every_task(classes: tuple[str, ...]):
    assert golden.case_names(classes)


@pytest.mark.parametrize("name", golden.case_names(golden.MIM_CLASSES))
def test_pixel_pretraining_matches_official_outputs_and_gradients(name: str):
    case = golden.load_case(name)
    inputs, expected = case.group("in/"), case.group("out/")
    model = golden.build_mim(case).eval()
    report = load_weights(model, case.group("w/"))
    assert not (report.new or report.dropped or report.resized)

    num_patches = inputs["noise"].shape[1]
    num_visible = int(num_patches * (1 - case.config["mask_ratio"]))
    ids_shuffle = inputs["noise"].argsort(dim=1)
    mask = torch.ones_like(inputs["noise"], dtype=torch.bool)
    mask.scatter_(1, ids_shuffle[:, :num_visible], False)
    ids_visible, _ = split_tokens(mask)

    before_module: dict[int, Tensor] = {}
    for module, stride in zip(model.encoder.pyramid.fpn_modules, (16, 8, 4), strict=True):
        module.register_forward_pre_hook(
            lambda _, args, stride=stride: before_module.update({stride: args[0]})
        )
    features = model.encoder(inputs["image"], ids_visible)
    latent = model.decoder(features.pyramid, ids_visible)
    pred = model.mim(latent)
    targets = model.mim.targets(inputs["image"])
    losses = model(inputs["image"], mask)

    # The official code keeps visible tokens in the order of the noise, ours in raster order.
    rank_of_visible = ids_shuffle[:, :num_visible].argsort(dim=1).argsort(dim=1)
    outputs = {
        "mask": mask,
        "ids_keep": ids_shuffle[:, :num_visible],
        "ids_restore": ids_shuffle.argsort(dim=1),
        "decoder_in": model.decoder.embed_levels(features.pyramid, ids_visible)
        + model.decoder.pos_embed,
        "pred": pred,
        "loss": losses.mim,
        "loss_per_patch": (pred - targets).square().mean(-1),
    }
    for s in (4, 8, 16):
        outputs[f"stage{s}"] = gather_tokens(features.stages[s], rank_of_visible)
        outputs[f"fpn{s}"] = gather_tokens(features.pyramid[s], rank_of_visible)
        outputs[f"fpn{s}_before_fpn_module"] = gather_tokens(before_module[s], rank_of_visible)
    assert set(expected) <= set(outputs), "every stored output is compared"
    for key, value in expected.items():
        assert_matches(key, outputs[key], value)

    assert torch.equal(losses.total, losses.mim)
    losses.total.backward()
    assert_gradients_match(case, model)


@pytest.mark.parametrize("name", golden.case_names(golden.DISTILLATION_CLASSES))
def test_feature_distillation_matches_official_outputs_and_gradients(name: str):
    case = golden.load_case(name)
    inputs, expected = case.group("in/"), case.group("out/")
    model = golden.build_distillation(case).eval()
    report = load_weights(model, case.group("w/"))
    assert not (report.new or report.dropped or report.resized)

    seen: dict[str, Tensor] = {}
    encoder, clip = model.encoder, model.clip
    encoder.pyramid.register_forward_hook(
        lambda _, args, out: seen.update(
            {f"stage{s}": f for s, f in args[0].items()} | {f"fpn{s}": f for s, f in out.items()}
        )
    )
    clip.cls_pt_layers[-1].register_forward_hook(
        lambda _, args, out: seen.update({"aux_features": out})
    )
    masked = inputs["bool_masked_pos"]
    losses = model(inputs["image"], masked, inputs["labels"])
    main, auxiliary = model.predict(inputs["image"], masked)
    outputs = {
        **seen,
        "pred_main": main,
        "pred_aux": auxiliary,
        "loss": losses.total,
        "loss_main": losses.main,
        "loss_aux": losses.auxiliary,
    }
    assert set(expected) <= set(outputs), "every stored output is compared"
    for key, value in expected.items():
        assert_matches(key, outputs[key], value)
    losses.total.backward()
    assert_gradients_match(case, model)


@pytest.mark.parametrize("name", golden.case_names(golden.CLASSIFIER_CLASSES))
def test_classifier_matches_official_outputs_and_gradients(name: str):
    case = golden.load_case(name)
    inputs, expected = case.group("in/"), case.group("out/")
    model = golden.build_classifier(case).eval()
    report = load_weights(model, case.group("w/"))
    assert not (report.new or report.dropped or report.resized)

    outputs: dict[str, Tensor] = {}
    for key, image in inputs.items():
        if not key.startswith("image"):
            continue
        suffix = key.removeprefix("image")  # "", or "_96x64" where a case has several sizes
        grid = tuple(side // case.config["patch_size"] for side in image.shape[-2:])
        outputs[f"logits{suffix}"] = model(image)
        outputs[f"pos_embed{suffix}"] = resize_pos_embed(
            model.backbone.pos_embed, grid, "scale_factor"
        )
        stages = model.backbone(image)
        if case.config["cls"] == "Fast_iTPN":  # stored as images
            stages |= {s: fold_cells(stages[s], grid) for s in (4, 8)}
            outputs[f"pooled{suffix}"] = model.forward_head(model.forward_features(image), True)
        outputs |= {f"stage{s}{suffix}": f for s, f in stages.items()}
    if "label" in inputs:
        outputs["ce_loss"] = F.cross_entropy(outputs["logits"], inputs["label"])
    assert set(expected) <= set(outputs), "every stored output is compared"
    for key, value in expected.items():
        assert_matches(key, outputs[key], value)

    if case.info.get("grad_norm"):
        outputs["ce_loss"].backward()
        assert_gradients_match(case, model)


def assert_levels_match(case: golden.GoldenCase, levels_of: LevelsOf) -> None:
    """Run every stored image and compare every stored level; `l0` is the finest."""
    expected = case.group("out/")
    outputs: dict[str, Tensor] = {}
    for key, image in case.group("in/").items():
        size = key.removeprefix("image").removeprefix("_")  # "", or "64x96"
        prefix = f"{size}_l" if size else "l"
        num_levels = sum(name.startswith(prefix) for name in expected)
        assert num_levels >= case.config["num_outs"]
        levels = levels_of(image, num_levels)
        outputs |= {f"{prefix}{i}": level for i, level in enumerate(levels)}
    assert set(expected) == set(outputs), "every stored output is compared"
    for key, value in expected.items():
        assert outputs[key].shape == value.shape, key
        assert_matches(key, outputs[key], value)


def load_encoder(case: golden.GoldenCase) -> ITPN:
    encoder = golden.build_encoder(case).eval()
    report = load_weights(encoder, case.group("w/"))
    assert not (report.new or report.dropped or report.resized)
    return encoder


@pytest.mark.parametrize("name", golden.case_names(golden.DETECTION_CLASSES))
def test_detection_levels_match_official_outputs(name: str):
    case = golden.load_case(name)
    encoder = load_encoder(case)

    def levels_of(image: Tensor, num_levels: int) -> list[Tensor]:
        return list(PyramidBackbone(encoder, num_levels=num_levels)(image).values())

    assert_levels_match(case, levels_of)


@pytest.mark.parametrize("name", golden.case_names(golden.SEGMENTATION_CLASSES))
def test_segmentation_levels_match_official_outputs(name: str):
    case = golden.load_case(name)
    encoder = load_encoder(case)

    def levels_of(image: Tensor, num_levels: int) -> list[Tensor]:
        grid = tuple(side // case.config["patch_size"] for side in image.shape[-2:])
        return list(segmentation_levels(encoder(image), grid, num_levels=num_levels).values())

    assert_levels_match(case, levels_of)
    # and what the segmenter feeds its heads are the first four of them
    segmenter = ITPNSegmenter(encoder, 3, channels=8).eval()
    for i, level in enumerate(segmenter.levels(case.tensors["in/image"])):
        assert_matches(f"l{i}", level, case.tensors[f"out/l{i}"])
