"""Pictures in rows and columns with a name above each column, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 4
HEADER = 22
_FONT_PX = 13


def picture_grid(rows: Sequence[Sequence[Image.Image]], headers: Sequence[str] = ()) -> Image.Image:
    """Put tiles side by side on white; each row is as high, each column as wide as its largest.

    Args:
        rows: at least one row of at least one tile; rows may be of different lengths.
        headers: a name for each column; none for no line of names.
    """
    num_columns = max(len(row) for row in rows)
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(num_columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    top = HEADER if headers else 0
    size = (sum(widths) + GAP * (len(widths) + 1), top + sum(heights) + GAP * (len(heights) + 1))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=_FONT_PX)
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(num_columns)]
    for i, name in enumerate(headers):
        middle = (lefts[i] + widths[i] / 2, HEADER / 2)
        draw.text(middle, name, fill="black", font=font, anchor="mm")
    y = top + GAP
    for row, height in zip(rows, heights, strict=True):
        for tile, x in zip(row, lefts, strict=False):
            canvas.paste(tile, (x, y))
        y += height + GAP
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
