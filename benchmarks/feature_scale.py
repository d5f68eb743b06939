"""How large the features of an encoder are, and whether neighbours among them mean the same class.

    python benchmarks/feature_scale.py --images ablation/digits/raw-0/val RUN [RUN ...]

For each run folder: mean absolute value of stage 16, and the share of images whose nearest
neighbour among the others, over all tokens of stage 16, each normalised, is of the same class; the
same for random weights of the run's variant. Images: the first 30 of each class folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from models.itpn import ITPN, create_itpn
from models.weights import load_weights

IMAGES_PER_CLASS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="class folders of PNG")
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    for run in args.runs:
        config = json.loads((run / "config.json").read_text())
        data, name = config["data"], config["model"]["name"]
        images, labels = read_images(args.images, data["image_size"])
        images = normalize(images, data["mean"], data["std"])
        torch.manual_seed(0)
        encoder = create_itpn(name, img_size=data["image_size"]).eval()
        print(f"random {name}", *measure(encoder, images, labels))
        load_weights(encoder, run / "encoder.safetensors")
        print(run.name, *measure(encoder, images, labels))


def read_images(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """(N, 3, S, S) in [0, 1] and labels (N,)."""
    images, labels = [], []
    for label, of_class in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        for path in sorted(of_class.glob("*.png"))[:IMAGES_PER_CLASS]:
            image = Image.open(path).convert("RGB").resize((size, size))
            images.append(pil_to_tensor(image).float() / 255)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def measure(encoder: ITPN, images: Tensor, labels: Tensor) -> tuple[str, str]:
    """Mean absolute value, and accuracy of the nearest neighbour."""
    tokens = encoder.backbone(images)[16].flatten(2)  # (N, tokens, D)
    features = F.layer_norm(tokens, tokens.shape[2:]).flatten(1)
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    accuracy = (labels[distances.argmin(1)] == labels).float().mean()
    return f"size {tokens.abs().mean():.2f}", f"1-NN {accuracy:.2f}"


if __name__ == "__main__":
    main()
