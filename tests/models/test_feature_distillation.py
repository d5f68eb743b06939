"""Feature distillation: what the mask hides as released and without the leak, losses, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.feature_distillation import (
    FeatureDistillationModel,
    MaskAt,
    create_feature_distillation_model,
)
from tests.models import tiny

TEACHER_DIM = 6


def model(mask_at: MaskAt = "stage3") -> FeatureDistillationModel:
    torch.manual_seed(0)
    return tiny.randomize(
        create_feature_distillation_model("itpn_debug", teacher_dim=TEACHER_DIM, mask_at=mask_at)
    ).eval()


def changed_at(before: Tensor, after: Tensor) -> set[tuple[int, int]]:
    """(image, token) of predictions (B, N, T) that differ."""
    moved = (before - after).abs().amax(-1) > 1e-6
    return {(int(b), int(n)) for b, n in moved.nonzero()}


@pytest.mark.parametrize("mask_at", ["stage3", "stem"])
def test_pixels_of_a_hidden_patch_reach_only_what_the_released_model_leaks(mask_at: MaskAt):
    distillation, images, mask = model(mask_at), tiny.images(), tiny.mask()
    hidden = int(mask[0].nonzero()[0])
    where = torch.zeros(2, tiny.NUM_PATCHES, dtype=torch.bool)
    where[0, hidden] = True
    other = torch.where(tiny.pixels_of(where), -images, images)
    before, after = distillation.predict(images, mask), distillation.predict(other, mask)
    leaks = {(0, hidden)} if mask_at == "stage3" else set()
    assert changed_at(before.main, after.main) == leaks
    assert changed_at(before.auxiliary, after.auxiliary) == set()


@pytest.mark.parametrize("mask_at", ["stage3", "stem"])
def test_pixels_of_a_visible_patch_reach_every_token(mask_at: MaskAt):
    distillation, images, mask = model(mask_at), tiny.images(), tiny.mask()
    where = torch.zeros(2, tiny.NUM_PATCHES, dtype=torch.bool)
    where[0, int((~mask[0]).nonzero()[0])] = True
    other = torch.where(tiny.pixels_of(where), -images, images)
    before, after = distillation.predict(images, mask), distillation.predict(other, mask)
    everywhere = {(0, n) for n in range(tiny.NUM_PATCHES)}
    assert changed_at(before.main, after.main) == everywhere


@pytest.mark.parametrize("mask_at", ["stage3", "stem"])
def test_losses_are_smooth_l1_over_all_tokens_and_every_weight_learns(mask_at: MaskAt):
    distillation, images, mask = model(mask_at), tiny.images(), tiny.mask()
    targets = torch.randn(2, tiny.NUM_PATCHES, TEACHER_DIM)
    losses = distillation(images, mask, targets)
    main, auxiliary = distillation.predict(images, mask)
    assert torch.equal(losses.main, F.smooth_l1_loss(main, targets))
    assert torch.equal(losses.total, losses.main + F.smooth_l1_loss(auxiliary, targets))
    losses.total.backward()
    without = [n for n, p in distillation.named_parameters() if p.grad is None]
    assert without == []


def test_an_image_of_weight_zero_adds_nothing():
    distillation, images, mask = model(), tiny.images(), tiny.mask()
    targets = torch.randn(2, tiny.NUM_PATCHES, TEACHER_DIM)
    weighted = distillation(images, mask, targets, torch.tensor([1.0, 0.0])).total
    alone = distillation(images[:1], mask[:1], targets[:1]).total
    torch.testing.assert_close(weighted, alone / 2)


def test_rows_may_hide_different_numbers_of_patches():
    distillation, images, mask = model(), tiny.images(), tiny.mask()
    mask = mask.clone()
    mask[0] = False
    predictions = distillation.predict(images, mask)
    alone = distillation.predict(images[:1], mask[:1])
    torch.testing.assert_close(predictions.main[:1], alone.main)


def test_a_width_that_cells_do_not_divide_is_refused():
    from models.feature_distillation import DistillationHeads

    with pytest.raises(ValueError, match="embed_dim=24 must be a multiple of 16"):
        DistillationHeads(16, dim=24, num_heads=2, grid=(4, 4), teacher_dim=3)
