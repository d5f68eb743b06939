"""What every way to pre-train has: `masked_modeling.py` and `distillation.py` are two of them.

Surprising: the losses of a micro-batch are one tensor, total first, because they stay on the device
between log steps.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from pipeline.pretrain_config import PretrainConfig


class Evaluation(Protocol):
    """Sums over held-out crops."""

    def add(self, images: Tensor, mask: Tensor) -> None:
        """Add a batch: images (B, C, H, W) normalised, mask (B, N) True = masked."""
        ...

    def result(self) -> dict[str, float]:
        """Metrics over all crops of all workers."""
        ...


class Objective(Protocol):
    """One way to pre-train."""

    config: PretrainConfig

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses, total first."""
        ...

    def build(self, teacher: Any) -> nn.Module:
        """The model, with an attribute `encoder`; `teacher` is a frozen one, or None."""
        ...

    def losses(
        self,
        model: nn.Module,
        teacher: Any,
        images: Tensor,
        mask: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        """Float32 losses of a micro-batch in the order of `loss_names`.

        Args:
            model: the student, possibly wrapped for data parallelism.
            teacher: None where the objective has none.
            images: (B, C, H, W), normalised.
            mask: (B, N) bool, True = masked.
            weight: (B,) factors of the images' losses; None for ones.
        """
        ...

    def evaluation(self, model: Any, teacher: Any) -> Evaluation:
        """Empty sums."""
        ...

    def picture(self, model: Any, teacher: Any, images: Tensor, mask: Tensor) -> bytes:
        """PNG of what was asked and what the model answers, a row an image."""
        ...

    def headline(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The figures of the summary."""
        ...
