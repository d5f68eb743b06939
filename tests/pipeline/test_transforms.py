"""Decoding rules, bad bytes, crop boxes and crops."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.transforms import BadImageError, Box, crop_image, decode_image, random_crop_box
from tests.pipeline.samples import encode, noise_image

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def flat(mode: str, colour: int | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(image_format: str) -> None:
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise by 90 degrees, the left half comes up
    decoded = decode_image(encode(image, image_format, exif=exif))
    assert decoded.size == (16, 32)
    # JPEG and lossy WebP move flat colours by a few levels.
    np.testing.assert_allclose(decoded.getpixel((8, 4)), RED, atol=8)
    np.testing.assert_allclose(decoded.getpixel((8, 28)), BLUE, atol=8)


@pytest.mark.parametrize(
    ("image", "image_format", "expected"),
    [
        (flat("RGB", (10, 20, 30)), "PNG", (10, 20, 30)),
        (flat("CMYK", (0, 255, 255, 0)), "TIFF", RED),
        (flat("L", 77), "PNG", (77, 77, 77)),
        (flat("1", 1), "PNG", (255, 255, 255)),
        (flat("RGB", (10, 20, 30)).quantize(2), "PNG", (10, 20, 30)),
        (flat("RGBA", (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (flat("LA", (77, 128)), "PNG", (77, 77, 77)),
    ],
    ids=["rgb", "cmyk", "grey", "bilevel", "palette", "transparent", "grey-alpha"],
)
def test_every_mode_becomes_rgb_with_its_colour(
    image: Image.Image, image_format: str, expected: tuple[int, int, int]
) -> None:
    decoded = decode_image(encode(image, image_format))
    assert decoded.mode == "RGB"
    assert decoded.getcolors() == [(256, expected)]


def test_cmyk_jpeg_is_not_inverted() -> None:
    decoded = decode_image(encode(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95))
    np.testing.assert_allclose(decoded.getpixel((8, 8)), RED, atol=4)  # JPEG rounding


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    levels = np.arange(256, dtype=np.uint16)
    encoded = encode(Image.fromarray((levels * 257).reshape(16, 16)), "PNG")
    np.testing.assert_array_equal(np.asarray(decode_image(encoded))[..., 1].ravel(), levels)


def test_32_bit_grey_with_8_bit_values_keeps_them() -> None:
    levels = np.arange(256, dtype=np.int32)
    decoded = decode_image(encode(Image.fromarray(levels.reshape(16, 16)), "TIFF"))
    np.testing.assert_array_equal(np.asarray(decoded)[..., 0].ravel(), levels)


def test_first_frame_of_an_animation_is_used() -> None:
    frames = [flat("RGB", RED), flat("RGB", BLUE)]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(encoded).getcolors() == [(256, RED)]


def first_half(image_format: str) -> bytes:
    encoded = encode(noise_image(0), image_format)
    return encoded[: len(encoded) // 2]


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"<html>404 not found</html>",
        b"\xff" * 500,
        encode(noise_image(0), "PNG").replace(b"IHDR", b"IHDX"),
        *(
            first_half(image_format)
            for image_format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
        ),
    ],
    ids=["empty", "html", "ones", "header", "jpeg", "png", "webp", "gif", "tiff", "bmp"],
)
def test_corrupt_or_truncated_bytes_are_a_bad_image(encoded: bytes) -> None:
    with pytest.raises(BadImageError, match=r"^\w+: "):
        decode_image(encoded)


def test_decompression_bomb_is_a_bad_image() -> None:
    encoded = encode(flat("1", 0), "PNG")
    header = struct.pack(">4sII", b"IHDR", 50_000, 50_000) + encoded[24:29]
    bomb = encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]
    with pytest.raises(BadImageError, match=r"DecompressionBombError: .*2500000000 pixels"):
        decode_image(bomb)


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


def crop(
    image: Image.Image, *, flip_prob: float = 0.0, whole: bool = False, seed: int = 0
) -> NDArray[np.uint8]:
    """A crop of 32 pixels; of the whole image if asked."""
    return crop_image(
        image,
        np.random.default_rng(seed),
        image_size=32,
        scale=(1.0, 1.0) if whole else SCALE,
        ratio=(1.0, 1.0) if whole else RATIO,
        flip_prob=flip_prob,
    )


@pytest.mark.parametrize("size", [(300, 200), (7, 5), (1, 1), (400, 3)])
def test_crop_of_any_image_has_the_asked_size_and_is_contiguous_uint8(
    size: tuple[int, int],
) -> None:
    for flip_prob in (0.0, 1.0):
        pixels = crop(noise_image(0, size), flip_prob=flip_prob)
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


def test_flipped_crop_mirrors_the_unflipped_one() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    plain, flipped = (crop(image, flip_prob=p) for p in (0.0, 1.0))
    assert np.all(np.diff(plain[0, :, 0].astype(int)) >= 0), "unflipped, the ramp rises"
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_half_of_the_crops_are_flipped_at_probability_one_half() -> None:
    image = Image.new("RGB", (8, 8), RED)
    image.paste(BLUE, (4, 0, 8, 8))
    flips = sum(crop(image, flip_prob=0.5, whole=True, seed=i)[0, 0, 2] > 128 for i in range(1000))
    assert abs(flips - 500) < 5 * 250**0.5  # 5 standard deviations


def test_shrinking_averages_a_checkerboard_to_grey() -> None:
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = crop(Image.fromarray(board).convert("RGB"), whole=True)
    inner = pixels[2:-2, 2:-2].astype(int)  # the border lacks neighbours on one side
    assert np.abs(inner - 127.5).max() <= 1.5  # without antialiasing: 127.5
