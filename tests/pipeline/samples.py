"""Images and models the tests of the pipeline make on the spot."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pyarrow import fs
from torch import Tensor

from models.pretraining import PretrainingModel, create_pretraining_model
from models.teacher import EMATeacher
from pipeline import shards, storage
from pipeline.masking import random_mask
from pipeline.reproducibility import stable_id
from pipeline.shards import Manifest

IMAGE_SIZE = 64
NUM_PATCHES = 16
NUM_VISIBLE = 4
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def noise_image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Noise, so that no two crops are alike."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """Encoded bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    """Write a noise image under each name; the image depends on the name's place in the list."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed).save(folder / name)


def debug_networks(
    *, norm_pix_loss: bool = False, with_mfm: bool = True
) -> tuple[PretrainingModel, EMATeacher | None]:
    """The debug model and its teacher, in evaluation mode."""
    torch.manual_seed(0)
    weight = 0.3 if with_mfm else 0.0
    model = create_pretraining_model("itpn_debug", norm_pix_loss=norm_pix_loss, mfm_weight=weight)
    teacher = EMATeacher(model.encoder.backbone) if with_mfm else None
    return model.eval(), teacher


def debug_crops(num_images: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 64, 64) in [0, 1] around a common one, and masks (B, 16), True = masked."""
    generator = torch.Generator().manual_seed(1)
    common = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    own = torch.rand(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    masks = [
        random_mask(np.random.default_rng(i), NUM_PATCHES, NUM_VISIBLE) for i in range(num_images)
    ]
    return 0.7 * common + 0.3 * own, torch.from_numpy(np.stack(masks))


def normalized(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the model takes them."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def exif(orientation: Any) -> Image.Exif:
    """EXIF data that say how to turn an image."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def png(size: tuple[int, int], bit_depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG from its raw rows, for what Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", *size, bit_depth, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@functools.cache
def bomb_png() -> bytes:
    """30000 x 30000 pixels, whole, in about 100 kB."""
    return png((30_000, 30_000), 1, 0, bytes((1 + 30_000 // 8) * 30_000))


def bomb_jpeg() -> bytes:
    """A small JPEG whose header claims 30000 x 30000 pixels."""
    encoded = bytearray(encode(noise_image(0), "JPEG"))
    frame = encoded.index(b"\xff\xc0")  # SOF0: length, precision, height, width
    encoded[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    return bytes(encoded)


def odd_images() -> dict[str, bytes]:
    """Unusual files that are usable all the same, by file name."""
    noise = noise_image(3)
    palette = noise.quantize(16)
    palette.info["transparency"] = 0
    deep = np.random.default_rng(3).integers(0, 2**16, (32, 40), dtype=np.uint16)
    frames = [noise_image(seed) for seed in (4, 5)]
    return {
        "alpha.png": encode(noise.convert("RGBA")),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "broken_exif.jpg": encode(noise, "JPEG", exif=b"Exif\0\0MM no more of it"),
        "cmyk.jpg": encode(noise.convert("CMYK"), "JPEG"),
        "deep.png": encode(Image.fromarray(deep)),
        "one_pixel.png": encode(noise_image(0, (1, 1))),
        "palette_alpha.png": encode(palette),
        "png_named.jpg": encode(noise),
    }


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be used, by file name, and the class of the error."""
    jpeg = encode(noise_image(0), "JPEG")
    return {
        "bomb.jpg": (bomb_jpeg(), "BadImageError"),
        "bomb.png": (bomb_png(), "DecompressionBombError"),
        "page.jpg": (b"<!DOCTYPE html><html>404 not found</html>", "UnidentifiedImageError"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "OSError"),
        "truncated.png": (encode(noise_image(0))[:600], "OSError"),
        "zero.jpg": (b"", "BadImageError"),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_prepared(
    folder: Path, images: list[bytes], *, rows_per_shard: int = 10**6, rows_per_group: int = 64
) -> Manifest:
    """Write a prepared data set as the job does; sample i is named sample-i."""
    filesystem = fs.LocalFileSystem()
    written = []
    for first in range(0, len(images), rows_per_shard):
        rows = [
            {"sample_id": stable_id(name), "name": name, "image": image, "width": 1, "height": 1}
            for i, image in enumerate(images[first : first + rows_per_shard], first)
            for name in (f"sample-{i}",)
        ]
        path = folder / f"shard-{len(written):05d}.parquet"
        table = pa.Table.from_pylist(rows, schema=shards.SHARD_SCHEMA)
        with mock.patch.object(shards, "ROWS_PER_GROUP", rows_per_group):
            storage.write_atomically(
                filesystem, str(path), lambda file, table=table: shards.write_shard(table, file)
            )
        metadata = pq.read_metadata(path)
        written.append(
            shards.Shard(
                file=path.name,
                num_samples=len(rows),
                num_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                row_groups=[metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)],
            )
        )
    manifest = shards.Manifest(
        num_samples=len(images),
        num_bytes=sum(shard.num_bytes for shard in written),
        classes=["cat", "dog"],
        annotations=[],
        shards=written,
    )
    manifest.write(filesystem, str(folder))
    return manifest


def write_parquet(
    path: Path, rows: list[bytes | None], *, as_struct: bool = False, row_group_size: int = 3
) -> None:
    """Write Parquet as other programs do, the image plain or as Hugging Face's struct."""
    image: list[object] = list(rows)
    if as_struct:
        image = [None if row is None else {"bytes": row, "path": "x.jpg"} for row in rows]
    table = pa.table({"label": list(range(len(rows))), "image": image})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
