"""The fine-tuning loop: exact resume, any number of workers, what is evaluated and kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from models.pretraining import create_pretraining_model
from pipeline.checkpoint import MODEL_FILE, load_state
from pipeline.config_values import apply_overrides
from pipeline.data import made_ahead, sample_stream
from pipeline.downstream.tasks import create_task
from pipeline.evaluate import combine, evaluate_task, score_share
from pipeline.evaluation_data import share_of
from pipeline.finetune import build_state, evaluated_model, lr_at
from pipeline.finetune_config import Task
from pipeline.finetuning_run import VALIDATION, open_data
from pipeline.init_weights import InitialWeights
from pipeline.quarantine import TooManyBadSamplesError
from pipeline.train_state import Worker
from tests.pipeline.finetune_loop import (
    EVERY,
    NUM_STEPS,
    KilledError,
    LocalFinetune,
    finetune_config,
)
from tests.pipeline.labelled_sets import write_labelled_set
from tests.pipeline.test_pretrain import assert_same_state
from tests.pipeline.two_finetuners import train_together

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = get_args(Task)
CPU = torch.device("cpu")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_killed_twice_in_mid_epoch_ends_bit_for_bit_like_an_uninterrupted_one(
    task: Task, tmp_path: Path
) -> None:
    """With drop path, mixup, erasing, distortion, sampled regions and a moving average."""
    config = finetune_config(task, tmp_path / "data")
    whole = LocalFinetune(config, tmp_path / "whole")
    expected = whole()
    for dies_before, resumes_at in ((EVERY + 1, 0), (2 * EVERY, EVERY)):
        killed = LocalFinetune(config, tmp_path / "killed", dies_before=dies_before)
        with pytest.raises(KilledError):
            killed()
        assert killed.started_at == resumes_at
    last = LocalFinetune(config, tmp_path / "killed")
    summary = last()
    # 2 * EVERY was saved before the kill there.
    assert last.started_at == 2 * EVERY and summary["steps"] == NUM_STEPS
    states = [load_state(run.checkpointer.fetch(NUM_STEPS)) for run in (whole, last)]
    assert_same_state(*states)
    models = [load_file(run.folder / f"step_{NUM_STEPS:08d}" / MODEL_FILE) for run in (whole, last)]
    assert_same_state(*models)
    for key, value in expected["metrics"].items():
        if key.startswith(("val/", "train/loss")):
            assert summary["metrics"][key] == value, key
    assert last.pictures["predictions"] == whole.pictures["predictions"]


def test_a_run_that_pauses_is_evaluated_there_and_ends_as_if_it_had_not(tmp_path: Path) -> None:
    config = finetune_config("classify", tmp_path / "data")
    whole = LocalFinetune(config, tmp_path / "whole")
    whole()
    paused = apply_overrides(config, {"run.pause_at_step": 2})
    for _ in range(2):  # where it has paused already, it stays
        run = LocalFinetune(paused, tmp_path / "paused")
        summary = run()
        assert (summary["steps"], summary["is_stopped"]) == (2, True)
        assert "val/top1" in summary["metrics"]
    last = LocalFinetune(config, tmp_path / "paused")
    assert last()["steps"] == NUM_STEPS and last.started_at == 2
    states = [load_state(run.checkpointer.fetch(NUM_STEPS)) for run in (whole, last)]
    assert_same_state(*states)


def test_a_share_of_the_labels_is_the_same_few_images_in_every_epoch(tmp_path: Path) -> None:
    changes = {"data__label_fraction": 0.25, "optim__num_epochs": 8.0, "optim__num_steps": None}
    config = finetune_config("classify", tmp_path / "data", **changes)
    index = open_data(config)[0]
    assert (index.num_samples, config.num_used(index.num_samples)) == (12, 3)
    steps = config.num_steps(config.num_used(index.num_samples))
    assert steps == 8 * 3 // 4
    stream = sample_stream(config, index)
    rows = [row for step in range(steps) for row in stream.step(step, 4)[2].tolist()]
    assert sorted(Counter(rows).values()) == [8, 8, 8]


def test_a_run_that_goes_on_with_other_settings_of_the_optimiser_uses_them(tmp_path: Path) -> None:
    config = finetune_config("classify", tmp_path / "data")
    LocalFinetune(apply_overrides(config, {"run.pause_at_step": 4}), tmp_path / "run")()
    changed = {"optim.weight_decay": 0.3, "optim.layer_decay": 0.5, "optim.betas": (0.8, 0.9)}
    groups = []
    for folder in ("run", "from the start"):
        run = LocalFinetune(apply_overrides(config, changed), tmp_path / folder)
        run()
        groups.append(load_state(run.checkpointer.fetch(NUM_STEPS))["optimizer"]["param_groups"])
    assert groups[0] == groups[1]
    assert {group["weight_decay"] for group in groups[0]} == {0.0, 0.3}
    assert {group["betas"] for group in groups[0]} == {(0.8, 0.9)}


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_two_processes_compute_what_one_does(task: Task, tmp_path: Path) -> None:
    """Losses of every step; batch norms see the same micro-batches, only their running statistics
    are averaged over processes, so segmentation is compared in training alone."""
    config = finetune_config(task, tmp_path / "data", scaling__num_workers=2)
    alone = LocalFinetune(config, tmp_path / "alone")
    summary = alone()
    arguments = (f"{tmp_path}/meeting", str(tmp_path), config)
    mp.spawn(train_together, args=arguments, nprocs=2)
    pair = torch.load(tmp_path / "0.pt", weights_only=True)
    for step, record in alone.records.items():
        for key in (k for k in record if k.startswith("train/loss")):
            # Gradients are summed in another order; seven steps of AdamW widen that.
            assert pair["records"][step][key] == pytest.approx(record[key], rel=2e-4), (step, key)
    assert pair["metrics"]["val/num_samples"] == 7
    if task == "classify":
        for key in ("val/top1", "val/loss"):
            assert pair["metrics"][key] == pytest.approx(summary["metrics"][key], rel=2e-4)
    other = torch.load(tmp_path / "1.pt", weights_only=True)
    assert_same_state(pair["model"], other["model"])  # running statistics, too


@pytest.mark.parametrize("task", TASKS)
def test_a_validation_set_gives_the_same_figures_however_it_is_divided(
    task: Task, tmp_path: Path
) -> None:
    config = finetune_config(task, tmp_path / "data")
    _, val, classes = open_data(config)
    built = create_task(config, classes)
    torch.manual_seed(3)
    model = built.build().eval()
    maker = VALIDATION(config, val)
    whole, _ = evaluate_task(built, model, made_ahead(maker, share_of(maker, 2)))
    assert whole["val/num_samples"] == 7
    for world_size in (2, 3, 7):
        shares = [
            score_share(built, model, made_ahead(maker, share_of(maker, 1, rank, world_size)), CPU)
            for rank in range(world_size)
        ]
        assert [share.num_samples for share in shares] == [
            len(range(rank, 7, world_size)) for rank in range(world_size)
        ]
        divided, _ = combine(built, shares)
        for key, value in whole.items():
            # Logits of another batch size differ in the last bits.
            assert divided[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (world_size, key)


def test_bad_validation_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    write_labelled_set(tmp_path / "data" / "train", "classify")
    write_labelled_set(tmp_path / "data" / "val", "classify", num_samples=9, num_bad=2)
    config = finetune_config("classify", tmp_path / "data", data__max_bad_fraction=0.5)
    summary = LocalFinetune(config, tmp_path / "run")()
    assert summary["metrics"]["val/num_samples"] == 7
    assert summary["metrics"]["val/bad_samples"] == 2
    strict = finetune_config("classify", tmp_path / "data", data__max_bad_fraction=0.1)
    with pytest.raises(TooManyBadSamplesError, match="2 of 9"):
        LocalFinetune(strict, tmp_path / "strict")()


def test_bad_training_samples_are_quarantined_and_too_many_stop_the_run(tmp_path: Path) -> None:
    write_labelled_set(tmp_path / "data" / "train", "segment", num_bad=2)
    write_labelled_set(tmp_path / "data" / "val", "segment", num_samples=3)
    config = finetune_config("segment", tmp_path / "data", data__max_bad_fraction=0.5)
    summary = LocalFinetune(config, tmp_path / "run")()
    assert len(summary["bad_samples"]) == 2
    strict = finetune_config("segment", tmp_path / "data", data__max_bad_fraction=0.05)
    with pytest.raises(TooManyBadSamplesError, match="2 of 12"):
        LocalFinetune(strict, tmp_path / "strict")()


def test_the_moving_average_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    config = finetune_config("classify", tmp_path / "data")
    run = LocalFinetune(config, tmp_path / "run")
    summary = run()
    state = load_state(run.checkpointer.fetch(NUM_STEPS))
    kept = load_file(run.folder / f"step_{NUM_STEPS:08d}" / MODEL_FILE)
    assert_same_state(kept, {k: state["ema"][f"module.{k}"] for k in kept})
    moved = [k for k, v in kept.items() if not torch.equal(v, state["model"][k])]
    assert "head.weight" in moved and len(moved) > len(kept) / 2
    _, val, classes = open_data(config)
    task = create_task(config, classes)
    model = task.build()
    model.load_state_dict(kept)
    maker = VALIDATION(config, val)
    metrics, _ = evaluate_task(task, model, made_ahead(maker, share_of(maker, 2)))
    assert metrics["val/loss"] == pytest.approx(summary["metrics"]["val/loss"], rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_backbone_and_neck_of_pre_training_arrive_in_the_model(task: Task, tmp_path: Path) -> None:
    torch.manual_seed(5)
    pretrained = create_pretraining_model("itpn_debug", img_size=64).encoder
    weights = InitialWeights(pretrained.state_dict(), "pretrained", "itpn_debug", 64)
    config = finetune_config(task, tmp_path / "data")
    built = create_task(config, ("a", "b"), pretrain_size=64)
    state = build_state(config, built, weights, Worker())
    found = state.model.state_dict()
    prefix = {"classify": "", "detect": "backbone.encoder.", "segment": "encoder."}[task]
    for key, value in pretrained.state_dict().items():
        if task == "classify" and key.startswith("pyramid."):
            continue  # classification has no neck, as the official one
        assert torch.equal(found[prefix + key], value), key


def test_the_learning_rate_of_each_layer_follows_schedule_and_layer_decay(tmp_path: Path) -> None:
    config = finetune_config("classify", tmp_path / "data")
    task = create_task(config, ("a", "b"))
    state = build_state(config, task, InitialWeights(None, ""), Worker())
    scales = [group["lr_scale"] for group in state.optimizer.param_groups]
    assert max(scales) == 1 and min(scales) == pytest.approx(0.8**13)
    lrs = [lr_at(step, 100, config) for step in (0, 10, 20, 60, 99)]
    # Warm-up over 20 of 100 steps to 1e-3, then a cosine to 0.
    assert lrs == pytest.approx([0, 5e-4, 1e-3, 5e-4, 3.8545e-7], rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("step", [0, 1e-3, 1e-3, 1e-4, 1e-5]), ("poly", [0, 0.98e-3, 0.5e-3, 0.25e-3, 0.01e-3])],
)
def test_step_and_poly_schedules(schedule: str, expected: list[float], tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"optim__schedule": schedule, "optim__warmup_steps": 2}
    config = finetune_config("detect", tmp_path / "data", **overrides)
    lrs = [lr_at(step, 100, config) for step in (0, 2, 50, 75, 99)]
    assert lrs == pytest.approx(expected)


def test_evaluation_leaves_the_model_in_training_mode(tmp_path: Path) -> None:
    config = finetune_config("segment", tmp_path / "data", optim__ema_decay=0.0)
    _, val, classes = open_data(config)
    task = create_task(config, classes)
    state = build_state(config, task, InitialWeights(None, ""), Worker())
    state.model.train()
    maker = VALIDATION(config, val)
    evaluate_task(task, evaluated_model(state), made_ahead(maker, share_of(maker, 2)))
    assert state.model.training
