"""Evaluation against a slow re-implementation in numpy, and reconstructions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.pretraining import PretrainingModel
from models.teacher import EMATeacher
from pipeline.pretrain_evaluation import PretrainEvaluation, reconstruct
from tests.pipeline.samples import MEAN, STD, debug_crops, debug_networks, normalized

Array = NDArray[np.float64]


def evaluate(
    model: PretrainingModel, teacher: EMATeacher | None, num_images: int, batch_size: int
) -> dict[str, float]:
    crops, mask = debug_crops(num_images)
    evaluation = PretrainEvaluation(model, teacher, STD)
    for part in torch.arange(num_images).split(batch_size):
        evaluation.add(normalized(crops)[part], mask[part])
    return evaluation.result()


def patches_of(image: Array) -> Array:
    """Image (C, 64, 64) -> its 16 patches (N, 16, 16, C) in raster order."""
    cut = [image[:, y : y + 16, x : x + 16] for y in range(0, 64, 16) for x in range(0, 64, 16)]
    return np.stack(cut).transpose(0, 2, 3, 1)


def slow_pixel_metrics(model: PretrainingModel, crops: Tensor, mask: Tensor) -> dict[str, float]:
    """Errors at the hidden patches, image by image and patch by patch, with plain means."""
    images = normalized(crops)
    with torch.no_grad():
        predictions = model.predict(images, mask).pixels.double().numpy().reshape(-1, 16, 16, 16, 3)
    targets = []
    for b, image in enumerate(images.double().numpy()):
        patches = patches_of(image)
        if model.mim.norm_pix_loss:
            for n in range(16):
                deviation = np.sqrt(patches[n].var(ddof=1) + 1e-6)
                patches[n] = (patches[n] - patches[n].mean()) / deviation
        else:  # errors are in [0, 1] pixel units
            patches = patches * STD + MEAN
            predictions[b] = predictions[b] * STD + MEAN
        targets.append(patches)
    position_mean = np.mean(targets, axis=0)
    errors: dict[str, list[float]] = {"model": [], "position": [], "colour": []}
    for b, target in enumerate(targets):
        colour = target[~mask[b].numpy()].mean(axis=(0, 1, 2))
        for n in np.flatnonzero(mask[b].numpy()):
            errors["model"].append(float(np.mean((predictions[b, n] - target[n]) ** 2)))
            errors["position"].append(float(np.mean((position_mean[n] - target[n]) ** 2)))
            errors["colour"].append(float(np.mean((colour - target[n]) ** 2)))
    loss, position, colour = (float(np.mean(values)) for values in errors.values())
    sizes = []
    for image, one_mask in zip(images, mask, strict=True):
        visible = (~one_mask).nonzero()[:, 0]
        with torch.no_grad():
            sizes.append(model.encoder(image[None], visible[None]).stages[16].abs().mean().item())
    return {
        "val/stage16_abs_mean": float(np.mean(sizes)),
        "val/loss_mim": loss,
        "val/baseline_position_mean": position,
        "val/baseline_visible_colour": colour,
        "val/mim_loss_over_baseline": loss / min(position, colour),
    }


def slow_feature_metrics(
    model: PretrainingModel, teacher: EMATeacher, crops: Tensor, mask: Tensor
) -> dict[str, float]:
    """Errors of the features at the hidden patches, image by image."""
    metrics: dict[str, float] = {}
    losses, baselines = [], []
    for stride in (4, 8, 16):
        targets, predictions = [], []
        for b in range(len(crops)):
            image, one_mask = normalized(crops[b : b + 1]), mask[b : b + 1]
            hidden = one_mask[0].nonzero()[:, 0]
            with torch.no_grad():
                features = teacher(image, hidden[None])[stride][0].double().numpy()
                predicted = model.predict(image, one_mask).features[stride][0, hidden]
            centred = features - features.mean(axis=-1, keepdims=True)
            # 1e-5 is the epsilon of layer_norm.
            targets.append(centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5))
            predictions.append(predicted.double().numpy())
        target, prediction = np.concatenate(targets), np.concatenate(predictions)
        losses.append(float(np.mean((prediction - target) ** 2)))
        baselines.append(float(np.mean((target.mean(axis=0) - target) ** 2)))
        metrics[f"val/loss_mfm{stride}"] = losses[-1]
        metrics[f"val/baseline_mfm{stride}"] = baselines[-1]
        metrics[f"val/mfm{stride}_loss_over_baseline"] = losses[-1] / baselines[-1]
    metrics["val/mfm_loss_over_baseline"] = sum(losses) / sum(baselines)
    return metrics


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("with_mfm", [True, False])
def test_metrics_match_a_slow_numpy_version(norm_pix_loss: bool, with_mfm: bool) -> None:
    model, teacher = debug_networks(norm_pix_loss=norm_pix_loss, with_mfm=with_mfm)
    crops, mask = debug_crops(6)
    expected = slow_pixel_metrics(model, crops, mask)
    if teacher is not None:
        expected |= slow_feature_metrics(model, teacher, crops, mask)
    # rel: float32 forwards of other batch sizes and float32 targets differ by about 1e-6.
    assert evaluate(model, teacher, 6, batch_size=6) == pytest.approx(expected, rel=1e-5)


def test_several_batches_equal_one() -> None:
    model, teacher = debug_networks()
    whole = evaluate(model, teacher, 7, batch_size=7)
    # rel: sums are float64, but a float32 forward depends on the batch size in the last bits.
    assert evaluate(model, teacher, 7, batch_size=3) == pytest.approx(whole, rel=1e-6)


def replace_pixel_predictions(model: PretrainingModel, pixels: Tensor) -> None:
    """Let the model predict these pixels (B, N, P*P*C), whatever its decoder says."""
    model.mim.forward = lambda latent: pixels  # type: ignore[method-assign]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_predicting_the_position_mean_scores_one_and_the_truth_zero(norm_pix_loss: bool) -> None:
    model, _ = debug_networks(norm_pix_loss=norm_pix_loss, with_mfm=False)
    crops, _ = debug_crops(6)
    targets = model.mim.targets(normalized(crops))
    for pixels, ratio in ((targets.mean(0).expand_as(targets), 1.0), (targets, 0.0)):
        replace_pixel_predictions(model, pixels)
        metrics = evaluate(model, None, 6, batch_size=6)
        assert metrics["val/baseline_position_mean"] < metrics["val/baseline_visible_colour"]
        # abs: the float32 mean is good to 1e-7 of pixels, squares of it to less.
        assert metrics["val/mim_loss_over_baseline"] == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_keeps_visible_patches_to_the_last_bit(norm_pix_loss: bool) -> None:
    model, _ = debug_networks(norm_pix_loss=norm_pix_loss)
    crops, mask = debug_crops(3)
    images = normalized(crops)
    result = reconstruct(model, images, mask)
    is_hidden = hidden_pixels(mask)
    assert torch.equal(result[~is_hidden], images[~is_hidden])
    assert (result != images)[is_hidden].float().mean() > 0.99


def hidden_pixels(mask: Tensor) -> Tensor:
    """Mask (B, 16) -> (B, 3, 64, 64), True where a pixel is hidden."""
    grid = mask.reshape(-1, 1, 4, 4).repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    return grid.expand(-1, 3, -1, -1)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_perfect_prediction_restores_the_image(norm_pix_loss: bool) -> None:
    model, _ = debug_networks(norm_pix_loss=norm_pix_loss, with_mfm=False)
    crops, mask = debug_crops(3)
    images = normalized(crops)
    replace_pixel_predictions(model, model.mim.targets(images))
    # atol: normalising and back costs a few float32 roundings of values around 2.
    torch.testing.assert_close(reconstruct(model, images, mask), images, rtol=0, atol=2e-6)


def test_reconstruction_of_raw_pixels_borrows_nothing_from_hidden_patches() -> None:
    model, _ = debug_networks(norm_pix_loss=False)
    crops, mask = debug_crops(3)
    images = normalized(crops)
    changed = torch.where(hidden_pixels(mask), images + 1.0, images)
    assert torch.equal(reconstruct(model, changed, mask), reconstruct(model, images, mask))


def test_crops_of_one_colour_give_a_finite_ratio_although_guessing_is_perfect() -> None:
    model, teacher = debug_networks()
    _, mask = debug_crops(4)
    evaluation = PretrainEvaluation(model, teacher, STD)
    evaluation.add(torch.zeros(4, 3, 64, 64), mask)
    metrics = evaluation.result()
    assert metrics["val/baseline_position_mean"] == 0
    assert all(np.isfinite(value) for value in metrics.values())
