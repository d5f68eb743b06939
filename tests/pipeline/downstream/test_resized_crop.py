"""A part of a resized image is what cutting it out of the whole one would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.decoding import EncodedImage
from pipeline.downstream import resized_crop as module
from pipeline.downstream.resized_crop import mirrored, resized_crop
from pipeline.transforms import resize
from tests.pipeline.samples import encode, exif, noise_image

sides = st.integers(1, 120)


@settings(deadline=None, max_examples=100)
@given(size=st.tuples(sides, sides), new_size=st.tuples(sides, sides), data=st.data())
def test_a_crop_is_a_part_of_the_whole_resized_image(
    size: tuple[int, int], new_size: tuple[int, int], data: st.DataObject
):
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, new_size[0])] * 2)))
    upper, lower = sorted(data.draw(st.tuples(*[st.integers(0, new_size[1])] * 2)))
    crop = (min(left, new_size[0] - 1), min(upper, new_size[1] - 1), right, lower)
    crop = (crop[0], crop[1], max(right, crop[0] + 1), max(lower, crop[1] + 1))
    image = noise_image(0, size)
    whole = resize(np.asarray(image), *new_size)
    part = resized_crop(EncodedImage.open(encode(image)), new_size, crop)
    expected = whole[crop[1] : crop[3], crop[0] : crop[2]]
    assert part.shape == expected.shape
    # The weights are computed from another origin: their last bit may round the other way, once in
    # the rows and once in the columns. The image is noise, a shift by a pixel would be far more.
    assert np.abs(part.astype(int) - expected).max() <= 2


def smooth_photograph(size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crop_of_a_large_jpeg_is_close_to_that_of_all_its_pixels(
    orientation: int, monkeypatch: pytest.MonkeyPatch
):
    image = smooth_photograph((1203, 901))
    opened = EncodedImage.open(encode(image, "JPEG", quality=90, exif=exif(orientation)))
    size = (opened.size[0] // 9, opened.size[1] // 9)
    crop = (size[0] // 3, size[1] // 4, size[0], size[1])
    assert module._reduction(opened.size, size) == 4, "9 = 4 * 2 and a little"
    reduced = resized_crop(opened, size, crop)
    monkeypatch.setattr(module, "_reduction", lambda *_: 1)
    error = np.abs(reduced.astype(int) - resized_crop(opened, size, crop))
    # The same pixels through two low-pass filters: what is left is JPEG's quantisation.
    assert error.mean() < 1
    assert error.max() < 12


@pytest.mark.parametrize(
    ("side", "reduction"), [(64, 1), (127, 1), (128, 2), (255, 2), (256, 4), (512, 8), (5000, 8)]
)
def test_a_decoded_image_keeps_twice_the_pixels_of_the_resized_one(side: int, reduction: int):
    assert module._reduction((side, 3 * side), (32, 96)) == reduction


def test_resizing_to_the_same_size_changes_nothing():
    image = noise_image(0, (37, 23))
    part = resized_crop(EncodedImage.open(encode(image)), (37, 23), (5, 3, 30, 20))
    np.testing.assert_array_equal(part, np.asarray(image)[3:20, 5:30])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (40, 31)])
def test_mirrored_exchanges_left_and_right(size: tuple[int, int]):
    pixels = np.asarray(noise_image(0, size))
    np.testing.assert_array_equal(mirrored(pixels), pixels[:, ::-1])


@settings(deadline=None, max_examples=200)
@given(
    begin=st.sampled_from([0.0, 0.5, 0.125, 0.875]),
    length=st.integers(1, 4000),
    reduction=st.sampled_from([1, 2, 4, 8]),
    num_all=st.integers(1, 4000),
    data=st.data(),
)
def test_boxes_start_in_the_first_pixel_and_end_in_the_last(
    begin: float, length: int, reduction: int, num_all: int, data: st.DataObject
):
    """A box that starts further inside may be the end of the process."""
    low = data.draw(st.integers(0, num_all - 1))
    high = data.draw(st.integers(low + 1, num_all))
    span = module._Span.around(low, high, num_all, begin, begin + length / reduction)
    assert 0 <= span.start < 1
    assert span.last - span.first - 1 < span.start + span.length <= span.last - span.first
    assert span.wanted.stop - span.wanted.start == high - low


@pytest.mark.parametrize("size", [(20, 20), (25, 14), (7, 40)])
def test_crops_that_would_kill_the_resizer_as_boxes_are_made(size: tuple[int, int]):
    """At these ratios the kernel often begins with a weight of exactly 0."""
    opened = EncodedImage.open(encode(noise_image(0, size)))
    for factor in (7, 8, 14, 16):
        new_size = (size[0] * factor // 5, size[1] * factor // 5)
        whole = resized_crop(opened, new_size, (0, 0, *new_size))
        for left in range(new_size[0] - 4):
            part = resized_crop(opened, new_size, (left, 2, left + 4, new_size[1]))
            assert np.abs(part.astype(int) - whole[2:, left : left + 4]).max() <= 1
