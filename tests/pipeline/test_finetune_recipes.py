"""Fine-tuning recipes: the official numbers, and that every one of them is a whole config."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.cli import get_recipe, parse_recipe_command
from pipeline.config_values import (
    apply_overrides,
    config_from_dict,
    config_to_dict,
    flatten_config,
)
from pipeline.finetune import lr_at
from pipeline.finetune_config import (
    CONFIG_CLASSES,
    AugmentConfig,
    ClassifyConfig,
    FinetuneConfig,
    SegmenterConfig,
    Task,
    task_of,
)
from pipeline.finetune_recipes import FINETUNE_RECIPES

RECIPES: dict[str, tuple[Task, Callable[[], FinetuneConfig]]] = {
    name: (task, make)
    for task, recipes in FINETUNE_RECIPES.items()
    for name, make in recipes.items()
}
BASE, LARGE = "itpn_base_patch16_224", "itpn_large_patch16_224"
IMAGENET, COCO = 1_281_167, 117_266

# By hand from the official scripts: itpn_pixel/FINETUNE, det/configs/itpn, seg/configs/itpn.
OFFICIAL: dict[str, dict[str, Any]] = {
    "base-in1k": {
        "model.name": BASE,
        "optim.base_lr": 4e-4,
        "optim.layer_decay": 0.6,
        "model.drop_path_rate": 0.15,
        "optim.num_epochs": 100,
    },
    "large-in1k": {
        "model.name": LARGE,
        "optim.base_lr": 1e-3,
        "optim.layer_decay": 0.55,
        "model.drop_path_rate": 0.2,
        "optim.num_epochs": 50,
    },
    "base-coco-1x": {
        "model.name": BASE,
        "optim.lr": 2e-4,
        "optim.layer_decay": 0.9,
        "model.drop_path_rate": 0.05,
        "optim.num_epochs": 12,
    },
    "base-coco-3x": {
        "model.name": BASE,
        "optim.lr": 1.5e-4,
        "optim.layer_decay": 0.9,
        "model.drop_path_rate": 0.3,
        "optim.num_epochs": 36,
    },
    "large-coco-1x": {
        "model.name": LARGE,
        "optim.lr": 2e-4,
        "optim.layer_decay": 0.95,
        "model.drop_path_rate": 0.2,
        "optim.num_epochs": 12,
    },
    "base-ade20k": {
        "model.name": BASE,
        "optim.lr": 3e-5,
        "optim.layer_decay": 0.9,
        "model.drop_path_rate": 0.1,
        "optim.num_steps": 160_000,
    },
    "large-ade20k": {
        "model.name": LARGE,
        "optim.lr": 3e-5,
        "optim.layer_decay": 0.95,
        "model.drop_path_rate": 0.2,
        "optim.num_steps": 160_000,
    },
}
COMMON: dict[str, Any] = {
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "optim.clip_grad_norm": 0.0,
    "optim.ema_decay": 0.0,
    "optim.official_quirks": False,
    "data.flip_prob": 0.5,
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "scaling.use_gpu": True,
    "init.path": "",
    "init.neck": True,
}
OF_TASK: dict[Task, dict[str, Any]] = {
    "classify": {
        "data.image_size": 224,
        "data.global_batch_size": 4 * 8 * 32,
        "scaling.num_workers": 32,
        "data.crop_scale": [0.08, 1.0],
        "data.crop_ratio": [3 / 4, 4 / 3],
        "model.rel_pos_bias": True,
        "optim.lr": None,
        "optim.min_lr": 5e-6,
        "optim.schedule": "cosine",
        "augment.rand_augment": "rand-m9-mstd0.5-inc1",
        "augment.erase_prob": 0.25,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "augment.mix_prob": 1.0,
        "augment.mix_switch_prob": 0.5,
        "augment.label_smoothing": 0.1,
    },
    "detect": {
        "data.global_batch_size": 32 * 2,
        "scaling.num_workers": 32,
        "model.rel_pos_bias": False,
        "optim.schedule": "step",
        "optim.warmup_steps": 500,
        "optim.min_lr": 0.0,
        "detector.kind": "mask_rcnn",
        "detector.box_loss": "giou",
        "detector.min_sizes": list(range(480, 801, 32)),
        "detector.max_size": 1333,
        "detector.eval_min_size": 800,
        "detector.crop_prob": 0.5,
        "detector.head_dim": 256,
        "detector.fc_dim": 1024,
    },
    "segment": {
        "data.image_size": 512,
        "data.global_batch_size": 8 * 2,
        "scaling.num_workers": 8,
        "model.rel_pos_bias": True,
        "optim.schedule": "poly",
        "optim.warmup_steps": 1500,
        "optim.min_lr": 0.0,
        "segmenter.channels": 768,
        "segmenter.window": 512,
        "segmenter.stride": 341,
        "segmenter.scale_range": [0.5, 2.0],
        "segmenter.reduce_zero_label": True,
    },
}


def recipe(name: str) -> FinetuneConfig:
    task, _ = RECIPES[name]
    return get_recipe(FINETUNE_RECIPES[task], name)


def test_names_are_those_of_the_runs_and_no_two_tasks_share_one() -> None:
    assert len(RECIPES) == sum(len(recipes) for recipes in FINETUNE_RECIPES.values()) == 10
    assert set(OFFICIAL) == {name for name in RECIPES if not name.startswith("small-")}
    for name, (task, make) in RECIPES.items():
        config = make()
        assert config.run.name == name
        assert type(config) is CONFIG_CLASSES[task] and config.task == task


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_numbers_are_the_official_ones(name: str) -> None:
    task, make = RECIPES[name]
    found = flatten_config(make())
    for key, value in {**COMMON, **OF_TASK[task], **OFFICIAL[name]}.items():
        assert found[key] == value, key
    assert ClassifyConfig.eval_crop_ratio == 224 / 256


@pytest.mark.parametrize(
    ("name", "num_samples", "num_steps", "peak"),
    [
        ("base-in1k", IMAGENET, 125_113, 1.6e-3),
        ("large-in1k", IMAGENET, 62_556, 4e-3),
        ("base-coco-1x", COCO, 21_987, 2e-4),
        ("base-coco-3x", COCO, 65_962, 1.5e-4),
        ("large-coco-1x", COCO, 21_987, 2e-4),
        ("base-ade20k", 20_210, 160_000, 3e-5),
        ("large-ade20k", 20_210, 160_000, 3e-5),
    ],
)
def test_lengths_and_learning_rates_on_the_official_data(
    name: str, num_samples: int, num_steps: int, peak: float
) -> None:
    config = recipe(name)
    assert config.num_steps(num_samples) == num_steps
    assert config.lr == pytest.approx(peak)
    assert max(lr_at(step, num_steps, config) for step in range(0, num_steps, 50)) <= config.lr


def test_schedules_turn_where_the_official_ones_do() -> None:
    """Warm-up of 5 epochs on ImageNet; a tenth after epochs 9 and 11 of 12, 27 and 33 of 36."""
    for name, epochs in (("base-in1k", 100), ("large-in1k", 50)):
        config, num_steps = recipe(name), epochs * 1251
        for epoch, factor in ((0, 0.0), (2.5, 0.5), (5, 1.0)):
            lr = lr_at(int(epoch * 1251), num_steps, config)
            assert lr == pytest.approx(factor * config.lr, rel=1e-3)
        assert lr_at(num_steps, num_steps, config) == pytest.approx(5e-6)
    for name, epochs, turns in (("base-coco-1x", 12, (9, 11)), ("base-coco-3x", 36, (27, 33))):
        config, num_steps = recipe(name), epochs * 1832
        assert lr_at(250, num_steps, config) == pytest.approx(config.lr / 2)
        for turn, factor in zip(turns, (0.1, 0.01), strict=True):
            before, after = (lr_at(turn * 1832 + d, num_steps, config) for d in (-1, 1))
            assert before == pytest.approx(10 * factor * config.lr)
            assert after == pytest.approx(factor * config.lr)
    config = recipe("base-ade20k")
    lrs = [lr_at(step, 160_000, config) for step in (0, 750, 80_000, 160_000)]
    # rel: mmcv warms up to the decayed rate, which 750 steps have lowered by half a per cent.
    assert lrs == pytest.approx([0.0, 1.5e-5, 1.5e-5, 0.0], rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_workers_times_micro_batches_make_the_global_batch(name: str) -> None:
    """In one go: no official recipe accumulates gradients, and no small one has to."""
    config = recipe(name)
    batch, workers = config.data.global_batch_size, config.scaling.max_workers
    assert config.batch_size_per_worker <= config.scaling.max_batch_size_per_worker
    assert workers * config.batch_size_per_worker == batch
    taken = [m for rank in range(workers) for m in config.micro_batches_of(rank, workers)]
    assert taken == list(range(config.num_micro_batches)) == list(range(workers))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_the_trip_through_json(name: str) -> None:
    task, make = RECIPES[name]
    values = json.loads(json.dumps(config_to_dict(make())))
    assert task_of(values) == task
    assert config_from_dict(CONFIG_CLASSES[task], values) == make()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_in_its_first_line_what_it_is(name: str) -> None:
    first = (RECIPES[name][1].__doc__ or "").splitlines()[0]
    assert len(first) > 20 and first.endswith(".")


@pytest.mark.parametrize("name", RECIPES)
def test_an_override_replaces_its_key_and_nothing_else(name: str) -> None:
    task, make = RECIPES[name]
    key = {
        "classify": "augment.mixup",
        "detect": "detector.crop_prob",
        "segment": "segmenter.max_class_ratio",
    }[task]
    changes = {"init.path": "runs/x", "init.neck": False, "run.seed": 7, key: 0.31}
    old, new = (flatten_config(c) for c in (make(), apply_overrides(make(), changes)))
    assert {k: v for k, v in new.items() if v != old[k]} == changes
    with pytest.raises(ValueError, match=r"unknown setting 'optim.layer_decy'; did you mean 'opt"):
        apply_overrides(make(), {"optim.layer_decy": 0.5})


@pytest.mark.parametrize("task", FINETUNE_RECIPES)
def test_the_command_line_names_the_initial_weights_by_one_word(task: Task) -> None:
    recipes = FINETUNE_RECIPES[task]
    for name in recipes:
        argv = [name, "--init", "runs/demo", "--init.no-neck", "--data.path", "DIR"]
        config = parse_recipe_command(recipes, argv, prog="finetune", description="")
        changes = {"init.path": "runs/demo", "init.neck": False, "data.path": "DIR"}
        assert config == apply_overrides(recipes[name](), changes)


def test_recipes_of_another_task_are_unknown() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'base-in1k'"):
        get_recipe(FINETUNE_RECIPES["detect"], "base-in1k")


def test_settings_of_a_task_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"micro-batches of 1 image are too small for the batch"):
        apply_overrides(recipe("small-segment"), {"scaling.max_batch_size_per_worker": 1})
    with pytest.raises(ValueError, match=r"rand_augment='auto' is no RandAugment policy; use e\.g"):
        AugmentConfig(rand_augment="auto")
    with pytest.raises(ValueError, match=r"stride=600 exceeds segmenter.window=512: windows must"):
        SegmenterConfig(stride=600)
    assert SegmenterConfig(stride=600, window=0).stride == 600  # no window, no gap
    with pytest.raises(ValueError, match=r"data.path is empty; give a prepared data set with anno"):
        apply_overrides(recipe("small-classify"), {"data.path": ""})
