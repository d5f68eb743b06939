"""Mean IoU of a threshold on the nuclei tiles: what a segmentation knows that has learnt nothing.

    python benchmarks/otsu_baseline.py ablation/nuclei/raw/val     # what ablation_data.py wrote

Each tile is split by Otsu's threshold of its grey values; the smaller part is called nuclei.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import threshold_otsu

from pipeline.downstream.mean_iou import SegmentationScores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiles", type=Path, help="folder with images/ and masks/")
    args = parser.parse_args()
    scores = SegmentationScores(["background", "nucleus"])
    for path in sorted((args.tiles / "images").glob("*.png")):
        truth = np.array(Image.open(args.tiles / "masks" / path.name))
        predicted = smaller_part(np.asarray(Image.open(path).convert("L")))
        scores.add(torch.from_numpy(predicted), torch.from_numpy(truth))
    print(f"mIoU {scores.result()['val/miou']:.2f}")


def smaller_part(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) 1 on the smaller side of the threshold."""
    is_bright = grey > threshold_otsu(grey)
    return (is_bright if is_bright.mean() <= 0.5 else ~is_bright).astype(np.uint8)


if __name__ == "__main__":
    main()
