"""What all tasks promise the loop: gradients, bad samples, seeds, precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.downstream.classify_samples import ClassifySamples
from pipeline.downstream.detect_samples import DetectSamples
from pipeline.downstream.samples import Arrays
from pipeline.downstream.segment_samples import SegmentSamples
from pipeline.downstream.task import DownstreamTask
from pipeline.downstream.tasks import create_task
from pipeline.finetune_config import Task
from tests.pipeline.downstream import tiny_tasks as tiny
from tests.pipeline.downstream.tiny_tasks import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

RANDOM: dict[Task, dict[str, Any]] = {
    "classify": {
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "augment.erase_prob": 0.5,
        "augment.label_smoothing": 0.1,
    },
    "detect": {"detector.min_sizes": (48, 64)},
    "segment": {"segmenter.photometric": True},
}
"""Settings that make a task draw numbers."""
KINDS: list[tuple[Task, dict[str, Any]]] = [
    ("classify", {}),
    ("classify", RANDOM["classify"]),
    ("detect", {}),
    ("detect", {"detector.kind": "faster_rcnn", "detector.box_loss": "smooth_l1"}),
    ("detect", {"detector.kind": "cascade_mask_rcnn"}),
    ("segment", {}),
]
TASKS: list[Task] = ["classify", "detect", "segment"]


def noise(name: Task) -> Arrays:
    """A sample that would leave its mark on the gradients, if it were looked at."""
    sample = tiny.sample(name, 1, (0, 0, 60, 60))
    pixels = np.random.default_rng(5).integers(0, 256, sample["image"].shape)
    return sample | {"image": pixels.astype(np.uint8)}


def blank(task: DownstreamTask) -> Arrays:
    """What the data plane puts in the place of a bad sample."""
    config: Any = task.config
    makers: dict[str, Any] = {
        "classify": ClassifySamples,
        "detect": DetectSamples,
        "segment": SegmentSamples,
    }
    made: Arrays = makers[config.task](config, len(task.classes)).blank()
    return made


@pytest.mark.parametrize(("name", "overrides"), KINDS)
def test_gradients_reach_every_parameter_and_the_first_loss_is_the_sum(
    name: Task, overrides: dict[str, Any]
):
    task = tiny.task(name, overrides)
    losses, gradients = tiny.gradients_of(task, tiny.batch(tiny.samples(name)))
    assert len(losses) == len(task.loss_names) and task.loss_names[0] == "loss"
    assert losses.dtype == torch.float32 and bool((losses > 0).all())
    if len(losses) > 1:  # tolerance: the order of the summands
        torch.testing.assert_close(losses[0], losses[1:].sum(), rtol=1e-6, atol=0)
    for parameter, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.any(), parameter


def test_losses_have_the_names_of_their_heads():
    rpn = ("loss_objectness", "loss_rpn_box_reg")
    box = ("loss_classifier", "loss_box_reg")
    stages = tuple(f"{part}_{i}" for i in (1, 2, 3) for part in box)
    names = {
        "mask_rcnn": ("loss", *box, "loss_mask", *rpn),
        "faster_rcnn": ("loss", *box, *rpn),
        "cascade_mask_rcnn": ("loss", *stages, "loss_mask", *rpn),
        "cascade_rcnn": ("loss", *stages, *rpn),
    }
    for kind, expected in names.items():
        assert tiny.task("detect", {"detector.kind": kind}).loss_names == expected
    assert tiny.task("classify").loss_names == ("loss",)
    assert tiny.task("segment").loss_names == ("loss", "loss_seg", "loss_aux")


@pytest.mark.parametrize("name", TASKS)
def test_the_size_of_pretraining_decides_the_table_unless_it_is_resized_anyway(name: Task):
    config = tiny.config(name)
    for size, side in ((None, 4), (96, 6)):
        model = create_task(config, tiny.CLASSES, pretrain_size=size).build()
        tables = [p.shape for key, p in model.named_parameters() if key.endswith("pos_embed")]
        assert [shape[1] for shape in tables] == [16 if name == "classify" else side**2]


@pytest.mark.parametrize(("name", "overrides"), [*KINDS, *RANDOM.items()])
def test_bad_samples_change_nothing_but_the_divisor(name: Task, overrides: dict[str, Any]):
    """To the bit: two of four are bad, so that the share is a power of two."""
    task, good = tiny.task(name, overrides), tiny.samples(name, 2)
    alone = tiny.gradients_of(task, tiny.batch(good))
    among = tiny.gradients_of(
        task, tiny.batch([noise(name), good[0], noise(name), good[1]], bad=(0, 2))
    )
    assert torch.equal(among[0], alone[0] / 2)
    for parameter, gradient in alone[1].items():
        assert torch.equal(among[1][parameter], gradient / 2), parameter


@pytest.mark.parametrize(("name", "overrides"), [*KINDS, *RANDOM.items()])
def test_bad_samples_alone_give_zero_gradients_to_every_parameter(
    name: Task, overrides: dict[str, Any]
):
    task = tiny.task(name, overrides)
    given = tiny.batch([blank(task)] * 2, bad=(0, 1))
    losses, gradients = tiny.gradients_of(task, given)
    assert losses.tolist() == [0] * len(task.loss_names)
    assert not any(gradient.any() for gradient in gradients.values())  # NaN would be any, too


@pytest.mark.parametrize("name", TASKS)
def test_seeds_decide_the_losses(name: Task):
    task = tiny.task(name, RANDOM[name] | {"model.drop_path_rate": 0.5})
    given = tiny.batch(tiny.samples(name))
    first, again, other = (tiny.gradients_of(task, given, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("name", "overrides"), KINDS)
def test_losses_are_whole_precision_under_autocast(name: Task, overrides: dict[str, Any]):
    task, given = tiny.task(name, overrides), tiny.batch(tiny.samples(name, 2))
    whole = tiny.gradients_of(task, given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        losses = tiny.gradients_of(task, given)[0]
    assert losses.dtype == torch.float32
    # bfloat16 has 8 bits; the regions detection samples then differ a little, too
    torch.testing.assert_close(losses[0], whole[0], rtol=0.15, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_scores_pass_over_bad_samples(name: Task):
    task = tiny.task(name)
    model = tiny.built(task).eval()
    good = tiny.samples(name, 2)
    given = tiny.batch([noise(name), *good], bad=(0,))
    without = {key: values[1:] for key, values in given.items()}
    states = []
    for part in (given, without):
        scores = task.new_scores()
        task.score(model, part, CPU, scores)
        states.append(scores.result())
    assert states[0] == states[1] and task.main_metric in states[0]
    scores = task.new_scores()
    task.score(model, tiny.batch([noise(name)], bad=(0,)), CPU, scores)
    assert task.main_metric not in scores.result()


@pytest.mark.parametrize("name", TASKS)
def test_pictures_are_drawn_also_of_a_micro_batch_without_good_samples(name: Task):
    task = tiny.task(name)
    model = tiny.built(task).eval()
    scores = task.new_scores()
    task.score(model, tiny.batch(tiny.samples(name, 1)), CPU, scores)
    confusion = set() if name == "detect" else {"confusion"}
    for bad, expected in (((0,), confusion | {"predictions"}), ((0, 1), confusion)):
        given = tiny.batch(tiny.samples(name, 2), bad=bad)
        pictures = task.pictures(model, given, CPU, scores)
        assert set(pictures) == expected
        assert all(png.startswith(b"\x89PNG") for png in pictures.values())
