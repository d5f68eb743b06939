"""Teachers: where the targets of masked feature modelling and of feature distillation come from.

`EMATeacher` is the paper's moving-averaged backbone. It sees real pixels, never mask tokens: either
the patches hidden from the student (paper, figure 1) or the full image. `FrozenTeacher` is any timm
model, `FrozenBackbone` an encoder of our own; both see the full image.

The surprising fact: a frozen teacher has one map of features, not three stages. It is the target of
every stage, resized to the cells of each (design: ours).
"""

# B batch, N patches, M masked patches, T teacher channels, c cells per token side, h x w token grid

from __future__ import annotations

import copy
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.hivit import STRIDES, HiViT
from models.layers import CELLS
from models.tokens import gather_tokens

TeacherInput = Literal["hidden", "full"]


class Teacher(Protocol):
    """What gives targets. Never trained by gradients, always in evaluation mode."""

    stage_dims: dict[int, int]
    """Channels of the targets by stride."""

    def __call__(self, images: Tensor, ids_masked: Tensor) -> dict[int, Tensor]:
        """Features at the masked positions.

        Args:
            images: (B, C, H, W), normalised as for the student.
            ids_masked: (B, M) raster indices of the patches hidden from the student.

        Returns:
            {stride: (B, M, c, c, d)} for strides 4, 8, 16 with c = 4, 2, 1 cells.
        """
        ...


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
        self.stage_dims = student.stage_dims

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


class FrozenBackbone(nn.Module):
    """A backbone of our own that was trained before: its three stages are the targets.

    Args:
        backbone: taken over, not copied; sees whole images normalised as the student's.
    """

    def __init__(self, backbone: HiViT) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.stage_dims = backbone.stage_dims

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, ids_masked: Tensor) -> dict[int, Tensor]:
        """See `Teacher`."""
        return {s: gather_tokens(f, ids_masked) for s, f in self.backbone(images).items()}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Stage 16 at every position, (B, N, D)."""
        return self.backbone(images)[16].flatten(2)


class FrozenTeacher(nn.Module):
    """A timm model whose last feature map is the target.

    Args:
        trunk: with timm's `forward_intermediates`, such as a ViT, ConvNeXt or EfficientNet.
        image_size: (height, width) in pixels the trunk sees; images are resized to it.
        mean, std: channel statistics the trunk wants, in [0, 1].
        student_mean, student_std: those the images given to it are normalised with.
        patch_size: side of the student's tokens in pixels: the grid of the targets.
        project: send the tokens through the trunk's head, which in a CLIP tower is the projection
            into the space of the texts, as the released objective does.
        released_scaling: repeat a mistake of the released code (itpn_clip/clip/create_clip.py:46):
            it maps images from [0, 1] to [0.5, 1] before it normalises them.

    Raises:
        ValueError: the trunk has no `forward_intermediates`, or no head to project with.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        image_size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        student_mean: tuple[float, ...],
        student_std: tuple[float, ...],
        patch_size: int = 16,
        project: bool = False,
        released_scaling: bool = False,
    ) -> None:
        super().__init__()
        if not hasattr(trunk, "forward_intermediates"):
            raise ValueError(
                f"{type(trunk).__name__} has no forward_intermediates; choose another timm model"
            )
        self.trunk: Any = trunk.requires_grad_(False).eval()
        self.image_size = image_size
        self.patch_size = patch_size
        self.released_scaling = released_scaling
        self.head = getattr(trunk, "head", None) if project else None
        if project and not isinstance(self.head, nn.Linear):
            raise ValueError(
                f"{type(trunk).__name__} has no projection (its head is {self.head}); give "
                "num_classes, or do without"
            )
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        for name, values in (("student_mean", student_mean), ("student_std", student_std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.dim = self._probe()
        self.stage_dims = dict.fromkeys(STRIDES, self.dim)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode whatever the caller asks: batch norms must not move."""
        return super().train(False)

    def _probe(self) -> int:
        """Channels of the map: only a forward pass knows, whatever the trunk."""
        device = next(self.trunk.parameters()).device
        images = torch.zeros(1, self.get_buffer("mean").shape[1], *self.image_size, device=device)
        with torch.no_grad():
            return self._map(images).shape[1]

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as for the student -> (B, C, h, w) as the trunk wants them."""
        x = images * self.get_buffer("student_std") + self.get_buffer("student_mean")
        if tuple(x.shape[-2:]) != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bicubic", antialias=True)
        if self.released_scaling:
            x = (x + 1) * 127.5 / 255
        return (x - self.get_buffer("mean")) / self.get_buffer("std")

    def _map(self, x: Tensor) -> Tensor:
        x = self.trunk.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        if self.head is None:
            return x
        return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as for the student -> (B, T, ., .), the map as the trunk gives it."""
        return self._map(self.preprocess(images))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Features at every patch of the student, (B, N, T)."""
        h, w = (side // self.patch_size for side in images.shape[-2:])
        return _resized(self.feature_map(images), (h, w)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def forward(self, images: Tensor, ids_masked: Tensor) -> dict[int, Tensor]:
        """See `Teacher`."""
        h, w = (side // self.patch_size for side in images.shape[-2:])
        features = self.feature_map(images)
        targets = {}
        for stride in STRIDES:
            c = CELLS * STRIDES[0] // stride
            x = _resized(features, (h * c, w * c)).unflatten(2, (h, c)).unflatten(4, (w, c))
            x = x.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)  # (B, N, c, c, T)
            targets[stride] = gather_tokens(x, ids_masked)
        return targets


def _resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, T, ., .) -> (B, T, *size), bilinearly; averaging where it shrinks."""
    if tuple(features.shape[-2:]) == size:
        return features
    return F.interpolate(features.float(), size, mode="bilinear", antialias=True)
