"""Crop boxes by torchvision's rule, crops resized as Pillow does it, and cheap decoding."""

from __future__ import annotations

import numpy as np
import pytest
from cykooz_resizer import CpuExtensions, Resizer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline import transforms
from pipeline.decoding import BadImageError, EncodedImage
from pipeline.transforms import Box, random_crop_box, random_resized_crop, resize
from tests.pipeline.samples import bad_images, encode, exif, noise_image, odd_images

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
RED, BLUE = (255, 0, 0), (0, 0, 255)


# ---- boxes ----


def crop_box(seed: int, size: tuple[int, int]) -> Box:
    return random_crop_box(np.random.default_rng(seed), size, SCALE, RATIO)


def assert_inside(box: Box, size: tuple[int, int]) -> None:
    left, upper, right, lower = box
    assert 0 <= left < right <= size[0]
    assert 0 <= upper < lower <= size[1]


@settings(deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_crop_box_lies_inside_an_image_of_any_shape(width: int, height: int, seed: int) -> None:
    assert_inside(crop_box(seed, (width, height)), (width, height))


@settings(deadline=None)
@given(
    area=st.integers(100, 4_000_000),
    # Beyond 1:6 the largest crop of a permitted ratio may be smaller than the smallest area.
    aspect=st.floats(1 / 6, 6),
    seed=st.integers(0, 2**32),
)
def test_area_and_ratio_of_a_crop_box_lie_in_their_ranges(
    area: int, aspect: float, seed: int
) -> None:
    size = (round((area * aspect) ** 0.5), round((area / aspect) ** 0.5))
    left, upper, right, lower = crop_box(seed, size)
    w, h = right - left, lower - upper
    # Sides are rounded to whole pixels: half a pixel each way.
    assert (w + 0.5) / (h - 0.5) >= RATIO[0]
    assert (w - 0.5) / (h + 0.5) <= RATIO[1]
    assert (w + 0.5) * (h + 0.5) >= SCALE[0] * size[0] * size[1]
    assert (w - 0.5) * (h - 0.5) <= SCALE[1] * size[0] * size[1]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 10), (493, 0, 506, 10)),
        ((10, 1000), (0, 493, 10, 506)),
        ((999, 1), (499, 0, 500, 1)),
    ],
)
def test_image_too_long_for_any_crop_is_cropped_at_its_centre(
    size: tuple[int, int], box: Box
) -> None:
    assert {crop_box(seed, size) for seed in range(20)} == {box}


def test_crops_reach_every_place_and_size() -> None:
    boxes = np.array([crop_box(seed, (100, 100)) for seed in range(2000)])
    left, upper, right, lower = boxes.T
    areas = (right - left) * (lower - upper)
    # 2000 uniform draws leave the lowest 1% empty with a chance of exp(-20); near the whole area
    # only squares fit, so fewer draws get there.
    assert areas.min() < 2000 + 80
    assert areas.max() > 9000
    assert (left.min(), upper.min(), right.max(), lower.max()) == (0, 0, 100, 100)
    assert 0.98 < np.median((right - left) / (lower - upper)) < 1.02  # uniform in the logarithm


# ---- resizing ----


def muted_noise(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Noise around grey: the kernel's overshoot stays between 0 and 255."""
    return np.asarray(noise_image(0, size)) // 4 + 96


@settings(deadline=None, max_examples=50)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    target=st.tuples(st.integers(1, 128), st.integers(1, 128)),
)
def test_resize_is_pillows_bicubic(size: tuple[int, int], target: tuple[int, int]) -> None:
    pixels = muted_noise(size)
    resized = resize(pixels, *target)
    expected = Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC)
    assert (resized.shape, resized.dtype) == ((target[1], target[0], 3), np.uint8)
    error = np.abs(resized.astype(int) - np.asarray(expected))
    # Both round twice, after columns and after rows, in the opposite order: a level each.
    assert error.max() <= 2
    assert error.mean() < 0.5 or error.size < 100  # a single pixel may be off in two channels


@pytest.mark.parametrize(("size", "target", "largest"), [((900, 700), 64, 2), ((40, 32), 224, 40)])
def test_resize_of_hard_noise_differs_from_pillow_where_the_kernel_overshoots(
    size: tuple[int, int], target: int, largest: int
) -> None:
    """Enlarging black next to white overshoots; which pass clips it first makes a difference."""
    image = noise_image(0, size)
    expected = np.asarray(image.resize((target, target), Image.Resampling.BICUBIC))
    error = np.abs(resize(np.asarray(image), target, target).astype(int) - expected)
    assert error.max() <= largest
    assert error.mean() < 0.5


@pytest.mark.parametrize(("size", "target"), [((300, 200), 64), ((40, 33), 96), ((7, 500), 32)])
def test_resize_gives_the_same_bytes_on_every_processor(
    size: tuple[int, int], target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, used = [], set()
    for extensions in CpuExtensions:

        def restricted(extensions: CpuExtensions = extensions) -> Resizer:
            resizer = Resizer()
            resizer.cpu_extensions = extensions  # one this processor lacks changes nothing
            used.add(resizer.cpu_extensions)
            return resizer

        monkeypatch.setattr(transforms, "Resizer", restricted)
        results.append(resize(np.asarray(noise_image(0, size)), target, target).tobytes())
    assert len(used) >= 2, "the plain code and what this processor has"
    assert len(set(results)) == 1


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (37, 90)])
def test_resize_to_the_same_size_changes_nothing(size: tuple[int, int]) -> None:
    pixels = np.asarray(noise_image(0, size))
    np.testing.assert_array_equal(resize(pixels, *size), pixels)


def test_resize_takes_views_of_an_image() -> None:
    pixels = np.asarray(noise_image(0, (80, 60)))
    view = pixels[5:41, 10:70][:, ::-1]
    np.testing.assert_array_equal(resize(view, 32, 32), resize(view.copy(), 32, 32))


def test_shrinking_averages_a_checkerboard_to_grey() -> None:
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    inner = resize(np.stack([board] * 3, -1), 32, 32)[2:-2, 2:-2]
    assert np.abs(inner - 127.5).max() <= 1.5  # without antialiasing: 127.5


# ---- crops ----


def crop(
    encoded: bytes,
    *,
    flip_prob: float = 0.0,
    whole: bool = False,
    seed: int = 0,
    image_size: int = 32,
) -> NDArray[np.uint8]:
    """A crop; of the whole image if asked."""
    return random_resized_crop(
        encoded,
        np.random.default_rng(seed),
        image_size=image_size,
        scale=(1.0, 1.0) if whole else SCALE,
        ratio=(1.0, 1.0) if whole else RATIO,
        flip_prob=flip_prob,
    )


@pytest.mark.parametrize("size", [(300, 200), (7, 5), (1, 1), (400, 3)])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_crop_of_any_image_has_the_asked_size(size: tuple[int, int], image_format: str) -> None:
    for flip_prob in (0.0, 1.0):
        pixels = crop(encode(noise_image(0, size), image_format), flip_prob=flip_prob)
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", odd_images())
def test_odd_files_give_crops(name: str) -> None:
    assert crop(odd_images()[name]).shape == (32, 32, 3)


def test_crop_of_one_pixel_is_its_colour() -> None:
    assert (crop(encode(Image.new("RGB", (1, 1), (9, 8, 7)))) == (9, 8, 7)).all()


@pytest.mark.parametrize("seed", range(5))
def test_crop_is_the_box_of_the_image_resized_alone(seed: int) -> None:
    image = noise_image(1, (120, 90))
    box = crop_box(seed, image.size)  # drawn first from the same numbers
    expected = resize(np.asarray(image.crop(box)), 32, 32)
    np.testing.assert_array_equal(crop(encode(image), seed=seed), expected)


@pytest.mark.parametrize("seed", range(5))
def test_pixels_outside_the_box_do_not_matter(seed: int) -> None:
    pixels = np.asarray(noise_image(1, (120, 90)))
    left, upper, right, lower = crop_box(seed, (120, 90))
    other = 255 - pixels
    other[upper:lower, left:right] = pixels[upper:lower, left:right]
    before, after = (crop(encode(Image.fromarray(p)), seed=seed) for p in (pixels, other))
    np.testing.assert_array_equal(before, after)


def test_boxes_are_drawn_in_the_frame_a_viewer_sees() -> None:
    """The same picture stored upright and stored rotated gives the same crop."""
    image = noise_image(1, (120, 90))
    rotated = image.transpose(Image.Transpose.ROTATE_90)
    for seed in range(5):
        upright, turned = encode(image), encode(rotated, exif=exif(6))
        np.testing.assert_array_equal(crop(upright, seed=seed), crop(turned, seed=seed))


def test_flipped_crop_mirrors_the_unflipped_one() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    encoded = encode(Image.fromarray(np.ascontiguousarray(ramp)))
    plain, flipped = (crop(encoded, flip_prob=p) for p in (0.0, 1.0))
    assert np.all(np.diff(plain[0, :, 0].astype(int)) >= 0), "unflipped, the ramp rises"
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_half_of_the_crops_are_flipped_at_probability_one_half() -> None:
    image = Image.new("RGB", (8, 8), RED)
    image.paste(BLUE, (4, 0, 8, 8))
    encoded = encode(image)
    flips = sum(crop(encoded, flip_prob=0.5, whole=True, seed=i)[0, 0, 2] > 128 for i in range(500))
    assert abs(flips - 250) < 5 * 125**0.5  # 5 standard deviations


# ---- decoding less of a large JPEG ----


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What decoders are asked to divide by."""
    asked: list[int] = []
    decode = EncodedImage.decode

    def remember(self: EncodedImage, reduction: int = 1) -> NDArray[np.uint8]:
        asked.append(reduction)
        return decode(self, reduction)

    monkeypatch.setattr(EncodedImage, "decode", remember)
    return asked


@pytest.mark.parametrize(
    ("side", "reduction"), [(32, 1), (127, 1), (128, 2), (255, 2), (256, 4), (512, 8), (5000, 8)]
)
def test_decoded_crop_keeps_twice_the_pixels_it_needs(
    side: int, reduction: int, reductions: list[int]
) -> None:
    encoded = encode(Image.new("RGB", (side, side), RED), "JPEG")
    crop(encoded, whole=True)
    assert reductions == [reduction]
    assert reduction == 1 or side / reduction >= 2 * 32


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_crop_of_a_large_jpeg_is_close_to_that_of_all_its_pixels(
    image_size: int,
    subsampling: int,
    reductions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((1200, 900), Image.Resampling.BICUBIC)
    encoded = encode(image, "JPEG", quality=90, subsampling=subsampling)
    reduced = [crop(encoded, seed=seed, image_size=image_size) for seed in range(6)]
    assert max(reductions) > 1
    monkeypatch.setattr(transforms, "_reduction", lambda box, size: 1)
    whole = [crop(encoded, seed=seed, image_size=image_size) for seed in range(6)]
    for left, right in zip(reduced, whole, strict=True):
        error = np.abs(left.astype(int) - right)
        # The same box, seen through two low-pass filters: what is left is JPEG's quantisation.
        assert error.mean() < 1
        assert error.max() < 12


def test_box_of_a_rotated_large_jpeg_is_scaled_in_the_rotated_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((1203, 901), Image.Resampling.BICUBIC)
    encoded = encode(image, "JPEG", quality=90, exif=exif(6))
    reduced = [crop(encoded, seed=seed) for seed in range(4)]
    monkeypatch.setattr(transforms, "_reduction", lambda box, size: 1)
    for seed, pixels in enumerate(reduced):
        assert np.abs(pixels.astype(int) - crop(encoded, seed=seed)).mean() < 1  # as above


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_raise_before_any_crop_is_made(name: str) -> None:
    with pytest.raises(BadImageError):
        crop(bad_images()[name][0])
