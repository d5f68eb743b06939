"""Segmentation: pixels keep their class through resizing, crop, flip and padding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.decoding import EncodedImage
from pipeline.downstream import resized_crop as resized_crop_module
from pipeline.downstream import segment_samples as module
from pipeline.downstream.samples import Arrays, BadAnnotationError
from pipeline.downstream.segment_samples import (
    SegmentSamples,
    class_share,
    decode_mask,
    rescaled,
    resized_mask,
)
from pipeline.reading import Sample
from tests.pipeline.downstream.labelled import (
    PALETTE,
    make_sample,
    png,
    random_rectangles,
    rng,
    segment_config,
)
from tests.pipeline.samples import encode, exif, noise_image

SIDE = 64
MEAN = (124, 116, 104)  # 255 * (0.485, 0.456, 0.406)


def samples(num_classes: int = 10, **overrides: Any) -> SegmentSamples:
    return SegmentSamples(segment_config(**overrides), num_classes)


def painted(ids: NDArray[np.uint8]) -> Sample:
    """An image whose colours are those of its classes."""
    return make_sample(png(PALETTE[ids]), mask=png(ids))


def blocks(size: tuple[int, int], side: int = 24) -> NDArray[np.uint8]:
    """Ids (H, W) of squares, no two neighbours of one class."""
    rows, columns = np.indices((size[1], size[0])) // side
    return ((rows * 3 + columns) % 10).astype(np.uint8)


def nearest_class(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Class (H, W) of the colour of the palette that is nearest."""
    distance = np.abs(pixels[..., None, :].astype(int) - PALETTE[:10]).sum(-1)
    return distance.argmin(-1)


# ---- geometry ----


@settings(deadline=None, max_examples=100)
@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    new_size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    data=st.data(),
)
def test_a_pixel_of_a_resized_mask_is_the_one_its_centre_falls_into(
    size: tuple[int, int], new_size: tuple[int, int], data: st.DataObject
):
    ids = rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    left, upper = (data.draw(st.integers(0, side - 1)) for side in new_size)
    right, lower = data.draw(st.integers(left + 1, new_size[0])), new_size[1]
    found = resized_mask(ids, new_size, (left, upper, right, lower))
    expected = [  # in whole numbers, of half a resized pixel
        [
            ids[
                (2 * y + 1) * size[1] // (2 * new_size[1]),
                (2 * x + 1) * size[0] // (2 * new_size[0]),
            ]
            for x in range(left, right)
        ]
        for y in range(upper, lower)
    ]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("size", "new_size"), [((90, 75), (30, 25)), ((30, 25), (210, 75))])
def test_a_resized_mask_is_pillows(size: tuple[int, int], new_size: tuple[int, int]):
    ids = rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(ids).resize(new_size, Image.Resampling.NEAREST))
    np.testing.assert_array_equal(resized_mask(ids, new_size, (0, 0, *new_size)), expected)


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    seed=st.integers(0, 2**32),
    flip_prob=st.sampled_from([0.0, 1.0]),
)
def test_target_and_pixels_agree_exactly_where_nothing_is_resized(
    size: tuple[int, int], seed: int, flip_prob: float
):
    """Images whose short side is image_size, cropped, flipped and padded."""
    ids, _ = random_rectangles(rng(seed), size, 9)
    limits = (min(size) / SIDE,) * 2 if max(size) <= 4 * min(size) else (max(size) / SIDE / 4,) * 2
    maker = samples(data__flip_prob=flip_prob, segmenter__scale_range=limits)
    made = maker.train(painted(ids), rng(seed))
    width, height = rescaled(size, SIDE * limits[0])
    if (width, height) != size:
        return  # the sizes of very long images are truncated
    width, height = min(width, SIDE), min(height, SIDE)
    is_inside = np.zeros((SIDE, SIDE), bool)
    is_inside[:height, :width] = True
    np.testing.assert_array_equal(made["target"] == 255, ~is_inside)
    np.testing.assert_array_equal(made["image"][is_inside], PALETTE[made["target"][is_inside]])
    assert (made["image"][~is_inside] == MEAN).all(), "padded with the channel means"


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (90, 80), (400, 64)])
@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_target_and_pixels_agree_after_resizing(size: tuple[int, int], flip_prob: float):
    maker = samples(data__flip_prob=flip_prob)
    for seed in range(10):
        made = maker.train(painted(blocks(size)), rng(seed))
        target = made["target"]
        is_inner = target != 255
        # Colours mix where the squares meet, which is up to two pixels wide on either side.
        for axis in (0, 1):
            for shift in (-2, -1, 1, 2):
                is_inner &= np.roll(target, shift, axis) == target
        assert is_inner.sum() > 20
        np.testing.assert_array_equal(nearest_class(made["image"])[is_inner], target[is_inner])


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((640, 480), 512, (683, 512)),
        ((480, 640), 512.9, (512, 683)),  # mmseg truncates its scale
        ((683, 512), 512, (683, 512)),
        ((4000, 500), 512, (2048, 256)),
        ((4000, 500), 256, (1024, 128)),
        ((5000, 1), 512, (2048, 1)),
        ((1, 1), 512, (512, 512)),
    ],
)
def test_sizes_are_those_of_mmcvs_imrescale(
    size: tuple[int, int], short_side: float, expected: tuple[int, int]
):
    assert rescaled(size, short_side) == expected


def recorded_short_sides(monkeypatch: pytest.MonkeyPatch, num: int, **overrides: Any) -> list[Any]:
    asked: list[float] = []

    def record(size: tuple[int, int], short_side: float) -> tuple[int, int]:
        asked.append(short_side)
        return rescaled(size, short_side)

    monkeypatch.setattr(module, "rescaled", record)
    sample, maker = painted(blocks((20, 20))), samples(data__image_size=16, **overrides)
    for seed in range(num):
        maker.train(sample, rng(seed))
    return asked


def test_the_factor_of_the_size_is_uniform(monkeypatch: pytest.MonkeyPatch):
    factors = np.array(recorded_short_sides(monkeypatch, 1000)) / 16
    assert 0.5 <= factors.min() < 0.52 and 1.98 < factors.max() <= 2  # exp(-13) that none is there
    deviation = 1.5 / 12**0.5
    assert abs(factors.mean() - 1.25) < 5 * deviation / 1000**0.5


def test_half_of_the_samples_are_flipped():
    ids = np.repeat((np.arange(64) // 32).astype(np.uint8)[None], 64, 0)
    maker = samples(segmenter__scale_range=(1.0, 1.0))
    sample = painted(ids)
    num = sum(int(maker.train(sample, rng(i))["target"][0, 0]) for i in range(400))
    assert abs(num - 200) < 5 * 100**0.5  # 5 standard deviations of 400 fair coins


def test_crops_reach_every_place():
    boxes = np.array([module._random_crop(rng(i), (120, 100), SIDE) for i in range(2000)])
    assert boxes.min(0).tolist() == [0, 0, SIDE, SIDE]
    assert boxes.max(0).tolist() == [120 - SIDE, 100 - SIDE, 120, 100]


def test_crops_of_a_rotated_photograph_are_in_the_frame_a_viewer_sees():
    ids = blocks((100, 70))
    stored = Image.fromarray(PALETTE[ids]).transpose(Image.Transpose.ROTATE_90)
    turned = make_sample(encode(stored, exif=exif(6)), mask=png(ids))
    for seed in range(5):
        upright, rotated = (samples().train(s, rng(seed)) for s in (painted(ids), turned))
        np.testing.assert_array_equal(upright["image"], rotated["image"])
        np.testing.assert_array_equal(upright["target"], rotated["target"])


def test_of_a_large_photograph_only_what_the_crop_needs_is_resized(
    monkeypatch: pytest.MonkeyPatch,
):
    reductions, shapes = [], []
    decode, resize = EncodedImage.decode, resized_crop_module.resize

    def record_decode(self: EncodedImage, reduction: int = 1) -> NDArray[np.uint8]:
        reductions.append(reduction)
        return decode(self, reduction)

    def record_resize(pixels: NDArray[np.uint8], *args: Any) -> NDArray[np.uint8]:
        shapes.append(pixels.shape[:2])
        return resize(pixels, *args)

    monkeypatch.setattr(EncodedImage, "decode", record_decode)
    monkeypatch.setattr(resized_crop_module, "resize", record_resize)
    ids = blocks((2400, 1800), 300)
    sample = make_sample(encode(Image.fromarray(PALETTE[ids]), "JPEG"), mask=png(ids))
    made = samples(segmenter__scale_range=(2.0, 2.0)).train(sample, rng())
    assert reductions == [4], "1800 / 128 is 14, of which 2 are kept"
    step = 1800 / 4 / 128
    assert max(shapes[0]) <= SIDE * step + 2 * (2 * step + 2) + 2, "the crop and the kernel's reach"
    assert (nearest_class(made["image"]) == made["target"]).mean() > 0.9


# ---- one class in too large a share ----


def striped(share: float) -> NDArray[np.uint8]:
    """Class 1 on the right, class 0 on this share of the columns."""
    ids = np.zeros((SIDE, 4 * SIDE), np.uint8)
    ids[:, int(4 * SIDE * share) :] = 1
    return ids


def shares(num: int, max_class_ratio: float, ids: NDArray[np.uint8]) -> NDArray[np.float64]:
    maker = samples(segmenter__max_class_ratio=max_class_ratio, segmenter__scale_range=(1.0, 1.0))
    sample = painted(ids)
    return np.array([class_share(maker.train(sample, rng(i))["target"]) for i in range(num)])


def test_crops_of_mostly_one_class_are_drawn_again():
    any_crop, redrawn = (shares(300, ratio, striped(0.6)) for ratio in (1.0, 0.75))
    # A crop of 64 columns has 193 places; in 33 of them no class covers more than 3/4.
    bad = 1 - 33 / 193
    assert abs((any_crop > 0.75).mean() - bad) < 5 * (bad * (1 - bad) / 300) ** 0.5
    still_bad = bad**11
    assert abs((redrawn > 0.75).mean() - still_bad) < 5 * (still_bad / 300) ** 0.5


@pytest.mark.parametrize(("ratio", "expected"), [(0.75, 11), (1.0, 1)])
def test_a_crop_is_drawn_again_ten_times_and_then_taken(
    ratio: float, expected: int, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    draw = module._random_crop
    monkeypatch.setattr(module, "_random_crop", lambda *args: calls.append(1) or draw(*args))
    ids = np.zeros((SIDE, SIDE), np.uint8)
    made = samples(segmenter__max_class_ratio=ratio).train(painted(ids), rng())
    assert len(calls) == expected
    assert (made["target"][:32, :32] == 0).all()


@pytest.mark.parametrize(
    ("target", "share"),
    [([1, 1, 1, 2], 0.75), ([1, 255, 255, 255, 2], 0.5), ([255, 255], 1.0), ([0], 1)],
)
def test_a_share_is_of_the_labelled_pixels(target: list[int], share: float):
    assert class_share(np.array([target], np.uint8)) == share


# ---- evaluation ----


@pytest.mark.parametrize("size", [(100, 70), (70, 100), (500, 40)])
def test_evaluation_resizes_the_image_and_not_its_target(size: tuple[int, int]):
    image, ids = noise_image(0, size), blocks(size)
    sample = make_sample(encode(image), mask=png(ids))
    made = samples(segmenter__eval_short_side=48).evaluate(sample)
    np.testing.assert_array_equal(made["target"], ids)
    width, height = rescaled(size, 48)
    assert made["image"].shape == (height, width, 3)
    expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    # The two kernels overshoot alike but clip in another order, see test_transforms.py.
    assert np.abs(made["image"].astype(int) - expected).mean() < 0.5
    made = samples(segmenter__eval_short_side=0).evaluate(sample)
    np.testing.assert_array_equal(made["image"], np.asarray(image))


# ---- classes ----


def test_reduce_zero_label_moves_every_class_down_and_zero_to_ignored():
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    maker = samples(254, segmenter__reduce_zero_label=True, segmenter__eval_short_side=0)
    target = maker.evaluate(painted(ids))["target"].ravel().tolist()
    assert target == [255, *range(254), 255]
    made = maker.train(painted(ids), rng())
    assert set(np.unique(made["target"])) <= {*range(254), 255}
    plain = samples(255, segmenter__eval_short_side=0).evaluate(painted(ids))["target"]
    np.testing.assert_array_equal(plain, ids)


def test_the_highest_class_is_one_more_with_reduce_zero_label():
    ids = np.full((8, 8), 10, np.uint8)
    assert samples(segmenter__reduce_zero_label=True).evaluate(painted(ids))["target"].max() == 9
    with pytest.raises(BadAnnotationError, match=r"a pixel of class 10; ids are 0 \.\.\. 9"):
        samples().evaluate(painted(ids))
    with pytest.raises(BadAnnotationError, match=r"a pixel of class 11; ids are 0 \.\.\. 10"):
        samples(segmenter__reduce_zero_label=True).evaluate(painted(ids + 1))


def test_masks_may_be_palette_images_or_of_one_bit():
    ids = blocks((40, 30))
    palette = Image.fromarray(ids)
    palette.putpalette(PALETTE.tobytes())
    np.testing.assert_array_equal(decode_mask(encode(palette), (40, 30)), ids)
    bits = Image.fromarray(ids % 2 * 255).convert("1")
    np.testing.assert_array_equal(decode_mask(encode(bits), (40, 30)), ids % 2)


def test_a_sample_depends_on_its_generator_alone():
    made = [samples().train(painted(blocks((200, 150))), rng(seed)) for seed in (0, 1, 0)]
    for key in ("image", "target"):
        np.testing.assert_array_equal(made[0][key], made[2][key])
        assert not np.array_equal(made[0][key], made[1][key])


def layout(arrays: Arrays) -> dict[str, Any]:
    return {key: (array.shape, array.dtype) for key, array in arrays.items()}


def test_a_blank_sample_has_no_class():
    blank = samples().blank()
    assert layout(blank) == layout(samples().train(painted(blocks((90, 70))), rng()))
    assert (blank["target"] == 255).all() and not blank["image"].any()


# ---- what is wrong ----


def bad_masks() -> dict[str, tuple[bytes | None, str]]:
    """Masks for an image of 40x30 pixels, and what is said of them."""
    ids = np.zeros((30, 40), np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(ids).save(jpeg, "JPEG")
    return {
        "absent": (None, "the sample has no mask"),
        "turned": (png(ids.T.copy()), "the mask has 30x40 pixels, the image 40x30"),
        "too high": (png(ids + 10), r"a pixel of class 10; ids are 0 \.\.\. 9, and 255"),
        "16 bit": (png(ids.astype(np.uint16)), "PNG of 16-bit ids .mode I;16"),
        "colours": (png(PALETTE[ids]), "PNG of colours .mode RGB"),
        "truncated": (encode(noise_image(0, (40, 30)).convert("L"))[:300], "no whole PNG"),
        "jpeg": (jpeg.getvalue(), "no whole PNG"),
    }


@pytest.mark.parametrize("name", bad_masks())
def test_masks_that_do_not_fit_make_the_sample_bad(name: str):
    mask, message = bad_masks()[name]
    sample = make_sample(encode(noise_image(0, (40, 30))), mask=mask)
    with pytest.raises(BadAnnotationError, match=message):
        samples().train(sample, rng())
    with pytest.raises(BadAnnotationError, match=message):
        samples().evaluate(sample)
