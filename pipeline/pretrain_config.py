"""Configuration of a pre-training run: what it adds to the sections every run has.

Surprising: `objective.teacher` decides what features are predicted, `objective.kind` how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from models.variants import get_variant
from pipeline.config import (
    SCRATCH,
    EncoderConfig,
    InitConfig,
    SampleConfig,
    ScalingConfig,
    TrainingConfig,
    require_choice,
    require_not_negative,
    require_positive,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(SampleConfig):
    """Images and how a sample of pre-training is made of them."""

    image_column: str = "image"
    """Column of Parquet files without a manifest that holds the encoded bytes, plain or in a
    Hugging Face {bytes, path} struct."""
    num_eval_crops: int = 1024
    """Held-out crops an evaluation looks at."""
    num_knn_images: int = 1000
    """Images of each of path and val_path, at most, for the accuracy of nearest neighbours at every
    evaluation; only where both are prepared with labels. 0: none."""
    synthetic: bool = False
    """Feed the same random pixels again and again: how fast training is when data cost nothing."""

    def __post_init__(self) -> None:
        if not self.path and not self.synthetic:
            raise ValueError(
                "data.path is empty; give a folder of images or Parquet: --data.path DIR"
            )
        SampleConfig.__post_init__(self)  # not super(): slots make a new class of this one
        require_positive("data.num_eval_crops", self.num_eval_crops)
        require_not_negative("data.num_knn_images", self.num_knn_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(EncoderConfig):
    """The network."""

    name: str = "itpn_base_patch16_224"
    """A variant of models/variants.py."""

    def __post_init__(self) -> None:
        get_variant(self.name)
        EncoderConfig.__post_init__(self)  # not super(): slots make a new class of this one


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is minimised."""

    kind: Literal["masked", "distillation"] = "masked"
    """MIM and MFM, the paper's; or the objective released for CLIP, which predicts a frozen
    teacher's tokens at every position, from the neck and from within stage 3."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the student."""
    mask_type: Literal["random", "block"] = "random"
    """Patches hidden independently of each other (MAE), or in rectangles (BEiT)."""
    norm_pix_loss: bool = True
    """Predict pixels normalised per patch."""
    mfm_weight: float = 0.3
    """Weight of the summed feature losses; 0 is the public pixel objective."""
    mfm_loss: Literal["mse", "smooth_l1"] = "mse"
    """Regression loss of the features."""
    teacher_input: Literal["hidden", "full"] = "hidden"
    """What the teacher sees: the patches hidden from the student, or the whole image."""
    teacher_momentum: float = 0.996
    """Momentum of the moving average at the first step, rising to 1 on a cosine."""
    teacher: str = "ema"
    """Whose features are predicted: 'ema', a moving average of the student; 'timm/NAME', a frozen
    timm model such as timm/vit_base_patch16_clip_quickgelu_224.openai; or a pre-training run, one
    of its checkpoints or a weights file, frozen."""
    teacher_weights: str = ""
    """Weights file of a timm teacher; empty: timm downloads them, on the driver."""
    teacher_size: int = 0
    """Side in pixels of the images a timm teacher sees; 0: its own."""
    teacher_projection: bool = False
    """Send the teacher's tokens through its head: in a CLIP tower the space of the texts, as the
    released objective does."""
    released_teacher_scaling: bool = False
    """Repeat a mistake of the released code, which shows the teacher images in [0.5, 1]."""
    mask_at: Literal["stage3", "stem"] = "stem"
    """Where distillation puts the mask tokens: before anything sees the pixels, or as late as
    released, when the neck can still read them."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"objective.mask_ratio={self.mask_ratio} must lie in (0, 1); use 0.75")
        if self.mfm_weight < 0:
            raise ValueError(
                f"objective.mfm_weight={self.mfm_weight} must be >= 0; 0 turns MFM off"
            )
        require_choice("objective.kind", self.kind, ("masked", "distillation"))
        require_choice("objective.mask_at", self.mask_at, ("stage3", "stem"))
        self._check_teacher()
        require_choice("objective.mask_type", self.mask_type, ("random", "block"))
        require_choice("objective.mfm_loss", self.mfm_loss, ("mse", "smooth_l1"))
        require_choice("objective.teacher_input", self.teacher_input, ("hidden", "full"))
        if not 0 <= self.teacher_momentum <= 1:
            raise ValueError(
                f"objective.teacher_momentum={self.teacher_momentum} must lie in [0, 1]; use 0.996"
            )

    def _check_teacher(self) -> None:
        if not self.teacher:
            raise ValueError("objective.teacher is empty; use 'ema', 'timm/NAME' or a run's folder")
        if self.kind == "distillation" and self.teacher == "ema":
            raise ValueError(
                "objective.kind='distillation' needs a frozen teacher: --objective.teacher "
                "timm/NAME, or a pre-training run"
            )
        require_not_negative("objective.teacher_size", self.teacher_size)
        if not self.teacher.startswith("timm/"):
            for key in ("teacher_weights", "teacher_size", "teacher_projection"):
                if getattr(self, key):
                    raise ValueError(
                        f"objective.{key}={getattr(self, key)!r} is of a timm teacher, but "
                        f"objective.teacher='{self.teacher}'; leave it out"
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainScalingConfig(ScalingConfig):
    """Training workers, and what makes a large model fast or small."""

    bf16: Literal["gpu", "always", "never"] = "gpu"
    """Where to compute in bfloat16 autocast, with float32 weights and losses. CPUs with AVX512-BF16
    or AMX gain from "always"; others lose."""
    compile: bool = False
    """Compile student and moving average (torch.compile): faster steps after a longer start."""
    grad_checkpointing: bool = False
    """Compute the trunk's activations once more in the backward pass: less memory, slower steps."""
    sharding: Literal["none", "full"] = "none"
    """What each of several workers holds: all weights, gradients and moments of the optimiser
    (DDP), or a share of them (FSDP2), for models that do not fit otherwise."""

    def __post_init__(self) -> None:
        ScalingConfig.__post_init__(self)  # not super(): slots make a new class of this one
        require_choice("scaling.bf16", self.bf16, ("gpu", "always", "never"))
        require_choice("scaling.sharding", self.sharding, ("none", "full"))
        if self.sharding == "full" and self.min_workers < self.max_workers:
            raise ValueError(
                f"scaling.sharding='full' needs a fixed number of workers, not "
                f"scaling.num_workers={self.num_workers}: at other sizes some would have more "
                "micro-batches than others and wait for ever; give one number"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(TrainingConfig):
    """A complete pre-training run."""

    data: DataConfig
    scaling: PretrainScalingConfig = field(default_factory=PretrainScalingConfig)
    init: InitConfig = field(default_factory=lambda: InitConfig(path=SCRATCH))
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        workers = self.scaling.max_workers
        if self.data.num_eval_crops < workers:
            raise ValueError(
                f"data.num_eval_crops={self.data.num_eval_crops} leaves some of "
                f"scaling.num_workers={workers} without a crop; use at least {workers}"
            )
        if self.num_visible < 1:
            raise ValueError(
                f"objective.mask_ratio={self.objective.mask_ratio} leaves no visible patch of the "
                f"{self.data.num_patches} of a {self.data.image_size}-pixel image; lower it"
            )

    @property
    def model_name(self) -> str:
        """The variant that is trained."""
        return self.model.name

    @property
    def has_teacher(self) -> bool:
        """Whether features are predicted at all."""
        return self.objective.kind == "distillation" or self.objective.mfm_weight > 0

    @property
    def num_visible(self) -> int:
        """Visible patches per image, rounded down as the official code does."""
        return int(self.data.num_patches * (1 - self.objective.mask_ratio))
