"""Configuration of a fine-tuning run: one config class a task, on the sections every run has.

Surprising: where the weights come from has to be said. `--init RUN` loads a pre-trained run,
`--init scratch` trains from random weights; nothing falls back to the latter by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

from models.variants import get_variant
from pipeline.config import (
    EncoderConfig,
    InitConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainingConfig,
    require_choice,
    require_not_negative,
    require_positive,
)

Task = Literal["classify", "detect", "segment"]
Schedule = Literal["cosine", "step", "poly"]
DetectorKind = Literal["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "cascade_rcnn"]
BoxLoss = Literal["giou", "smooth_l1"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledDataConfig(SampleConfig):
    """Prepared data sets with annotations (see docs/data.md) and how a sample is made of them."""

    label_fraction: float = 1.0
    """Share of the training images that is used, drawn by run.seed: what few labels come to."""

    def __post_init__(self) -> None:
        for key in ("path", "val_path"):
            if not getattr(self, key):
                raise ValueError(
                    f"data.{key} is empty; give a prepared data set with annotations: "
                    f"--data.{key.replace('_', '-')} DIR"
                )
        if not 0 < self.label_fraction <= 1:
            raise ValueError(f"data.label_fraction={self.label_fraction} must lie in (0, 1]")
        SampleConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneModelConfig(EncoderConfig):
    """The network, without its head."""

    name: str = ""
    """A variant of models/variants.py; empty: the one of the run that --init names."""
    rel_pos_bias: bool = True
    """Relative position bias, zero at first, as official fine-tuning has it."""
    decomposed_rel_pos: bool = False
    """ViTDet's decomposed relative positions, zero at first, instead of the bias: as the official
    CLIP-L detector; they fit images of every size."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block."""

    def __post_init__(self) -> None:
        if self.name:
            get_variant(self.name)
        if self.rel_pos_bias and self.decomposed_rel_pos:
            raise ValueError(
                "model.rel_pos_bias and model.decomposed_rel_pos are two kinds of relative "
                "positions; switch one off, such as --model.no-rel-pos-bias"
            )
        EncoderConfig.__post_init__(self)  # not super(): slots make a new class of this one


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer-wise learning rates, and its schedule."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    layer_decay: float = 0.6
    """Factor of the learning rate from layer to layer, towards the stem; how often it applies is
    the task's rule (see pipeline/optim.py); 1: one learning rate for all."""
    official_quirks: bool = False
    """Reproduce the mistakes of the official layer-wise learning rates (see pipeline/optim.py)."""
    schedule: Schedule = "cosine"
    """After the warm-up: a cosine to min_lr, a tenth at each of lr_milestones, or linearly to
    min_lr (poly of power 1)."""
    lr_milestones: tuple[float, ...] = (0.75, 11 / 12)
    """Shares of the steps at which the 'step' schedule divides the learning rate by 10."""
    warmup_steps: int | None = None
    """Steps of rising learning rate; overrules warmup_ratio."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated and kept; 0: none."""

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        require_choice("optim.schedule", self.schedule, get_args(Schedule))
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay={self.layer_decay} must lie in (0, 1]; 1: none")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay={self.ema_decay} must lie in [0, 1); 0: none")
        if any(not 0 < m < 1 for m in self.lr_milestones):
            raise ValueError(f"optim.lr_milestones={self.lr_milestones} must lie in (0, 1)")
        require_not_negative("optim.warmup_steps", self.warmup_steps or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(TrainingConfig):
    """What all fine-tuning runs have."""

    task: ClassVar[Task]
    run: RunConfig
    init: InitConfig = field(default_factory=InitConfig)
    data: LabelledDataConfig
    model: FinetuneModelConfig = field(default_factory=FinetuneModelConfig)
    optim: FinetuneOptimConfig

    @property
    def model_name(self) -> str:
        """The variant that is trained."""
        return self.model.name

    def num_used(self, num_samples: int) -> int:
        """Training samples that data.label_fraction leaves."""
        return max(1, round(self.data.label_fraction * num_samples))


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of classification beyond crop and flip; numbers as in timm."""

    rand_augment: str = ""
    """timm's description of a RandAugment policy, such as rand-m9-mstd0.5-inc1; empty: none."""
    erase_prob: float = 0.0
    """Probability of erasing a random rectangle with noise."""
    mixup: float = 0.0
    """Alpha of mixup; 0: none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0: none."""
    mix_prob: float = 1.0
    """Probability that a micro-batch is mixed at all."""
    mix_switch_prob: float = 0.5
    """Probability of cutmix rather than mixup where both are on."""
    label_smoothing: float = 0.0
    """Share of a target spread over all classes."""

    def __post_init__(self) -> None:
        for key in ("erase_prob", "mix_prob", "mix_switch_prob", "label_smoothing"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"augment.{key}={getattr(self, key)} must lie in [0, 1]")
        for key in ("mixup", "cutmix"):
            require_not_negative(f"augment.{key}", getattr(self, key))
        if self.rand_augment and not self.rand_augment.startswith("rand"):
            raise ValueError(
                f"augment.rand_augment='{self.rand_augment}' is no RandAugment policy; use e.g. "
                "rand-m9-mstd0.5-inc1, or '' for none"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig(FinetuneConfig):
    """A complete classification run."""

    task: ClassVar[Task] = "classify"
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    eval_crop_ratio: ClassVar[float] = 224 / 256
    """An evaluation image is resized to image_size / ratio and cropped in its middle; above 224
    pixels it is not cropped (itpn_pixel/util/datasets.py:51-65)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig:
    """Heads and image sizes of detection."""

    kind: DetectorKind = "mask_rcnn"
    """Heads; those named mask need box masks in the data."""
    box_loss: BoxLoss = "giou"
    """Loss of the box head: GIoU times 10 (official) or torchvision's smooth L1."""
    min_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Short sides in pixels; one is drawn for each image in training."""
    max_size: int = 1333
    """Limit of the long side in pixels."""
    eval_min_size: int = 800
    """Short side in pixels in evaluation."""
    crop_prob: float = 0.5
    """Probability of a random crop before resizing (DETR's second branch)."""
    head_dim: int = 256
    """Channels of the convolutions of the box and mask heads."""
    fc_dim: int = 1024
    """Width of the box head's linear layer."""
    samples_per_image: int = 512
    """Regions of an image the box head learns from."""

    def __post_init__(self) -> None:
        require_choice("detector.kind", self.kind, get_args(DetectorKind))
        require_choice("detector.box_loss", self.box_loss, get_args(BoxLoss))
        if not self.min_sizes or not 0 <= self.crop_prob <= 1:
            raise ValueError(
                f"detector.min_sizes={self.min_sizes} must hold a size and "
                f"detector.crop_prob={self.crop_prob} lie in [0, 1]"
            )
        for key in ("max_size", "eval_min_size", "head_dim", "fc_dim", "samples_per_image"):
            require_positive(f"detector.{key}", getattr(self, key))
        for size in self.min_sizes:
            require_positive("detector.min_sizes", size)

    @property
    def with_masks(self) -> bool:
        """Whether masks are learnt."""
        return "mask" in self.kind


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig(FinetuneConfig):
    """A complete run of detection and instance segmentation."""

    task: ClassVar[Task] = "detect"
    detector: DetectorConfig = field(default_factory=DetectorConfig)

    @property
    def sample_bytes(self) -> int:
        """About what a decoded sample takes, in bytes."""
        return 3 * self.detector.max_size * self.detector.eval_min_size


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterConfig:
    """Head and image sizes of semantic segmentation."""

    channels: int = 768
    """Width of the UPerHead."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """An image is resized to data.image_size times a factor from this range, on its short side, and
    then cropped to data.image_size."""
    max_class_ratio: float = 0.75
    """Crops in which one class covers more of the labelled pixels are drawn again, ten times."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue (SSD's distortion)."""
    eval_short_side: int = 512
    """Short side in pixels images are resized to in evaluation; 0: their own size."""
    window: int = 512
    """Side of the sliding window in evaluation, in pixels; 0: the whole image at once."""
    stride: int = 341
    """Step of the sliding window in pixels."""
    reduce_zero_label: bool = False
    """Label 0 means no class (ADE20K) and the others count from 1."""

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if not 0 < low <= high:
            raise ValueError(f"segmenter.scale_range={self.scale_range} must be 0 < min <= max")
        if not 0 < self.max_class_ratio <= 1:
            raise ValueError(
                f"segmenter.max_class_ratio={self.max_class_ratio} must lie in (0, 1]; 1: any crop"
            )
        for key in ("eval_short_side", "window"):
            require_not_negative(f"segmenter.{key}", getattr(self, key))
        for key in ("channels", "stride"):
            require_positive(f"segmenter.{key}", getattr(self, key))
        if self.window and self.stride > self.window:
            raise ValueError(
                f"segmenter.stride={self.stride} exceeds segmenter.window={self.window}: windows "
                "must leave no gap"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentConfig(FinetuneConfig):
    """A complete run of semantic segmentation."""

    task: ClassVar[Task] = "segment"
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)

    def __post_init__(self) -> None:
        FinetuneConfig.__post_init__(self)
        if self.batch_size_per_worker < 2:
            raise ValueError(
                f"micro-batches of {self.batch_size_per_worker} image are too small for the batch "
                "norm of the segmentation head; raise scaling.max_batch_size_per_worker or "
                f"data.global_batch_size={self.data.global_batch_size}"
            )


ConfigOfTask = TypeVar("ConfigOfTask", bound=FinetuneConfig)
CONFIG_CLASSES: dict[Task, type[FinetuneConfig]] = {
    "classify": ClassifyConfig,
    "detect": DetectConfig,
    "segment": SegmentConfig,
}
_SECTIONS: dict[Task, str] = {"classify": "augment", "detect": "detector", "segment": "segmenter"}


def task_of(values: dict[str, Any] | Iterable[str]) -> Task | None:
    """Which task a config dict belongs to; None when it is not one of fine-tuning."""
    sections = set(values)
    return next((task for task, section in _SECTIONS.items() if section in sections), None)
