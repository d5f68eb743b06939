"""Configuration: round trips, overrides, validation messages, arithmetic, the paper's numbers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli import get_recipe
from pipeline.config_values import (
    apply_overrides,
    config_diff,
    config_from_dict,
    config_hash,
    config_to_dict,
    flatten_config,
)
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import PRETRAIN_RECIPES, debug, demo


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_recipe_survives_the_trip_through_json(name: str) -> None:
    config = get_recipe(PRETRAIN_RECIPES, name)
    text = json.dumps(config_to_dict(config))
    assert config_from_dict(PretrainConfig, json.loads(text)) == config


def test_flattened_config_overrides_another_recipe_into_the_same_config() -> None:
    assert apply_overrides(debug(), flatten_config(demo())) == demo()


def test_override_replaces_the_named_keys_and_nothing_else() -> None:
    overrides = {"run.seed": 7, "data.crop_scale": [0.5, 1.0], "objective.norm_pix_loss": True}
    config = apply_overrides(debug(), overrides)
    assert config.data.crop_scale == (0.5, 1.0)
    assert {k: v for k, v in flatten_config(config).items() if v != flatten_config(debug())[k]} == (
        overrides
    )


def test_override_leaves_the_original_alone() -> None:
    config = debug()
    apply_overrides(config, {"optim.lr": 1.0})
    assert config == debug()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.base_lrr", "optim.base_lr"),
        ("data.image_sise", "data.image_size"),
        ("image_size", "data.image_size"),
        ("objectiv.mask_ratio", "objective.mask_ratio"),
    ],
)
def test_unknown_override_names_the_nearest_key(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting '{key}'; did you mean '{nearest}'"):
        apply_overrides(debug(), {key: 1})


def test_unknown_key_in_a_stored_config_names_the_nearest_field() -> None:
    values = config_to_dict(debug())
    values["optim"]["warmup_ration"] = values["optim"].pop("warmup_ratio")
    with pytest.raises(ValueError, match="'warmup_ration'; did you mean 'warmup_ratio'"):
        config_from_dict(PretrainConfig, values)


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"run.name": ""}, "run.name='' must be a plain folder name; use e.g. 'run-1'"),
    ({"run.name": "a/b"}, "run.name='a/b' must be a plain folder name"),
    ({"run.name": ".."}, "run.name='..' must be a plain folder name"),
    ({"run.log_every_steps": 0}, "run.log_every_steps=0 must be greater than 0"),
    ({"run.checkpoint_every_steps": 0}, "run.checkpoint_every_steps=0 must be greater than 0"),
    ({"run.evaluate_every_steps": 0}, "run.evaluate_every_steps=0 must be greater than 0"),
    ({"run.picture_every_steps": -1}, "run.picture_every_steps=-1 must be greater than 0"),
    ({"run.keep_checkpoints": 0}, "run.keep_checkpoints=0 must be greater than 0"),
    ({"data.path": ""}, "data.path is empty; give a folder of images or Parquet: --data.path DIR"),
    ({"data.image_size": 100}, "data.image_size=100 is not a multiple of 16; use 96"),
    ({"data.image_size": 235}, "data.image_size=235 is not a multiple of 16; use 240"),
    ({"data.image_size": 0}, "data.image_size=0 is not a multiple of 16; use 16"),
    (
        {"data.crop_scale": (0.5, 0.2)},
        "data.crop_scale=(0.5, 0.2) must satisfy 0 < min <= max <= 1",
    ),
    ({"data.crop_scale": (0.0, 1.0)}, "data.crop_scale=(0.0, 1.0) must satisfy"),
    ({"data.crop_scale": (0.2, 1.1)}, "data.crop_scale=(0.2, 1.1) must satisfy"),
    ({"data.global_batch_size": 0}, "data.global_batch_size=0 must be greater than 0"),
    ({"data.num_cpus": -1}, "data.num_cpus=-1 must be >= 0; 0 decodes in the training workers"),
    ({"data.num_eval_crops": 0}, "data.num_eval_crops=0 must be greater than 0"),
    ({"data.prefetch_batches": 0}, "data.prefetch_batches=0 must be greater than 0"),
    (
        {"model.name": "itpn_bas_patch16_224"},
        "unknown model 'itpn_bas_patch16_224'; did you mean 'itpn_base_patch16_224'? Known: itpn_",
    ),
    ({"objective.mask_ratio": 0.0}, "objective.mask_ratio=0.0 must lie in (0, 1); use 0.75"),
    ({"objective.mask_ratio": 1.0}, "objective.mask_ratio=1.0 must lie in (0, 1); use 0.75"),
    (
        {"objective.mask_ratio": 0.95},
        "objective.mask_ratio=0.95 leaves no visible patch of the 16 of a 64-pixel image; lower it",
    ),
    ({"objective.mfm_weight": -0.1}, "objective.mfm_weight=-0.1 must be >= 0; 0 turns MFM off"),
    ({"objective.teacher_momentum": 1.5}, "objective.teacher_momentum=1.5 must lie in [0, 1]"),
    (
        {"optim.num_epochs": 2.0},
        "optim.num_epochs=2.0 and optim.num_steps=20: give exactly one of them and set the other "
        "to None",
    ),
    ({"optim.num_steps": None}, "optim.num_epochs=None and optim.num_steps=None: give exactly one"),
    ({"optim.warmup_ratio": 1.0}, "optim.warmup_ratio=1.0 must lie in [0, 1)"),
    ({"optim.lr": 0.0}, "optim.lr=0.0 must be greater than 0"),
    ({"optim.base_lr": float("nan")}, "optim.base_lr=nan must be greater than 0"),
    ({"scaling.num_workers": 0}, "scaling.num_workers=0 must be greater than 0"),
    ({"scaling.cpus_per_worker": 0}, "scaling.cpus_per_worker=0 must be greater than 0"),
    ({"scaling.gpus_per_worker": 0}, "scaling.gpus_per_worker=0 must be 1, or a share of one GPU"),
    ({"scaling.gpus_per_worker": 2}, "scaling.gpus_per_worker=2 must be 1, or a share of one GPU"),
    (
        {"scaling.gpus_per_worker": 0.5, "scaling.num_workers": 2},
        "scaling.gpus_per_worker=0.5 must be 1, or a share of one GPU with scaling.num_workers=1",
    ),
    ({"run.pause_at_step": -1}, "run.pause_at_step=-1"),
    ({"scaling.max_batch_size_per_worker": 0}, "scaling.max_batch_size_per_worker=0 must be great"),
    (
        {"scaling.num_workers": (3, 2)},
        "scaling.num_workers=(3, 2): the first number, the fewest workers, must not exceed the "
        "second, the most",
    ),
    ({"scaling.num_workers": (0, 2)}, "scaling.num_workers=0 must be greater than 0"),
    *(
        (
            {"scaling.num_workers": wrong},
            f"scaling.num_workers={shown} must be a whole number, or two: the fewest and the most",
        )
        for wrong, shown in [
            *(([], "()"), ([2], "(2,)"), ([1, 2, 3], "(1, 2, 3)"), ("2", "2"), (None, "None")),
            *((2.0, "2.0"), (True, "True"), ([1, 2.5], "(1, 2.5)"), (["1", "2"], "('1', '2')")),
        ]
    ),
    (
        {"data.global_batch_size": 16, "scaling.num_workers": (1, 3)},
        "data.global_batch_size=16 is not divisible by scaling.num_workers=3; use 15 or 18",
    ),
    (
        {"data.global_batch_size": 100, "scaling.num_workers": 8},
        "data.global_batch_size=100 is not divisible by scaling.num_workers=8; use 96 or 104",
    ),
    (
        {"data.global_batch_size": 5, "scaling.num_workers": 8},
        "data.global_batch_size=5 is not divisible by scaling.num_workers=8; use 8",
    ),
    (
        {"data.num_eval_crops": 1, "scaling.num_workers": 2},
        "data.num_eval_crops=1 leaves some of scaling.num_workers=2 without a crop; use at least 2",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), INVALID, ids=[str(o) for o, _ in INVALID])
def test_invalid_value_is_named_with_the_rule_and_the_way_out(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        apply_overrides(debug(), overrides)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"optim.num_steps": 0}, "optim.num_steps"),
        ({"optim.num_steps": None, "optim.num_epochs": 0.0}, "optim.num_epochs"),
        ({"data.shuffle_window": 0}, "data.shuffle_window"),
        ({"data.crop_ratio": (0.0, 1.0)}, "data.crop_ratio"),
        ({"objective.mfm_loss": "l1"}, "objective.mfm_loss"),
        ({"objective.teacher_input": "all"}, "objective.teacher_input"),
        ({"run.checkpoint_every_minutes": -1.0}, "run.checkpoint_every_minutes"),
        ({"run.checkpoint_every_minutes": float("nan")}, "run.checkpoint_every_minutes"),
        ({"run.keep_checkpoints": 0}, "run.keep_checkpoints"),
        ({"run.keep_every_steps": -5}, "run.keep_every_steps"),
        ({"run.max_failures": -1}, "run.max_failures"),
        ({"run.on_checkpoint_error": "ignore"}, "run.on_checkpoint_error"),
        ({"run.checkpoint_path": "checkpoints"}, "run.checkpoint_path"),
        ({"run.checkpoint_path": "~/checkpoints"}, "run.checkpoint_path"),
        ({"optim.max_skipped_steps": -1}, "optim.max_skipped_steps"),
        ({"optim.clip_grad_norm": -1.0}, "optim.clip_grad_norm"),
        ({"scaling.resize_check_s": 0.0}, "scaling.resize_check_s"),
        ({"scaling.resize_check_s": float("nan")}, "scaling.resize_check_s"),
    ],
)
def test_value_that_would_fail_or_mislead_in_a_worker_is_refused_at_construction(
    overrides: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{key}=")):
        apply_overrides(debug(), overrides)


@pytest.mark.parametrize("path", ["", "/mnt/checkpoints", "s3://bucket/folder", "file:///mnt/c"])
def test_checkpoints_may_go_to_an_absolute_path_or_a_uri(path: str) -> None:
    assert apply_overrides(debug(), {"run.checkpoint_path": path}).run.checkpoint_path == path


@pytest.mark.parametrize(
    ("given", "fewest", "most"), [(1, 1, 1), (4, 4, 4), ((1, 2), 1, 2), ([2, 4], 2, 4)]
)
def test_number_of_workers_may_be_a_range_and_survives_json(
    given: Any, fewest: int, most: int
) -> None:
    config = apply_overrides(debug(), {"scaling.num_workers": given})
    assert (config.scaling.min_workers, config.scaling.max_workers) == (fewest, most)
    again = config_from_dict(PretrainConfig, json.loads(json.dumps(config_to_dict(config))))
    assert again == config and hash(again) == hash(config)
    assert config_diff(config_to_dict(config), config_to_dict(again)) == []
    assert config_hash(again) == config_hash(config)


@settings(deadline=None)
@given(share=st.integers(1, 600), num_workers=st.integers(1, 64), largest=st.integers(1, 300))
def test_micro_batches_of_all_workers_multiply_to_the_global_batch(
    share: int, num_workers: int, largest: int
) -> None:
    overrides = {
        "data.global_batch_size": share * num_workers,
        "scaling.num_workers": num_workers,
        "scaling.max_batch_size_per_worker": largest,
        "data.num_eval_crops": 64,
    }
    config = apply_overrides(debug(), overrides)
    steps = config.num_micro_batches // num_workers
    assert config.batch_size_per_worker * steps * num_workers == share * num_workers
    assert config.batch_size_per_worker <= largest
    fitting = [a for a in range(1, steps) if share % a == 0 and share // a <= largest]
    assert not fitting, "fewer micro-batches would do"


@pytest.mark.parametrize(
    ("num_workers", "micro_batch", "accumulation"),
    [(1, 64, 24), (2, 64, 12), (3, 64, 8), (32, 48, 1)],
)
def test_global_batch_of_1536_is_split_as_computed_by_hand(
    num_workers: int, micro_batch: int, accumulation: int
) -> None:
    overrides = {
        "data.global_batch_size": 1536,
        "scaling.num_workers": num_workers,
        "scaling.max_batch_size_per_worker": 64,
    }
    config = apply_overrides(debug(), overrides)
    assert config.batch_size_per_worker == micro_batch
    assert config.num_micro_batches == num_workers * accumulation
    assert len(config.micro_batches_of(0, num_workers)) == accumulation


def test_lr_is_base_lr_per_256_images_unless_lr_is_given() -> None:
    overrides = {"data.global_batch_size": 512, "optim.base_lr": 1e-3, "optim.lr": None}
    assert apply_overrides(debug(), overrides).lr == pytest.approx(2e-3)
    assert apply_overrides(debug(), {**overrides, "optim.lr": 5e-4}).lr == 5e-4


def test_steps_follow_from_epochs_rounded_down_and_are_at_least_one() -> None:
    by_epochs = {"optim.num_steps": None, "optim.num_epochs": 1.5}  # batches of 16
    assert apply_overrides(debug(), by_epochs).num_steps(100) == 9
    assert apply_overrides(debug(), by_epochs).num_steps(3) == 1
    assert debug().num_steps(3) == 20


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("pixel-base-in1k", "itpn_base_patch16_224"),
        ("pixel-large-in1k", "itpn_large_patch16_224"),
    ],
)
def test_imagenet_recipes_carry_the_numbers_of_the_paper(name: str, model: str) -> None:
    config = get_recipe(PRETRAIN_RECIPES, name)
    assert config.model.name == model
    assert config.lr == pytest.approx(2.4e-3)
    assert config.data.global_batch_size == 4096
    assert config.optim.betas == (0.9, 0.95)
    assert config.optim.weight_decay == 0.05
    assert config.optim.min_lr == 0
    assert config.optim.num_epochs == 1600
    assert config.optim.warmup_ratio * config.optim.num_epochs == pytest.approx(40)
    assert config.num_steps(1_281_167) == 500_455
    assert config.data.image_size == 224
    assert config.objective.mask_ratio == 0.75
    assert (config.num_visible, config.data.num_patches) == (49, 196)
    assert config.data.crop_scale == (0.2, 1.0)
    assert config.objective.norm_pix_loss


def test_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(
        ValueError, match="unknown recipe 'pixel-base'; did you mean 'pixel-base-in"
    ):
        get_recipe(PRETRAIN_RECIPES, "pixel-base")


def test_diff_shows_a_changed_lr_and_nothing_that_cannot_change_results() -> None:
    old = config_to_dict(debug())
    harmless = {
        "run.storage_path": "/elsewhere",
        "run.dry_run": True,
        "run.allow_config_change": True,
        "run.max_failures": 9,
    }
    assert config_diff(old, config_to_dict(apply_overrides(debug(), harmless))) == []
    changed = config_to_dict(apply_overrides(debug(), {**harmless, "optim.lr": 1e-3}))
    assert config_diff(old, changed) == ["optim.lr: 0.002 -> 0.001"]


def test_diff_shows_a_setting_that_an_older_config_did_not_have() -> None:
    old, new = config_to_dict(debug()), config_to_dict(debug())
    del old["optim"]["betas"]
    assert config_diff(old, new) == ["optim.betas: '<absent>' -> [0.9, 0.95]"]


def test_hash_tells_configs_apart_and_equal_ones_not() -> None:
    assert config_hash(debug()) == config_hash(apply_overrides(demo(), flatten_config(debug())))
    assert config_hash(debug()) != config_hash(apply_overrides(debug(), {"run.seed": 1}))
