"""Feature distillation as an objective of a run: `--objective.kind distillation`.

What the official CLIP models were trained with (see `models/feature_distillation.py`): a frozen
teacher's tokens, normalised over channels, are predicted at every position. Surprising: held-out
figures count *hidden* patches alone. At visible ones there is nothing to guess, and as released,
with `mask_at="stage3"`, the main head can read hidden pixels too: its figure is then no measure of
what was learnt.
"""

# B batch, N patches, M masked patches, T teacher channels

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.feature_distillation import (
    FeatureDistillationModel,
    create_feature_distillation_model,
)
from models.teacher import FrozenBackbone, FrozenTeacher
from models.tokens import gather_tokens, split_tokens
from pipeline.encoder_settings import encoder_kwargs
from pipeline.objective import Evaluation
from pipeline.pictures import distillation_picture
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_evaluation import ratio

Tower = FrozenTeacher | FrozenBackbone
HEADS = ("main", "auxiliary")


class DistillationObjective:
    """Smooth L1 of two heads against a frozen teacher (an `objectives.Objective`)."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    @property
    def loss_names(self) -> tuple[str, ...]:
        """total, main head, auxiliary head."""
        return ("loss", *(f"loss_{head}" for head in HEADS))

    def build(self, teacher: Tower) -> nn.Module:
        """See `Objective`."""
        config = self.config
        return create_feature_distillation_model(
            config.model.name,
            teacher_dim=teacher.stage_dims[16],
            img_size=config.data.image_size,
            mask_at=config.objective.mask_at,
            **encoder_kwargs(config.model),
        )

    def losses(
        self,
        model: nn.Module,
        teacher: Tower,
        images: Tensor,
        mask: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        """See `Objective`."""
        return torch.stack(list(model(images, mask, targets(teacher, images), weight)))

    def evaluation(self, model: FeatureDistillationModel, teacher: Tower) -> Evaluation:
        """See `Objective`."""
        return DistillationEvaluation(model, teacher)

    def picture(
        self, model: FeatureDistillationModel, teacher: Tower, images: Tensor, mask: Tensor
    ) -> bytes:
        """See `Objective`."""
        data = self.config.data
        with torch.no_grad():
            predicted = model.predict(images, mask).main
        return distillation_picture(
            images,
            mask,
            targets(teacher, images),
            predicted,
            patch_size=model.encoder.backbone.patch_size,
            mean=data.mean,
            std=data.std,
        )

    def headline(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """See `Objective`."""
        return {f"{h}_loss_over_baseline": metrics[f"val/{h}_loss_over_baseline"] for h in HEADS}


def targets(teacher: Tower, images: Tensor) -> Tensor:
    """The teacher's tokens with zero mean and unit variance over channels, (B, N, T) float32."""
    tokens = teacher.tokens(images).float()
    return F.layer_norm(tokens, tokens.shape[-1:])


class DistillationEvaluation:
    """Squared errors at hidden patches, against the mean token over all crops and positions.

    Args:
        model: the student.
        teacher: the frozen one.
    """

    def __init__(self, model: FeatureDistillationModel, teacher: Tower) -> None:
        self.model = model
        self.teacher = teacher
        device = next(model.parameters()).device
        self.sums: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros((), dtype=torch.float64, device=device)
        )

    @torch.no_grad()
    def add(self, images: Tensor, mask: Tensor) -> None:
        """Add a batch: images (B, C, H, W) normalised, mask (B, N) True = masked."""
        _, ids_masked = split_tokens(mask)
        target = gather_tokens(targets(self.teacher, images), ids_masked)  # (B, M, T)
        exact = target.double().flatten(0, 1)
        self._sum("count", torch.tensor(len(exact)))
        self._sum("target", exact.sum(0))
        self._sum("square", exact.square().sum(0))
        for head, tokens in zip(HEADS, self.model.predict(images, mask), strict=True):
            predicted = gather_tokens(tokens, ids_masked).float()
            self._sum(head, F.mse_loss(predicted, target, reduction="sum"))

    def _sum(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value.to(self.sums[key])

    def result(self) -> dict[str, float]:
        """Metrics over all crops of all workers: val/baseline_tokens, and of both heads val/loss_*
        (squared, at hidden patches) and val/*_loss_over_baseline."""
        if dist.is_initialized():
            for key in sorted(self.sums):
                dist.all_reduce(self.sums[key])
        s = self.sums
        mean = s["target"] / s["count"]
        variance = s["square"] / s["count"] - mean.square()
        baseline = float(variance.mean())
        metrics = {"val/baseline_tokens": baseline}
        for head in HEADS:
            loss = float(s[head] / s["count"] / variance.numel())
            metrics[f"val/loss_{head}"] = loss
            metrics[f"val/{head}_loss_over_baseline"] = ratio(loss, baseline)
        return metrics
