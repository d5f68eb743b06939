"""The objectives and the decoder: gradients, what each loss depends on, slow re-implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from models.mfm import MaskedFeatureModeling, MFMLoss, normalize_features
from models.mim import MaskedImageModeling
from models.pos_embed import sincos_pos_embed_2d
from models.pretraining import PretrainingModel, PretrainLosses, create_pretraining_model
from models.teacher import EMATeacher
from models.tokens import patchify, split_tokens
from models.weights import load_weights
from tests.models import tiny

# float32 sums in another order, on values of order one
ATOL = 1e-5
DECODER_DIM = 32
STAGE_DIMS = {4: 4, 8: 8, 16: 16}
NUM_MASKED = tiny.NUM_PATCHES - tiny.NUM_VISIBLE


def random_features(stage_dims: dict[int, int], seed: int = 0) -> dict[int, Tensor]:
    """Teacher features at the masked positions, {stride: (B, M, c, c, d)}."""
    generator = torch.Generator().manual_seed(seed)
    cells = {4: 4, 8: 2, 16: 1}
    return {
        s: 3 * torch.randn(2, NUM_MASKED, cells[s], cells[s], dim, generator=generator) + 1
        for s, dim in stage_dims.items()
    }


def losses_of(model: PretrainingModel, **kwargs: int) -> PretrainLosses:
    features = None
    if model.mfm is not None:
        features = random_features(model.encoder.backbone.stage_dims)
    return model(tiny.images(), tiny.mask(), features, **kwargs)


def latent_and_ids() -> tuple[Tensor, Tensor, Tensor]:
    """A fixed decoder output (B, N, D) with the visible and the masked indices."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(2, tiny.NUM_PATCHES, DECODER_DIM, generator=generator)
    return latent, *split_tokens(tiny.mask())


@pytest.fixture
def mim() -> MaskedImageModeling:
    return tiny.randomize(MaskedImageModeling(DECODER_DIM, norm_pix_loss=True))


@pytest.fixture
def mfm() -> MaskedFeatureModeling:
    return tiny.randomize(MaskedFeatureModeling(DECODER_DIM, STAGE_DIMS))


# ---- gradients ----


def test_gradients_reach_every_trainable_parameter_and_no_frozen_one():
    model = tiny.pretraining_model(mfm_weight=0.3)
    teacher = EMATeacher(model.encoder.backbone)
    images, mask = tiny.images(), tiny.mask()
    model(images, mask, teacher(images, split_tokens(mask)[1])).total.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"decoder.pos_embed"}
    for name, p in model.named_parameters():
        if name in frozen:
            assert p.grad is None, name
        else:
            assert p.grad is not None and bool(p.grad.any()), f"no gradient at {name}"
    assert all(p.grad is None for p in teacher.parameters())


def test_mfm_gradients_reach_the_neck_and_the_backbone_by_themselves():
    model = tiny.pretraining_model(mfm_weight=0.3)
    sum(losses_of(model).mfm.values()).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"mim.pred.weight", "mim.pred.bias"}


# ---- MIM ----


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mim_loss_depends_on_masked_targets_only(norm_pix_loss: bool):
    mim = tiny.randomize(MaskedImageModeling(DECODER_DIM, norm_pix_loss=norm_pix_loss))
    latent, ids_visible, ids_masked = latent_and_ids()
    images = tiny.images()
    before = mim.loss(latent, images, ids_masked)
    for ids, expected in ((ids_visible, True), (ids_masked, False)):
        row, column = divmod(int(ids[0, 0]), 4)
        changed = images.clone()
        changed[0, 1, 16 * row + 3, 16 * column + 5] += 1
        assert torch.equal(mim.loss(latent, changed, ids_masked), before) == expected


def test_predictions_at_visible_positions_are_irrelevant_to_both_losses(
    mim: MaskedImageModeling, mfm: MaskedFeatureModeling
):
    latent, ids_visible, ids_masked = latent_and_ids()
    changed = latent.scatter(1, ids_visible[:, :, None].expand(-1, -1, DECODER_DIM), 9.0)
    images, features = tiny.images(), random_features(STAGE_DIMS)
    assert torch.equal(mim.loss(latent, images, ids_masked), mim.loss(changed, images, ids_masked))
    before, after = (mfm.losses(x, features, ids_masked) for x in (latent, changed))
    assert all(torch.equal(before[s], after[s]) for s in tiny.STRIDES)


def test_mim_loss_equals_the_mean_over_masked_patches_of_the_squared_error(
    mim: MaskedImageModeling,
):
    latent, _, ids_masked = latent_and_ids()
    images = tiny.images()
    pred, targets = mim(latent), mim.targets(images)
    errors = [(pred[b, i] - targets[b, i]).square().mean() for b in range(2) for i in ids_masked[b]]
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(mim.loss(latent, images, ids_masked), expected, atol=ATOL, rtol=0)


def test_targets_are_normalised_per_patch_by_the_unbiased_deviation(mim: MaskedImageModeling):
    images = tiny.images()
    patches = patchify(images, 16).double().numpy()
    # the biased deviation is smaller by 1 / (2 * 768): targets of order 3 would move by 2e-3
    deviation = np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    expected = (patches - patches.mean(axis=-1, keepdims=True)) / deviation
    np.testing.assert_allclose(mim.targets(images).numpy(), expected, atol=ATOL, rtol=0)


def test_a_flat_patch_has_targets_near_zero(mim: MaskedImageModeling):
    targets = mim.targets(torch.full((1, 3, 32, 32), 0.7))
    # the mean is off by float32 rounding, 6e-8, and the deviation is sqrt(1e-6)
    torch.testing.assert_close(targets, torch.zeros_like(targets), atol=1e-3, rtol=0)


def test_without_normalisation_targets_are_the_pixels():
    mim = MaskedImageModeling(DECODER_DIM, norm_pix_loss=False)
    assert torch.equal(mim.targets(tiny.images()), patchify(tiny.images(), 16))


def test_pixels_of_masked_patches_do_not_leak_into_any_prediction():
    model = tiny.pretraining_model(mfm_weight=0.3)
    images, mask = tiny.images(), tiny.mask()
    spoiled = images.masked_fill(tiny.pixels_of(mask), torch.nan)
    clean, other = model.predict(images, mask), model.predict(spoiled, mask)
    assert torch.equal(clean.pixels, other.pixels)
    assert all(torch.equal(clean.features[s], other.features[s]) for s in tiny.STRIDES)


def test_predict_returns_what_the_losses_are_made_of():
    model = tiny.pretraining_model(mfm_weight=0.3)
    images, mask = tiny.images(), tiny.mask()
    prediction, losses = model.predict(images, mask), losses_of(model)
    error = (prediction.pixels - model.mim.targets(images))[mask]  # (B*M, P*P*C)
    torch.testing.assert_close(error.square().mean(), losses.mim, atol=ATOL, rtol=0)
    targets = normalize_features(random_features(model.encoder.backbone.stage_dims))
    for s in tiny.STRIDES:
        error = prediction.features[s][mask] - targets[s].flatten(0, 1)
        torch.testing.assert_close(error.square().mean(), losses.mfm[s], atol=ATOL, rtol=0)


# ---- MFM ----


@pytest.mark.parametrize("stride", tiny.STRIDES)
def test_a_teacher_feature_at_one_masked_position_moves_the_loss_of_its_stage_only(
    mfm: MaskedFeatureModeling, stride: int
):
    latent, _, ids_masked = latent_and_ids()
    features = random_features(STAGE_DIMS)
    before = mfm.losses(latent, features, ids_masked)
    features[stride][1, 5, 0, 0, 0] += 1
    after = mfm.losses(latent, features, ids_masked)
    moved = {s for s in tiny.STRIDES if not torch.equal(before[s], after[s])}
    assert moved == {stride}


@pytest.mark.parametrize("loss_type", ["mse", "smooth_l1"])
def test_mfm_loss_of_each_stage_equals_a_loop_over_masked_tokens_and_cells(loss_type: MFMLoss):
    mfm = tiny.randomize(MaskedFeatureModeling(DECODER_DIM, STAGE_DIMS, loss_type=loss_type))
    latent, _, ids_masked = latent_and_ids()
    features = random_features(STAGE_DIMS)
    losses = mfm.losses(latent, features, ids_masked)
    for stride, dim in STAGE_DIMS.items():
        head = mfm.pred[str(stride)]
        cells = 16 // stride
        errors = []
        for b in range(2):
            for m, token in enumerate(ids_masked[b]):
                prediction = head.weight @ latent[b, token] + head.bias
                for row in range(cells):
                    for column in range(cells):
                        cell = row * cells + column
                        feature = features[stride][b, m, row, column]
                        centred = feature - feature.mean()
                        target = centred / (centred.square().mean() + 1e-5).sqrt()
                        errors.append(prediction[cell * dim : (cell + 1) * dim] - target)
        error = torch.cat(errors).abs()
        assert float(error.detach().max()) > 1 > float(error.detach().min())  # both branches below
        per_channel = error.square()
        if loss_type == "smooth_l1":
            per_channel = torch.where(error < 1, error.square() / 2, error - 0.5)
        torch.testing.assert_close(losses[stride], per_channel.mean(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("mfm_weight", [0.3, 2.0])
def test_total_is_mim_plus_weight_times_the_sum_of_the_stage_losses(mfm_weight: float):
    losses = losses_of(tiny.pretraining_model(mfm_weight=mfm_weight))
    assert set(losses.mfm) == set(tiny.STRIDES)
    assert len({float(loss.detach()) for loss in losses.mfm.values()}) == 3, "three separate losses"
    expected = losses.mim + mfm_weight * (losses.mfm[4] + losses.mfm[8] + losses.mfm[16])
    assert torch.equal(losses.total, expected)


def test_mfm_weight_zero_is_the_mim_part_alone_bit_for_bit():
    both = tiny.pretraining_model(mfm_weight=0.3)
    pixels = create_pretraining_model("itpn_debug", mfm_weight=0)
    assert pixels.mfm is None
    report = load_weights(pixels, both.state_dict())
    assert report.dropped == [
        f"mfm.pred.{s}.{part}" for s in (4, 8, 16) for part in ("weight", "bias")
    ]

    expected, losses = losses_of(both), losses_of(pixels)
    assert losses.mfm == {}
    assert torch.equal(losses.total, expected.mim)
    losses.total.backward()
    expected.mim.backward()
    for name, p in pixels.named_parameters():
        other = both.get_parameter(name)
        if p.requires_grad:
            assert torch.equal(p.grad, other.grad), name


def test_normalised_features_have_zero_mean_and_unit_variance_over_channels():
    for f in normalize_features(random_features(STAGE_DIMS)).values():
        # layer norm adds 1e-5 to the variance (about 9 here) before it divides
        torch.testing.assert_close(f.mean(-1), torch.zeros(f.shape[:-1]), atol=1e-5, rtol=0)
        variance = f.var(-1, unbiased=False)
        torch.testing.assert_close(variance, torch.ones(f.shape[:-1]), atol=1e-3, rtol=0)


def test_a_teacher_cannot_ease_the_task_by_scaling_or_shifting_its_features():
    features = random_features(STAGE_DIMS)
    moved = {s: 0.5 * f + 4 for s, f in features.items()}
    for s, f in normalize_features(moved).items():
        # the 1e-5 that layer norm adds weighs more on the smaller variance
        torch.testing.assert_close(f, normalize_features(features)[s], atol=1e-3, rtol=0)


def test_normalised_features_are_float32_and_detached():
    features = {s: f.bfloat16().requires_grad_() for s, f in random_features(STAGE_DIMS).items()}
    for f in normalize_features(features).values():
        assert f.dtype == torch.float32
        assert not f.requires_grad


def test_losses_stay_float32_under_bfloat16_autocast():
    model = tiny.pretraining_model(mfm_weight=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model)
    assert {loss.dtype for loss in (losses.total, losses.mim, *losses.mfm.values())} == {
        torch.float32
    }
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(losses.total, losses_of(model).total, atol=0, rtol=2e-2)


# ---- decoder ----


def test_decoder_input_equals_a_loop_over_tokens_with_three_mask_tokens_at_hidden_ones():
    decoder = tiny.randomize(
        Decoder(8, grid=(4, 4), dim=DECODER_DIM, depth=1, num_heads=2)
    ).double()
    generator = torch.Generator().manual_seed(4)
    cells = {16: 1, 8: 2, 4: 4}
    shape = {s: (2, tiny.NUM_VISIBLE, c, c, 8) for s, c in cells.items()}
    pyramid = {s: torch.randn(shape[s], generator=generator).double() for s in cells}
    mask = tiny.mask()
    ids_visible, _ = split_tokens(mask)
    ours = decoder.embed_levels(pyramid, ids_visible)

    for b in range(2):
        visible = ids_visible[b].tolist()
        for token in range(tiny.NUM_PATCHES):
            expected = torch.zeros(DECODER_DIM, dtype=torch.float64)
            for stride, (norm, linear) in zip((16, 8, 4), decoder.embed, strict=True):
                if mask[b, token]:
                    expected = expected + decoder.mask_token[0, 0]
                    continue
                side = cells[stride]
                level = pyramid[stride][b, visible.index(token)]
                parts = [linear(norm(level[r, c])) for r in range(side) for c in range(side)]
                expected = expected + torch.cat(parts)
            # double precision: only rounding of the last bits is left
            torch.testing.assert_close(ours[b, token], expected, atol=1e-10, rtol=0)


def test_decoder_adds_its_positions_before_the_blocks():
    decoder = tiny.randomize(Decoder(8, grid=(4, 4), dim=DECODER_DIM, depth=0, num_heads=2))
    pyramid = {s: torch.randn(2, tiny.NUM_VISIBLE, c, c, 8) for s, c in ((16, 1), (8, 2), (4, 4))}
    ids_visible, _ = split_tokens(tiny.mask())
    expected = decoder.norm(decoder.embed_levels(pyramid, ids_visible) + decoder.pos_embed)
    assert torch.equal(decoder(pyramid, ids_visible), expected)


def test_decoder_refuses_a_width_that_16_cells_cannot_share():
    with pytest.raises(ValueError, match="decoder dim=40 must be a multiple of 16"):
        Decoder(8, grid=(4, 4), dim=40)


# ---- the composed model ----


def test_the_forward_is_a_pure_function_of_its_inputs():
    model = tiny.pretraining_model(mfm_weight=0.3)
    images, mask = tiny.images(), tiny.mask()
    features = random_features(model.encoder.backbone.stage_dims)
    copies = images.clone(), mask.clone(), {s: f.clone() for s, f in features.items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = model(images, mask, features)
    torch.manual_seed(99)
    second = model(images, mask, features)
    assert torch.equal(first.total, second.total)
    assert torch.equal(first.mim, second.mim)
    assert all(torch.equal(first.mfm[s], second.mfm[s]) for s in tiny.STRIDES)
    assert torch.equal(images, copies[0]) and torch.equal(mask, copies[1])
    assert all(torch.equal(f, copies[2][s]) for s, f in features.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_given_number_of_visible_patches_gives_the_same_losses_as_counting():
    model = tiny.pretraining_model(mfm_weight=0.3)
    counted = losses_of(model)
    assert torch.equal(losses_of(model, num_visible=tiny.NUM_VISIBLE).total, counted.total)


def test_the_order_of_images_in_a_batch_does_not_matter():
    model = tiny.pretraining_model(mfm_weight=0)
    images, mask = tiny.images(), tiny.mask()
    swapped = model(images.flip(0), mask.flip(0)).total
    torch.testing.assert_close(swapped, model(images, mask).total, atol=ATOL, rtol=0)


def test_a_model_with_mfm_refuses_to_run_without_teacher_features():
    with pytest.raises(AssertionError, match="a model with MFM needs teacher_features"):
        tiny.pretraining_model(mfm_weight=0.3)(tiny.images(), tiny.mask())


def test_options_of_create_pretraining_model_reach_the_parts():
    model = create_pretraining_model(
        "itpn_debug", img_size=96, norm_pix_loss=False, mfm_weight=0.7, mfm_loss="smooth_l1"
    )
    assert model.decoder.grid == model.encoder.backbone.grid == (6, 6)
    assert model.mim.norm_pix_loss is False
    assert model.mfm_weight == 0.7
    assert model.mfm is not None and model.mfm.loss_type == "smooth_l1"


def test_initial_values_of_the_pretraining_model_are_those_of_its_tables():
    torch.manual_seed(0)
    model = create_pretraining_model("itpn_tiny_patch16_224", img_size=64, mfm_weight=0.3)
    tiny.assert_linear_and_norm_init(model)
    tiny.assert_std(model.decoder.mask_token, 0.02, "mask_token")
    assert torch.equal(model.decoder.pos_embed[0], sincos_pos_embed_2d(192, (4, 4)))


def test_the_first_mim_loss_is_that_of_predicting_zero():
    torch.manual_seed(0)
    losses = losses_of(create_pretraining_model("itpn_debug", mfm_weight=0.3))
    # unit-variance targets against near-zero predictions; 2% for the random weights
    assert math.isclose(float(losses.mim.detach()), 1.0, rel_tol=0.02)
    for loss in losses.mfm.values():
        assert math.isclose(float(loss.detach()), 1.0, rel_tol=0.05)


# ---- weights of images ----


def weighted_losses(model: PretrainingModel, weight: Tensor | None, images: Tensor | None = None):
    """Losses of two images with their weights, and the gradients of the total."""
    features = random_features(model.encoder.backbone.stage_dims)
    model.zero_grad(set_to_none=True)
    losses = model(
        tiny.images() if images is None else images, tiny.mask(), features, weight=weight
    )
    losses.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = torch.stack([losses.total, losses.mim, *losses.mfm.values()]).detach()
    return values, grads


@pytest.mark.parametrize("mfm_loss", ["mse", "smooth_l1"])
def test_weights_of_one_are_no_weights(mfm_loss: MFMLoss):
    model = tiny.pretraining_model(mfm_weight=0.3, mfm_loss=mfm_loss)
    plain, plain_grads = weighted_losses(model, None)
    ones, ones_grads = weighted_losses(model, torch.ones(2))
    # a mean of means against a mean: float32 sums in another order
    torch.testing.assert_close(ones, plain, atol=0, rtol=1e-6)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(ones_grads[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_losses_are_means_over_all_images_of_weight_times_loss():
    model = tiny.pretraining_model(mfm_weight=0.3)
    first, _ = weighted_losses(model, torch.tensor([2.0, 0.0]))  # 2 x first / 2
    second, _ = weighted_losses(model, torch.tensor([0.0, 2.0]))
    mixed, _ = weighted_losses(model, torch.tensor([0.5, 3.0]))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(mixed, (0.5 * first + 3 * second) / 2, atol=0, rtol=1e-6)


def test_an_image_of_weight_zero_has_no_part_in_losses_and_gradients():
    model = tiny.pretraining_model(mfm_weight=0.3)
    weight = torch.tensor([1.0, 0.0])
    images = tiny.images()
    others = torch.stack([images[0], torch.randn(3, 64, 64)])
    (losses, grads), (other_losses, other_grads) = (
        weighted_losses(model, weight, batch) for batch in (images, others)
    )
    assert torch.equal(losses, other_losses)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name
    nothing, no_grads = weighted_losses(model, torch.zeros(2))
    assert not nothing.any() and not any(grad.any() for grad in no_grads.values())
