"""Recipes: complete named runs. A variation is a dotted override, on the command line or in code.

The paper's numbers are those of the released pre-training: pixel (PRETRAIN.md, main_pretrain.py)
and CLIP (itpn_clip/README.md, run_itpn_pretraining.py);
`mfm_weight=0.3` and everything about the teacher is ours, `--objective.mfm-weight 0` is the public
pixel objective.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import OptimConfig, RunConfig, TrackingConfig
from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainConfig,
    PretrainScalingConfig,
)

DEMO_DATA = "runs/demo-data"


def debug() -> PretrainConfig:
    """A one-second model for a few steps on 64-pixel crops; for tests and for trying things."""
    return PretrainConfig(
        run=RunConfig(
            name="debug",
            log_every_steps=1,
            checkpoint_every_steps=10,
            evaluate_every_steps=10,
            picture_every_steps=20,
        ),
        data=DataConfig(
            path=f"{DEMO_DATA}/train",
            image_size=64,
            global_batch_size=16,
            num_eval_crops=32,
            prefetch_batches=2,
        ),
        model=ModelConfig(name="itpn_debug"),
        objective=ObjectiveConfig(norm_pix_loss=False, teacher_momentum=0.99),
        optim=OptimConfig(lr=2e-3, num_steps=20, warmup_ratio=0.1),
        scaling=PretrainScalingConfig(max_batch_size_per_worker=16),
        tracking=TrackingConfig(system_metrics=False),
    )


def demo() -> PretrainConfig:
    """A small iTPN on 16 real photographs in under five minutes on two CPU cores."""
    return PretrainConfig(
        run=RunConfig(
            name="demo",
            log_every_steps=10,
            checkpoint_every_steps=150,
            evaluate_every_steps=250,
            picture_every_steps=250,
        ),
        data=DataConfig(
            path=f"{DEMO_DATA}/train",
            val_path=f"{DEMO_DATA}/val",
            image_size=160,
            global_batch_size=16,
            crop_scale=(0.08, 0.5),
            num_eval_crops=256,
        ),
        model=ModelConfig(name="itpn_nano_patch16_224"),
        objective=ObjectiveConfig(norm_pix_loss=False, teacher_momentum=0.99),
        # At 2e-3 the pixels come out better and the features transfer worse (docs/experiments.md).
        optim=OptimConfig(lr=5e-4, num_steps=500, warmup_ratio=0.05, clip_grad_norm=1.0),
        scaling=PretrainScalingConfig(num_workers=2),
    )


def pixel_base_in1k() -> PretrainConfig:
    """iTPN-B on ImageNet-1k as the paper trains it: 1600 epochs at batch 4096 on 64 GPUs."""
    return PretrainConfig(
        run=RunConfig(name="pixel-base-in1k"),
        data=DataConfig(path="data/imagenet/train", num_cpus=512),
        model=ModelConfig(name="itpn_base_patch16_224"),
        optim=OptimConfig(num_epochs=1600),
        scaling=PretrainScalingConfig(num_workers=64, use_gpu=True),
    )


def pixel_large_in1k() -> PretrainConfig:
    """iTPN-L on ImageNet-1k as the paper trains it: 1600 epochs at batch 4096 on 64 GPUs."""
    return PretrainConfig(
        run=RunConfig(name="pixel-large-in1k"),
        data=DataConfig(path="data/imagenet/train", num_cpus=512),
        model=ModelConfig(name="itpn_large_patch16_224"),
        optim=OptimConfig(num_epochs=1600),
        scaling=PretrainScalingConfig(num_workers=64, use_gpu=True),
    )


def _clip_in1k(size: str, teacher: str, drop_path_rate: float) -> PretrainConfig:
    return PretrainConfig(
        run=RunConfig(name=f"clip-{size}-in1k"),
        data=DataConfig(
            path="data/imagenet/train",
            num_cpus=512,
            global_batch_size=2048,
            crop_scale=(0.08, 1.0),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        model=ModelConfig(name=f"itpn_{size}_clip_patch16_224", drop_path_rate=drop_path_rate),
        objective=ObjectiveConfig(
            kind="distillation",
            teacher=f"timm/{teacher}",
            teacher_projection=True,
            mask_type="block",
            mask_ratio=0.382,  # 75 of 196 patches
        ),
        optim=OptimConfig(
            lr=1.5e-3, min_lr=1e-5, betas=(0.9, 0.98), num_epochs=300, warmup_ratio=5 / 300
        ),
        scaling=PretrainScalingConfig(num_workers=64, use_gpu=True, max_batch_size_per_worker=32),
    )


def clip_base_in1k() -> PretrainConfig:
    """iTPN-B learning CLIP-B/16 on ImageNet-1k, as released but for the leak, the teacher's
    scaling and colour jitter: 300 epochs at batch 2048 on 64 GPUs."""
    return _clip_in1k("base", "vit_base_patch16_clip_quickgelu_224.openai", 0.1)


def clip_large_in1k() -> PretrainConfig:
    """iTPN-L learning CLIP-L/14, which sees 196 pixels and so has the student's 14 x 14 tokens, as
    released but for the same: 300 epochs at batch 2048 on 64 GPUs."""
    config = _clip_in1k("large", "vit_large_patch14_clip_quickgelu_224.openai", 0.2)
    return apply_overrides(config, {"objective.teacher_size": 196})


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "debug": debug,
    "demo": demo,
    "pixel-base-in1k": pixel_base_in1k,
    "pixel-large-in1k": pixel_large_in1k,
    "clip-base-in1k": clip_base_in1k,
    "clip-large-in1k": clip_large_in1k,
}
