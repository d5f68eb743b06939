"""The demo's photographs: real ones that ship inside scikit-image and scikit-learn.

The left three quarters of each photograph become training images and the right quarter is held out,
so that evaluation crops show regions the model has never seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SHORT_SIDE = 384
TRAIN_SHARE = 0.75
SKIMAGE_PHOTOS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
    "rocket",
)


def write_demo_photos(folder: str | Path) -> int:
    """Write 16 photographs to `<folder>/train` and `<folder>/val` as JPEG; returns their number.

    Does nothing where they already are.

    Raises:
        ModuleNotFoundError: the demo extra is not installed.
    """
    folder = Path(folder)
    photos = _photos()
    for name, photo in photos.items():
        if (folder / "val" / f"{name}.jpg").exists():
            continue
        scale = min(1.0, SHORT_SIDE / min(photo.size))
        size = (round(photo.width * scale), round(photo.height * scale))
        photo = photo.resize(size, Image.Resampling.BICUBIC)
        split = int(photo.width * TRAIN_SHARE)
        boxes = {"train": (0, 0, split, photo.height), "val": (split, 0, photo.width, photo.height)}
        for part, box in boxes.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            photo.crop(box).save(folder / part / f"{name}.jpg", quality=95)
    return len(photos)


def _photos() -> dict[str, Image.Image]:
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing, the demo photographs come with it: pip install -e '.[demo]'"
        ) from error
    arrays = {name: getattr(skimage.data, name)() for name in SKIMAGE_PHOTOS}
    arrays["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    arrays["china"], arrays["flower"] = load_sample_images().images
    return {name: Image.fromarray(np.asarray(a)).convert("RGB") for name, a in arrays.items()}
