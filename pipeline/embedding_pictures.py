"""Pictures of features: what an encoder tells apart within images, and which images it finds alike.

`_pca.png`: the first three principal components of each level as colours, one analysis a level over
all images shown, so a colour means the same in every row. `_neighbours.png`: images and those
nearest to them. Surprising: the mean of each place within a token is taken off first. In the demo's
neck that place makes 79 % of the variance at stride 8, and all colours would show a lattice.
"""

# B images, h x w positions of a level, c cells per token side, D features, S side of the crop

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.decoding import BadImageError
from pipeline.picture_grid import picture_grid, png_bytes
from pipeline.reading import Sample, SampleReader, UnreadableSampleError
from pipeline.retrieval import Neighbours, VectorFiles

PCA_FILE = "_pca.png"  # with _, or readers of Parquet folders would trip over it
NEIGHBOURS_FILE = "_neighbours.png"
MAX_PICTURES = 64
MAX_NEIGHBOURS = 20
NUM_QUERIES = 8
Load = Callable[[Sample], NDArray[np.uint8]]
_GREY = 0.5
_DEAD_RATIO = 1e-5  # of the features' size; below it a spread is what float32 rounds off
_CAPTION = 20
_FONT_PX = 13


def pca_picture(
    crops: Sequence[NDArray[np.uint8]],
    maps: Mapping[str, NDArray[np.float32]],
    *,
    tile_px: int = 160,
) -> bytes:
    """Draw a row an image: the crop, then every level as colours.

    Args:
        crops: B images (S, S, 3).
        maps: (B, h, w, D) by the name of the column; the coarsest has a position a token.
        tile_px: smallest side of a tile in the picture.

    Returns:
        PNG bytes.
    """
    side = _side(crops[0].shape[0], tile_px)
    grid = min(features.shape[1] for features in maps.values())
    coloured = [principal_colours(f, cells=f.shape[1] // grid) for f in maps.values()]
    columns = [list(crops), *map(list, coloured)]
    rows = [[_tile(pixels, side) for pixels in row] for row in zip(*columns, strict=True)]
    return png_bytes(picture_grid(rows, ["image", *maps]))


def principal_colours(maps: NDArray[np.float32], *, cells: int = 1) -> NDArray[np.uint8]:
    """Features as colours: components 1, 2, 3 as red, green, blue.

    Each runs from its 2nd to its 98th percentile. The entry of a component that is largest in
    magnitude is positive; a component that does not vary is grey.

    Args:
        maps: (B, h, w, D), all images that are to share their colours.
        cells: positions of a token along a side; the mean of each of its places is taken off.

    Returns:
        (B, h, w, 3).
    """
    # An encoder that diverged is drawn as well: a picture ends no job.
    maps = np.nan_to_num(maps, nan=0.0, posinf=0.0, neginf=0.0)
    size = np.sqrt(np.square(maps, dtype=np.float64).sum(-1).mean())
    centered = _without_place(maps, cells)
    D = maps.shape[-1]
    covariance = np.zeros((D, D))
    for one in centered:
        flat = one.reshape(-1, D).astype(np.float64)  # an image at a time: all of them are large
        covariance += flat.T @ flat
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :3]  # eigh: smallest first
    largest = axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])]
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    values = np.zeros((*maps.shape[:3], 3))
    values[..., : axes.shape[1]] = np.stack([one @ axes for one in centered])

    low, high = np.percentile(values, [2, 98], axis=(0, 1, 2))
    is_alive = high - low > _DEAD_RATIO * size
    scaled = (values - low) / np.where(is_alive, high - low, 1.0)
    unit = np.where(is_alive, scaled.clip(0, 1), _GREY)
    return np.round(unit * 255).astype(np.uint8)


def _without_place(maps: NDArray[np.float32], cells: int) -> NDArray[np.float32]:
    B, h, w, D = maps.shape
    tokens = maps.reshape(B, h // cells, cells, w // cells, cells, D)
    means = tokens.mean((0, 1, 3), dtype=np.float64, keepdims=True).astype(np.float32)
    return (tokens - means).reshape(maps.shape)


def neighbours_picture(
    queries: Sequence[int],
    found: Neighbours,
    crops: Mapping[int, NDArray[np.uint8]],
    *,
    tile_px: int = 160,
) -> bytes:
    """Draw a row a query: the image, then the nearest ones with their similarity below.

    Args:
        queries: places of the images in the gallery.
        found: their neighbours.
        crops: (S, S, 3) by place; what is missing here is left white.
        tile_px: smallest side of a tile in the picture.

    Returns:
        PNG bytes.
    """
    side = _side(next(iter(crops.values())).shape[0], tile_px)
    rows = [
        [_captioned(crops.get(place), side, text) for place, text in _row(query, near, cosines)]
        for query, near, cosines in zip(queries, *found, strict=True)
    ]
    return png_bytes(picture_grid(rows, ["image", *map(str, range(1, found.rows.shape[1] + 1))]))


def evenly_spread(num_rows: int, count: int) -> list[int]:
    """`count` rows or all, the first and the last among them."""
    spread = np.linspace(0, num_rows - 1, min(count, num_rows)).round()
    return spread.astype(int).tolist()


def read_crops(
    reader: SampleReader, load: Load, rows: Iterable[int]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Rows of the index with their images; bad ones are passed over."""
    for row in rows:
        try:
            yield row, load(reader.read(row))
        except (BadImageError, UnreadableSampleError):
            continue


def index_rows(
    reader: SampleReader, files: VectorFiles, places: Sequence[int], num_bad: int
) -> dict[int, int]:
    """Rows of the index, keys of the result, that have a place in the Parquet files.

    Bad images have none, so an image moves up by at most `num_bad` and is found by its path.
    """
    found = {}
    for place, path in zip(places, files.paths(places), strict=True):
        candidates = range(place, min(place + num_bad + 1, len(reader)))
        row = next((row for row in candidates if reader.location(row) == path), None)
        assert row is not None, f"{path} is not among rows {candidates} of the index"
        found[row] = place
    return found


def _row(
    query: int, near: NDArray[np.int64], cosines: NDArray[np.float32]
) -> list[tuple[int, str]]:
    """Places and captions."""
    # Five decimals: features of a young encoder, or of plain images, are all above 0.999 alike.
    captions = [f"{cosine:.5f}" for cosine in cosines.tolist()]
    return [(query, ""), *zip(near.tolist(), captions, strict=True)]


def _side(crop_px: int, tile_px: int) -> int:
    """A multiple of the crop's side, so that every position becomes a square of the same size."""
    return crop_px * max(1, -(-tile_px // crop_px))


def _tile(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    tile = Image.fromarray(np.ascontiguousarray(pixels))
    return tile.resize((side, side), Image.Resampling.NEAREST)


def _captioned(pixels: NDArray[np.uint8] | None, side: int, text: str) -> Image.Image:
    canvas = Image.new("RGB", (side, side + _CAPTION), "white")
    if pixels is not None:
        canvas.paste(_tile(pixels, side), (0, 0))
    middle = (side / 2, side + _CAPTION / 2)
    font = ImageFont.load_default(size=_FONT_PX)
    ImageDraw.Draw(canvas).text(middle, text, fill="black", font=font, anchor="mm")
    return canvas
