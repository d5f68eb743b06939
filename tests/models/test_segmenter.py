"""The segmenter: levels, heads, loss, sliding windows, sizes and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.feature_maps import detection_levels, fold_cells, segmentation_levels
from models.itpn import create_itpn
from models.segmenter import (
    AUXILIARY_WEIGHT,
    IGNORE_INDEX,
    ITPNSegmenter,
    SegmentationLogits,
    create_segmenter,
    segmentation_loss,
    window_starts,
)
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def segmenter(**kwargs: object) -> ITPNSegmenter:
    defaults = {"num_classes": 4, "img_size": 64, "channels": 16}
    return tiny.randomize(create_segmenter("itpn_debug", **{**defaults, **kwargs}))


# ---- levels ----


def test_folded_cells_lie_where_their_token_and_cell_say():
    h, w, c, d = 2, 3, 4, 5
    x = torch.randn(2, h * w, c, c, d)
    image = fold_cells(x, (h, w))
    assert image.shape == (2, d, h * c, w * c)
    for token in range(h * w):
        top, left = token // w * c, token % w * c
        for i in range(c):
            for j in range(c):
                assert torch.equal(image[:, :, top + i, left + j], x[:, token, i, j])


def test_levels_have_the_channels_of_the_official_models():
    """Pyramid 256 beside the stages: base 384, 512, 768, 768; large 448, 640, 1024, 1024."""
    for name, dims in (("base", (384, 512, 768, 768)), ("large", (448, 640, 1024, 1024))):
        with torch.device("meta"):
            head = create_segmenter(f"itpn_{name}_patch16_224", num_classes=150).decode_head
        convolutions = [*(conv[0] for conv in head.lateral), head.pooled[0][0]]
        assert tuple(conv.in_channels for conv in convolutions) == dims
        assert head.fuse[0].out_channels == 768


def test_levels_have_strides_4_to_32():
    levels = segmenter().levels(tiny.images(height=64, width=96))
    dims = (16 + 8, 16 + 16, 16 + 32, 16 + 32)
    assert [tuple(x.shape[1:]) for x in levels] == [
        (dim, 64 // s, 96 // s) for dim, s in zip(dims, (4, 8, 16, 32), strict=True)
    ]


def test_a_grid_too_small_for_its_levels_is_refused():
    encoder = create_itpn("itpn_debug")
    features = encoder(tiny.images(height=16, width=64))
    with pytest.raises(
        ValueError, match=r"token grid of 1x4 has no 4 levels .* at least 2 patches"
    ):
        segmentation_levels(features, (1, 4))
    with pytest.raises(ValueError, match=r"strides 4 to 64.* at least 4 patches"):
        detection_levels(features, (1, 4))


def test_the_absolute_table_keeps_its_size_and_bias_tables_take_the_crops():
    model = segmenter(img_size=96)
    assert model.encoder.backbone.pos_embed.shape[1] == 16
    assert model.encoder.backbone.blocks[-1].attn.relative_position_bias_table.shape[0] == 11**2


# ---- forward and loss ----


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 96), (160, 224), (32, 80)])
def test_any_size_of_whole_patches_is_segmented(height: int, width: int):
    logits = segmenter().eval()(tiny.images(height=height, width=width))
    assert logits.main.shape == (2, 4, height // 4, width // 4)
    assert logits.main.isfinite().all() and logits.auxiliary is None


def test_gradients_reach_every_parameter():
    model = segmenter().train()
    labels = torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    sum(segmentation_loss(model(tiny.images()), labels).values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_a_segmenter_learns_to_tell_the_halves_of_an_image_apart():
    torch.manual_seed(0)
    model = create_segmenter("itpn_debug", num_classes=2, img_size=64, channels=16)
    images = torch.randn(2, 3, 64, 64) * 0.1
    images[:, :, :, 32:] += 1
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[:, :, 32:] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        loss = sum(segmentation_loss(model.train()(images), labels).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = model.eval().predict(images).argmax(dim=1)
    assert float((predicted == labels).float().mean()) > 0.9


def test_the_loss_is_cross_entropy_over_labelled_pixels_with_a_weighted_auxiliary():
    main, auxiliary = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    labels = torch.randint(0, 3, (2, 8, 8))
    labels[0, :4] = IGNORE_INDEX
    losses = segmentation_loss(SegmentationLogits(main, auxiliary), labels)
    kept = labels != IGNORE_INDEX
    for name, logits, weight in (
        ("loss_seg", main, 1.0),
        ("loss_aux", auxiliary, AUXILIARY_WEIGHT),
    ):
        picked = logits.permute(0, 2, 3, 1)[kept].log_softmax(-1)
        expected = -picked.gather(1, labels[kept][:, None]).mean() * weight
        torch.testing.assert_close(losses[name], expected)


def test_a_batch_without_labels_gives_a_zero_loss_and_finite_gradients():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 16, 16), IGNORE_INDEX)
    loss = segmentation_loss(SegmentationLogits(logits, None), labels)["loss_seg"]
    loss.backward()
    assert float(loss.detach()) == 0 and not logits.grad.any()


def test_the_auxiliary_head_is_used_in_training_only_and_can_be_left_out():
    model = segmenter()
    assert model.train()(tiny.images()).auxiliary.shape == (2, 4, 4, 4)
    assert model.eval()(tiny.images()).auxiliary is None
    without = ITPNSegmenter(create_itpn("itpn_debug"), 4, channels=8, auxiliary=False)
    assert without.train()(tiny.images()).auxiliary is None


# ---- sliding windows ----


@pytest.mark.parametrize("window", [64, 96, 512])
def test_a_window_that_covers_the_image_is_whole_image_inference(window: int):
    model, images = segmenter().eval(), tiny.images()
    assert torch.equal(model.predict(images, window=window), model.predict(images))


def test_whole_image_inference_is_the_upsampled_forward():
    model, images = segmenter().eval(), tiny.images(height=64, width=96)
    expected = F.interpolate(model(images).main, size=(64, 96), mode="bilinear")
    assert torch.equal(model.predict(images), expected)


def test_windows_are_averaged_where_they_overlap():
    model, images = segmenter().eval(), tiny.images(height=80, width=112)
    logits = model.predict(images, window=64, stride=32)
    total, count = torch.zeros_like(logits), torch.zeros(80, 112)
    for top in (0, 16):
        for left in (0, 32, 48):
            crop = images[:, :, top : top + 64, left : left + 64]
            total[:, :, top : top + 64, left : left + 64] += model.predict(crop)
            count[top : top + 64, left : left + 64] += 1
    torch.testing.assert_close(logits, total / count, atol=1e-6, rtol=1e-6)  # order of sums


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize(("height", "width"), [(50, 71), (7, 90)])
def test_prediction_has_the_size_of_any_image(height: int, width: int, window: int | None):
    logits = segmenter().eval().predict(tiny.images(1, height, width), window=window)
    assert logits.shape == (1, 4, height, width) and logits.isfinite().all()


def test_padding_is_what_zeros_at_the_right_and_bottom_would_give():
    model, images = segmenter().eval(), tiny.images(1, 50, 60)
    padded = F.pad(images, (0, 4, 0, 14))
    assert torch.equal(model.predict(images), model.predict(padded)[..., :50, :60])


@pytest.mark.parametrize("size", [1, 512, 513, 1000])
def test_windows_cover_every_pixel_and_end_at_the_edge(size: int):
    starts = window_starts(size, 512, 341)
    covered: set[int] = set()
    for start in starts:
        covered |= set(range(start, min(start + 512, size)))
    assert covered == set(range(size))
    assert len(starts) == len(set(starts)) == max(0, math.ceil((size - 512) / 341)) + 1
    assert starts[-1] == max(0, size - 512)


@pytest.mark.parametrize("arguments", [{"window": 64, "stride": 65}, {"window": 0, "stride": 1}])
def test_windows_that_leave_gaps_are_refused(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="windows must leave no gap"):
        segmenter().eval().predict(tiny.images(), **arguments)


def test_prediction_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        segmenter().train().predict(tiny.images())


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes=0 must be >= 1"):
        segmenter(num_classes=0)


def test_initial_values_of_the_heads_are_those_of_their_table():
    torch.manual_seed(0)
    model = create_segmenter("itpn_debug", num_classes=50, img_size=64, channels=64)
    for head in (model.decode_head, model.auxiliary_head):
        tiny.assert_std(head.classify.weight, 0.01, "classify")
        assert not head.classify.bias.any()
    fuse: Tensor = model.decode_head.fuse[0].weight
    tiny.assert_std(fuse, (2 / (64 * 9)) ** 0.5, "fuse")  # kaiming normal, fan out
