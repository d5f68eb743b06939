"""Encoded bytes -> RGB: every kind of file a folder of images may hold, and what is no image."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.decoding import MAX_PIXELS, BadImageError, EncodedImage, decode_image
from tests.pipeline.samples import bad_images, encode, exif, noise_image, odd_images, png

RED, BLUE = (255, 0, 0), (0, 0, 255)


def by_pillow(encoded: bytes) -> NDArray[np.uint8]:
    """What Pillow makes of a file of 8 bits, as a viewer shows it."""
    with Image.open(io.BytesIO(encoded)) as file:
        return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))


def assert_as_pillow(encoded: bytes) -> None:
    """Both use libjpeg-turbo with the same settings, so even JPEG agrees exactly."""
    decoded = decode_image(encoded)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, by_pillow(encoded))
    assert EncodedImage.open(encoded).size == (decoded.shape[1], decoded.shape[0])


def flat(mode: str, colour: int | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


def smooth_image(size: tuple[int, int]) -> Image.Image:
    """Colours that change over a fifth of the image."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


# ---- EXIF ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_undone_as_pillow_does(image_format: str, orientation: int) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    encoded = encode(noise_image(0, (33, 17)), image_format, exif=exif(orientation), **options)
    assert_as_pillow(encoded)
    assert EncodedImage.open(encoded).size == ((33, 17) if orientation < 5 else (17, 33))


def test_orientation_6_turns_the_left_half_up() -> None:
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    decoded = decode_image(encode(image, "JPEG", exif=exif(6)))
    assert decoded.shape == (32, 16, 3)
    # JPEG moves flat colours by a few levels.
    np.testing.assert_allclose(decoded[4, 8], RED, atol=8)
    np.testing.assert_allclose(decoded[28, 8], BLUE, atol=8)


@pytest.mark.parametrize(
    "broken",
    [
        b"Exif\0\0",
        b"Exif\0\0MM no more of it",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        exif(0),
        exif(9),
    ],
    ids=["empty", "cut", "offset", "zero", "nine"],
)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_unreadable_orientation_is_none(image_format: str, broken: bytes | Image.Exif) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    plain = encode(noise_image(0), image_format, **options)
    encoded = encode(noise_image(0), image_format, exif=broken, **options)
    np.testing.assert_array_equal(decode_image(encoded), decode_image(plain))


# ---- colours ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"quality": 20},
        {"optimize": True, "restart_marker_rows": 1},
    ],
    ids=["4:2:0", "progressive", "4:4:4", "4:2:2", "coarse", "restarts"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(101, 67), (1, 1), (17, 200)])
def test_jpeg_decodes_to_pillows_pixels(
    options: dict[str, object], mode: str, size: tuple[int, int]
) -> None:
    encoded = encode(noise_image(0, size).convert(mode), "JPEG", **options)
    assert EncodedImage.open(encoded).is_plain_jpeg
    assert_as_pillow(encoded)


def test_cmyk_and_ycck_jpegs_decode_as_pillow_does() -> None:
    cmyk = encode(noise_image(0).convert("CMYK"), "JPEG")
    transform = cmyk.index(b"Adobe") + 11  # 0: CMYK, 2: YCCK
    ycck = cmyk[:transform] + b"\2" + cmyk[transform + 1 :]
    for encoded in (cmyk, ycck):
        assert not EncodedImage.open(encoded).is_plain_jpeg
        assert_as_pillow(encoded)
    assert not np.array_equal(decode_image(cmyk), decode_image(ycck))


def test_cmyk_jpeg_is_not_inverted() -> None:
    decoded = decode_image(encode(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95))
    np.testing.assert_allclose(decoded[8, 8], RED, atol=4)  # JPEG rounding


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
        (flat("RGBA", (10, 20, 30, 128)), "TIFF", (10, 20, 30)),
        (flat("RGB", (10, 20, 30)), "BMP", (10, 20, 30)),
    ],
    ids=["rgb", "cmyk", "grey", "bilevel", "palette", "transparent", "grey-alpha", "tiff", "bmp"],
)
def test_every_mode_becomes_rgb_with_its_colour(
    image: Image.Image, image_format: str, expected: tuple[int, int, int]
) -> None:
    decoded = decode_image(encode(image, image_format))
    assert decoded.shape == (16, 16, 3)
    assert (decoded == expected).all()


def test_transparent_colour_of_a_palette_is_kept_as_any_other() -> None:
    palette = noise_image(0).quantize(8)
    opaque = decode_image(encode(palette))
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    np.testing.assert_array_equal(decode_image(encode(palette)), opaque)


# ---- more than 8 bits ----


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    levels = np.arange(256, dtype=np.uint16)
    encoded = encode(Image.fromarray((levels * 257).reshape(16, 16)), "PNG")
    np.testing.assert_array_equal(decode_image(encoded)[..., 1].ravel(), levels)


def test_16_bit_colours_keep_their_high_bytes() -> None:
    colours = np.random.default_rng(0).integers(0, 2**16, (4, 5, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    np.testing.assert_array_equal(decode_image(png((5, 4), 16, 2, rows)), colours >> 8)


def test_32_bit_grey_with_8_bit_values_keeps_them() -> None:
    levels = np.arange(256, dtype=np.int32)
    decoded = decode_image(encode(Image.fromarray(levels.reshape(16, 16)), "TIFF"))
    np.testing.assert_array_equal(decoded[..., 0].ravel(), levels)


def test_32_bit_grey_with_16_bit_values_is_scaled() -> None:
    levels = np.arange(256, dtype=np.int32)
    decoded = decode_image(encode(Image.fromarray((levels * 257).reshape(16, 16)), "TIFF"))
    np.testing.assert_array_equal(decoded[..., 0].ravel(), levels)


@pytest.mark.parametrize("scale", [1, 255])
def test_floats_are_taken_for_0_to_1_or_for_0_to_255(scale: int) -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    decoded = decode_image(encode(Image.fromarray(values * scale), "TIFF"))
    # Levels are cut off, not rounded: 1 of 255 may be lost to float32.
    np.testing.assert_allclose(decoded[..., 2], values * 255, atol=1)


def test_floats_that_are_no_numbers_become_black() -> None:
    values = np.full((16, 16), 0.5, np.float32)
    values[0, :3] = np.nan, -np.inf, -1
    decoded = decode_image(encode(Image.fromarray(values), "TIFF"))
    assert (decoded[0, :3] == 0).all()
    assert (decoded[1:] == 127).all()


# ---- several frames ----


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_an_animation_is_used(image_format: str) -> None:
    frames = [flat("RGB", RED), flat("RGB", BLUE)]
    options = {"lossless": True} if image_format == "WEBP" else {}
    encoded = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(encoded) == RED).all()


# ---- damaged, but usable ----


@pytest.mark.parametrize(
    "damage",
    [
        lambda jpeg: jpeg + b"\0" * 50 + b"garbage",
        lambda jpeg: jpeg + jpeg,
        lambda jpeg: jpeg[:-2] + b"\x12\x34\x56" + jpeg[-2:],  # "extraneous bytes before marker"
        lambda jpeg: jpeg[:2] + b"\xff" * 9 + jpeg[2:],
    ],
    ids=["trailing", "doubled", "extraneous", "padded"],
)
def test_benign_damage_of_a_jpeg_changes_no_pixel(damage: object) -> None:
    jpeg = encode(noise_image(0), "JPEG")
    np.testing.assert_array_equal(decode_image(damage(jpeg)), decode_image(jpeg))  # type: ignore[operator]


@pytest.mark.parametrize("name", odd_images())
def test_odd_files_are_usable(name: str) -> None:
    encoded = odd_images()[name]
    decoded = decode_image(encoded)
    assert (decoded.dtype, decoded.shape[2]) == (np.uint8, 3)
    if name != "deep.png":  # Pillow would clip it
        assert_as_pillow(encoded)


# ---- no image ----


@pytest.mark.parametrize("name", bad_images())
def test_files_that_cannot_be_used_are_bad_images(name: str) -> None:
    with pytest.raises(BadImageError, match=r"\w+"):
        decode_image(bad_images()[name][0])


def first_half(image_format: str) -> bytes:
    encoded = encode(noise_image(0), image_format)
    return encoded[: len(encoded) // 2]


@pytest.mark.parametrize(
    "encoded",
    [
        b"<html>404 not found</html>",
        b"\xff" * 500,
        b"\xff\xd8\xff",
        encode(noise_image(0), "PNG").replace(b"IHDR", b"IHDX"),
        *(first_half(image_format) for image_format in ("WEBP", "GIF", "TIFF", "BMP")),
    ],
    ids=["html", "ones", "start", "header", "webp", "gif", "tiff", "bmp"],
)
def test_corrupt_or_truncated_bytes_are_a_bad_image(encoded: bytes) -> None:
    with pytest.raises(BadImageError, match=r"^\w+: "):
        decode_image(encoded)


def test_nothing_at_all_is_a_bad_image() -> None:
    with pytest.raises(BadImageError, match=r"^the file is empty$"):
        EncodedImage.open(b"")


@pytest.mark.parametrize("name", ["bomb.png", "bomb.jpg"])
def test_decompression_bomb_is_refused_by_its_header(name: str) -> None:
    encoded = bad_images()[name][0]
    assert len(encoded) < 200_000
    with pytest.raises(BadImageError, match=r"30000x30000|900000000 pixels"):
        EncodedImage.open(encoded)
    assert MAX_PIXELS < 30_000**2


@settings(deadline=None, max_examples=60)
@given(data=st.data(), image_format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]))
def test_a_file_cut_anywhere_is_bad_or_whole_and_never_half_an_image(
    data: st.DataObject, image_format: str
) -> None:
    encoded = encode(noise_image(0, (60, 40)), image_format)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    try:
        decoded = decode_image(encoded[:cut])
    except BadImageError:
        return
    np.testing.assert_array_equal(decoded, decode_image(encoded))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), image_format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_changed_bytes_give_an_image_or_a_bad_image_and_no_other_error(
    data: st.DataObject, image_format: str
) -> None:
    encoded = bytearray(encode(noise_image(0), image_format))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = EncodedImage.open(bytes(encoded))
        if math.prod(image.size) < 10**6:  # a changed header may well ask for a gigabyte
            assert image.decode().shape == (*image.size[::-1], 3)
    except BadImageError:
        pass


# ---- reduced decoding ----


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(640, 400), (643, 403)])
def test_reduced_jpeg_has_the_sides_divided_and_the_means_of_their_pixels(
    size: tuple[int, int], orientation: int, reduction: int
) -> None:
    encoded = encode(smooth_image(size), "JPEG", quality=95, exif=exif(orientation))
    image = EncodedImage.open(encoded)
    reduced, whole = image.decode(reduction), image.decode()
    height, width = (math.ceil(side / reduction) for side in whole.shape[:2])
    assert reduced.shape == (height, width, 3)
    inner_height, inner_width = (side // reduction for side in whole.shape[:2])
    if orientation != 1:  # rotated, an incomplete block lies at the other end
        whole = whole[:, whole.shape[1] - inner_width * reduction :]
        reduced = reduced[:, width - inner_width :]
    blocks = whole[: inner_height * reduction, : inner_width * reduction].reshape(
        inner_height, reduction, inner_width, reduction, 3
    )
    error = np.abs(reduced[:inner_height, :inner_width] - blocks.mean((1, 3)))
    # The transform is cut off at its low frequencies instead of averaged: a level or two.
    assert error.mean() < 1
    assert error.max() < 12


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_other_formats_come_at_full_size_at_any_reduction(image_format: str) -> None:
    image = EncodedImage.open(encode(noise_image(0, (640, 400)), image_format))
    np.testing.assert_array_equal(image.decode(8), image.decode())
