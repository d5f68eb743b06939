"""Teachers: where the MFM targets come from.

`EMATeacher` is the paper's moving-averaged backbone. It sees real pixels, never mask tokens: either
the patches hidden from the student (paper, figure 1) or the full image.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from models.hivit import HiViT
from models.tokens import gather_tokens

TeacherInput = Literal["hidden", "full"]


class EMATeacher(nn.Module):
    """Exponential moving average of the student backbone; never receives a gradient.

    Args:
        student: the backbone to follow; copied, so teacher and student start equal.
        teacher_input: "hidden" encodes only the patches hidden from the student (cheaper by the
            visible share), "full" encodes the whole image and keeps the hidden positions.
    """

    def __init__(self, student: HiViT, *, teacher_input: TeacherInput = "hidden") -> None:
        super().__init__()
        self.backbone = copy.deepcopy(student).requires_grad_(False).eval()
        self.teacher_input = teacher_input

    def train(self, mode: bool = True) -> EMATeacher:
        """Stay in evaluation mode whatever the caller asks: targets must not be dropped out."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, ids_masked: Tensor) -> dict[int, Tensor]:
        """Stage features at the masked positions.

        Args:
            images: (B, C, H, W), normalised.
            ids_masked: (B, M) raster indices of the patches hidden from the student.

        Returns:
            {4: (B, M, 4, 4, D/4), 8: (B, M, 2, 2, D/2), 16: (B, M, 1, 1, D)}.
        """
        if self.teacher_input == "hidden":
            return self.backbone(images, ids_masked)
        return {s: gather_tokens(f, ids_masked) for s, f in self.backbone(images).items()}

    @torch.no_grad()
    def update(self, student: HiViT, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter."""
        mine: list[Tensor] = list(self.backbone.parameters())
        theirs = [p.detach() for p in student.parameters()]
        torch._foreach_lerp_(mine, theirs, 1.0 - momentum)
