"""Masked modelling of pixels and features, the paper's objective and the default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.hivit import STRIDES
from models.pretraining import create_pretraining_model
from models.teacher import Teacher
from models.tokens import split_tokens
from pipeline.encoder_settings import encoder_kwargs
from pipeline.objective import Evaluation
from pipeline.pictures import reconstruction_picture
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_evaluation import PretrainEvaluation


class MaskedObjective:
    """MIM and MFM (arXiv:2211.12735; an `objective.Objective`)."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    @property
    def loss_names(self) -> tuple[str, ...]:
        """total, MIM, MFM by stride."""
        return ("loss", "loss_mim", *(f"loss_mfm{s}" for s in STRIDES if self.config.has_teacher))

    def build(self, teacher: Teacher | None) -> nn.Module:
        """See `Objective`; the feature heads are as wide as a frozen teacher's features."""
        config, objective = self.config, self.config.objective
        return create_pretraining_model(
            config.model.name,
            img_size=config.data.image_size,
            norm_pix_loss=objective.norm_pix_loss,
            mfm_weight=objective.mfm_weight,
            mfm_loss=objective.mfm_loss,
            target_dims=None if teacher is None else teacher.stage_dims,
            **encoder_kwargs(config.model),
        )

    def losses(
        self,
        model: nn.Module,
        teacher: Teacher | None,
        images: Tensor,
        mask: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        """See `Objective`."""
        features = None
        if teacher is not None:
            _, ids_masked = split_tokens(mask, self.config.num_visible)
            features = teacher(images, ids_masked)
        losses = model(images, mask, features, self.config.num_visible, weight)
        mfm = [losses.mfm[stride] for stride in STRIDES if losses.mfm]
        return torch.stack([losses.total, losses.mim, *mfm])

    def evaluation(self, model: Any, teacher: Teacher | None) -> Evaluation:
        """See `Objective`."""
        return PretrainEvaluation(model, teacher, self.config.data.std)

    def picture(self, model: Any, teacher: Teacher | None, images: Tensor, mask: Tensor) -> bytes:
        """See `Objective`."""
        data = self.config.data
        return reconstruction_picture(model, teacher, images, mask, mean=data.mean, std=data.std)

    def headline(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """See `Objective`."""
        return {
            "mim_loss_over_baseline": metrics["val/mim_loss_over_baseline"],
            "mfm_loss_over_baseline": metrics.get("val/mfm_loss_over_baseline"),
        }
