"""Pictures of a run inside the page: the newest of each kind, as small as they have to be.

Surprising: they are stored anew as WebP (the PNGs of one run can be larger than the whole report
may be), and made smaller until all of them fit.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline import tracking

MAX_BYTES = 1_300_000
"""Of all pictures of a page, as base64."""
_TRIES = ((1.0, 85), (1.0, 70), (0.75, 70), (0.5, 65), (0.35, 55), (0.2, 50), (0.1, 40))
_ALSO_FIRST = "reconstructions"
_STEP = re.compile(r"step_0*(\d+)")
_TITLES = {
    "reconstructions": (
        "Reconstructions",
        "held-out images: input, what was hidden, and what the model made of it",
    ),
    "predictions": ("Predictions", "validation images with what the model says beside the truth"),
    "confusion": ("Confusion", "true classes in rows, predicted classes in columns"),
}


@dataclass(frozen=True)
class Picture:
    """A picture as the page shows it."""

    title: str
    alt: str
    data_uri: str
    width: int
    height: int


def embedded_pictures(path: Path, max_bytes: int = MAX_BYTES) -> tuple[list[Picture], list[str]]:
    """Pictures of a run folder and remarks on those that could not be shown.

    Args:
        path: the run folder.
        max_bytes: of all of them together.
    """
    files = []
    for kind in tracking.PICTURE_FOLDERS:
        drawn = sorted((path / kind).glob("*.png"))
        files += [(kind, file) for file in drawn[-1:]]
        if kind == _ALSO_FIRST and len(drawn) > 1:
            files.append((kind, drawn[0]))
    pictures, remarks = [], []
    for kind, file in files:
        try:
            data, mime, size = _fit(file, max_bytes // len(files))
        except Exception as error:  # Pillow raises much for a broken file
            remarks.append(
                f"{kind}/{file.name} could not be shown: {type(error).__name__}: {error}"
            )
            continue
        name, what = _TITLES.get(kind, (kind, kind))
        step = _STEP.search(file.stem)
        at = f" at step {step[1]}" if step else ""
        uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        pictures.append(Picture(name + at, f"{name}{at}: {what}", uri, *size))
    return pictures, remarks


def _fit(file: Path, max_bytes: int) -> tuple[bytes, str, tuple[int, int]]:
    """Content, media type and size of a picture that takes no more than `max_bytes` as base64."""
    limit = max_bytes * 3 // 4 - 4
    content = file.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if len(content) <= min(limit, 40_000):
            return content, "image/png", image.size
        for scale, quality in _TRIES:
            width, height = (max(1, round(side * scale)) for side in image.size)
            smaller = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            smaller.save(buffer, "WEBP", quality=quality, method=2)
            if buffer.tell() <= limit:
                return buffer.getvalue(), "image/webp", (width, height)
    raise ValueError(f"it is {len(content)} bytes and does not get small enough")
