"""Fine-tuning recipes: complete named runs, by task. A variation is a dotted override.

The paper's numbers are those of the released pixel models: itpn_pixel/README and main_finetune.py
for ImageNet-1k, det/configs/itpn for COCO, seg/configs/itpn for ADE20K. The `small-*` recipes are
ours, for a model of `pixel-demo` size on a CPU or one GPU.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import RunConfig, ScalingConfig, TrackingConfig
from pipeline.finetune_config import (
    AugmentConfig,
    ClassifyConfig,
    DetectConfig,
    DetectorConfig,
    FinetuneConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    LabelledDataConfig,
    SegmentConfig,
    SegmenterConfig,
    Task,
)

_PAPER_AUGMENT = AugmentConfig(
    rand_augment="rand-m9-mstd0.5-inc1",
    erase_prob=0.25,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
)
_TRACKING = TrackingConfig(experiment="itpn-finetune")


def _paper_in1k(
    name: str, model: str, *, base_lr: float, decay: float, drop_path: float, epochs: int
) -> ClassifyConfig:
    return ClassifyConfig(
        run=RunConfig(name=name, evaluate_every_steps=1251, picture_every_steps=12510),
        data=LabelledDataConfig(
            path="data/imagenet/train",
            val_path="data/imagenet/val",
            global_batch_size=1024,
            crop_scale=(0.08, 1.0),
            num_cpus=256,
        ),
        model=FinetuneModelConfig(name=model, drop_path_rate=drop_path),
        augment=_PAPER_AUGMENT,
        optim=FinetuneOptimConfig(
            base_lr=base_lr,
            min_lr=5e-6,
            num_epochs=epochs,
            warmup_ratio=5 / epochs,
            layer_decay=decay,
        ),
        scaling=ScalingConfig(num_workers=32, use_gpu=True, max_batch_size_per_worker=32),
        tracking=_TRACKING,
    )


def base_in1k() -> ClassifyConfig:
    """iTPN-B on ImageNet-1k as the paper fine-tunes it: 100 epochs at batch 1024 on 32 GPUs."""
    return _paper_in1k(
        "base-in1k", "itpn_base_patch16_224", base_lr=4e-4, decay=0.6, drop_path=0.15, epochs=100
    )


def large_in1k() -> ClassifyConfig:
    """iTPN-L on ImageNet-1k as the paper fine-tunes it: 50 epochs at batch 1024 on 32 GPUs."""
    return _paper_in1k(
        "large-in1k", "itpn_large_patch16_224", base_lr=1e-3, decay=0.55, drop_path=0.2, epochs=50
    )


def _paper_coco(
    name: str, model: str, *, lr: float, decay: float, drop_path: float, epochs: int
) -> DetectConfig:
    return DetectConfig(
        run=RunConfig(name=name, evaluate_every_steps=1832, picture_every_steps=1832),
        data=LabelledDataConfig(
            path="data/coco/train", val_path="data/coco/val", global_batch_size=64, num_cpus=64
        ),
        model=FinetuneModelConfig(name=model, rel_pos_bias=False, drop_path_rate=drop_path),
        optim=FinetuneOptimConfig(
            lr=lr, num_epochs=epochs, schedule="step", warmup_steps=500, layer_decay=decay
        ),
        scaling=ScalingConfig(num_workers=32, use_gpu=True, max_batch_size_per_worker=2),
        tracking=_TRACKING,
    )


def base_coco_1x() -> DetectConfig:
    """iTPN-B, Mask R-CNN on COCO, 12 epochs: official pixel_itpn_base_1x_ld090_dp005."""
    return _paper_coco(
        "base-coco-1x", "itpn_base_patch16_224", lr=2e-4, decay=0.9, drop_path=0.05, epochs=12
    )


def base_coco_3x() -> DetectConfig:
    """iTPN-B, Mask R-CNN on COCO, 36 epochs (the official 3x config trains 12 by mistake)."""
    return _paper_coco(
        "base-coco-3x", "itpn_base_patch16_224", lr=1.5e-4, decay=0.9, drop_path=0.3, epochs=36
    )


def large_coco_1x() -> DetectConfig:
    """iTPN-L, Mask R-CNN on COCO, 12 epochs: clip_itpn_large_1x_ld095_dp020 without its bias."""
    return _paper_coco(
        "large-coco-1x", "itpn_large_patch16_224", lr=2e-4, decay=0.95, drop_path=0.2, epochs=12
    )


def _paper_ade20k(name: str, model: str, *, decay: float, drop_path: float) -> SegmentConfig:
    return SegmentConfig(
        run=RunConfig(name=name, evaluate_every_steps=16_000, picture_every_steps=16_000),
        data=LabelledDataConfig(
            path="data/ade20k/train",
            val_path="data/ade20k/val",
            image_size=512,
            global_batch_size=16,
            num_cpus=64,
        ),
        model=FinetuneModelConfig(name=model, drop_path_rate=drop_path),
        segmenter=SegmenterConfig(reduce_zero_label=True),
        optim=FinetuneOptimConfig(
            lr=3e-5, num_steps=160_000, schedule="poly", warmup_steps=1500, layer_decay=decay
        ),
        scaling=ScalingConfig(num_workers=8, use_gpu=True, max_batch_size_per_worker=2),
        tracking=_TRACKING,
    )


def base_ade20k() -> SegmentConfig:
    """iTPN-B, UPerHead on ADE20K as the paper fine-tunes it: 160,000 steps at batch 16."""
    return _paper_ade20k("base-ade20k", "itpn_base_patch16_224", decay=0.9, drop_path=0.1)


def large_ade20k() -> SegmentConfig:
    """iTPN-L, UPerHead on ADE20K as the paper fine-tunes it: 160,000 steps at batch 16."""
    return _paper_ade20k("large-ade20k", "itpn_large_patch16_224", decay=0.95, drop_path=0.2)


def small_classify() -> ClassifyConfig:
    """A small model and few images: 64-pixel crops, batch 32, on a CPU."""
    return ClassifyConfig(
        run=_small_run("small-classify", num_steps=300),
        data=LabelledDataConfig(
            path="data/train",
            val_path="data/val",
            image_size=64,
            global_batch_size=32,
            crop_scale=(0.5, 1.0),
            flip_prob=0.0,
        ),
        model=FinetuneModelConfig(drop_path_rate=0.0),
        augment=AugmentConfig(label_smoothing=0.1),
        # Of few layers each one counts: at 0.75 the stem would learn 40 times slower than the head.
        optim=FinetuneOptimConfig(
            lr=1e-3, num_steps=300, warmup_ratio=0.1, layer_decay=0.95, clip_grad_norm=1.0
        ),
        tracking=TrackingConfig(experiment="itpn-finetune", system_metrics=False),
    )


def small_detect() -> DetectConfig:
    """A small model and few images: short side 160 pixels, batch 4, narrow heads, on a CPU."""
    return DetectConfig(
        run=_small_run("small-detect", num_steps=200),
        data=LabelledDataConfig(
            path="data/train", val_path="data/val", image_size=160, global_batch_size=4
        ),
        model=FinetuneModelConfig(rel_pos_bias=False, drop_path_rate=0.0),
        detector=DetectorConfig(
            min_sizes=(144, 160, 176),
            max_size=320,
            eval_min_size=160,
            crop_prob=0.0,
            # The heads are most of a step: at 64, 256 and 64 it takes three times as long.
            head_dim=32,
            fc_dim=128,
            samples_per_image=32,
        ),
        optim=FinetuneOptimConfig(
            lr=1e-3,
            num_steps=200,
            schedule="step",
            warmup_ratio=0.1,
            layer_decay=0.9,
            clip_grad_norm=1.0,
        ),
        scaling=ScalingConfig(max_batch_size_per_worker=4),
        tracking=TrackingConfig(experiment="itpn-finetune", system_metrics=False),
    )


def small_segment() -> SegmentConfig:
    """A small model and few images: 160-pixel crops, batch 8, narrow head, on a CPU."""
    return SegmentConfig(
        run=_small_run("small-segment", num_steps=200),
        data=LabelledDataConfig(
            path="data/train", val_path="data/val", image_size=160, global_batch_size=8
        ),
        model=FinetuneModelConfig(drop_path_rate=0.0),
        segmenter=SegmenterConfig(
            channels=64, scale_range=(0.75, 1.5), eval_short_side=160, window=0, stride=107
        ),
        optim=FinetuneOptimConfig(
            lr=1e-3,
            num_steps=200,
            schedule="poly",
            warmup_ratio=0.1,
            layer_decay=0.9,
            clip_grad_norm=1.0,
        ),
        tracking=TrackingConfig(experiment="itpn-finetune", system_metrics=False),
    )


def _small_run(name: str, *, num_steps: int) -> RunConfig:
    return RunConfig(
        name=name,
        checkpoint_every_steps=num_steps // 2,
        evaluate_every_steps=num_steps,
        picture_every_steps=num_steps,
    )


FINETUNE_RECIPES: dict[Task, dict[str, Callable[[], FinetuneConfig]]] = {
    "classify": {
        "small-classify": small_classify,
        "base-in1k": base_in1k,
        "large-in1k": large_in1k,
    },
    "detect": {
        "small-detect": small_detect,
        "base-coco-1x": base_coco_1x,
        "base-coco-3x": base_coco_3x,
        "large-coco-1x": large_coco_1x,
    },
    "segment": {
        "small-segment": small_segment,
        "base-ade20k": base_ade20k,
        "large-ade20k": large_ade20k,
    },
}
