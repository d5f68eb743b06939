"""Detection: samples learnt by heart, the frame of predictions, scores, the model's settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from pipeline.downstream.coco_ap import CocoScores
from pipeline.downstream.detect import evaluation_target
from pipeline.downstream.samples import Arrays
from pipeline.downstream.task import DownstreamTask
from tests.pipeline.downstream import tiny_tasks as tiny
from tests.pipeline.downstream.tiny_tasks import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

ODD_SIZE = (77, 101)
ODD_BOX = (30, 12, 90, 60)


class Learnt(NamedTuple):
    """A detector that knows four images by heart."""

    task: DownstreamTask
    model: nn.Module
    samples: list[Arrays]
    scores: dict[str, float]


@pytest.fixture(scope="module")
def learnt() -> Learnt:
    """The last image has another size and is shown to the model at 49x64 pixels."""
    torch.set_num_threads(1)
    task = tiny.task("detect", {"detector.max_size": 64})
    samples = [*tiny.samples("detect", 3), tiny.sample("detect", 2, ODD_BOX, ODD_SIZE)]
    model, scores = tiny.overfit(task, tiny.batch(samples), num_steps=120, lr=3e-3)
    return Learnt(task, model, samples, scores)


def iou(a: Any, b: Any) -> float:
    """Of two boxes x0, y0, x1, y1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(shared / (sum(areas) - shared))


class Stub(nn.Module):
    """Finds the same in every image, as a torchvision detector would."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self.found = found
        self.seen: list[Tensor] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert len(images) == 1, "evaluation must not pad images to each other"
        self.seen += images
        return [dict(self.found)]


def found(size: tuple[int, int]) -> dict[str, Tensor]:
    """Two objects, the first a little off the truth of the test of scores."""
    masks = torch.zeros(2, 1, *size)
    masks[0, 0, 13:50, 10:40] = 0.9
    masks[1, 0, :5, :5] = 0.6
    boxes = torch.tensor([[10.0, 13, 40, 50], [0, 0, 5, 5]])
    scores = torch.tensor([0.9, 0.4])
    return {"boxes": boxes, "labels": torch.tensor([1, 3]), "scores": scores, "masks": masks}


def test_a_tiny_model_learns_four_images_by_heart(learnt: Learnt):
    for kind in ("box", "mask"):
        assert learnt.scores[f"val/{kind}_ap50"] == 100
        assert learnt.scores[f"val/{kind}_ap"] > 45  # mean over IoU up to 0.95


def test_predictions_are_in_the_frame_of_the_image(learnt: Learnt):
    (prediction,) = learnt.task.predict(learnt.model, [learnt.samples[3]["image"]], CPU)
    assert prediction["labels"][0] == 2  # counted from 0
    assert (np.diff(prediction["scores"]) <= 0).all()
    assert iou(prediction["boxes"][0], ODD_BOX) > 0.6
    (mask,) = [coco_mask.decode({"size": list(ODD_SIZE), "counts": prediction["masks"][0]})]
    truth = tiny.drawing(2, ODD_BOX, ODD_SIZE)[1]
    assert (mask & truth).sum() / (mask | truth).sum() > 0.6
    assert all(len(values) == len(prediction["scores"]) for values in prediction.values())


def test_images_are_predicted_one_by_one(learnt: Learnt):
    images = [sample["image"] for sample in learnt.samples]
    together = learnt.task.predict(learnt.model, images, CPU)
    for image, prediction in zip(images, together, strict=True):
        (alone,) = learnt.task.predict(learnt.model, [image], CPU)
        assert all(np.array_equal(prediction[key], alone[key]) for key in alone)


def test_scores_are_those_of_predictions_in_original_pixels():
    task = tiny.task("detect", {"detector.min_sizes": (32,)})
    size = (70, 90)
    sample = tiny.sample("detect", 0, (10, 10, 40, 50), size)
    crowded = sample | {"is_crowd": np.array([True])}
    scores, expected = task.new_scores(), CocoScores(list(tiny.CLASSES), with_masks=True)
    model = Stub(found(size)).eval()
    task.score(model, tiny.batch([sample, tiny.without_objects(size), crowded]), CPU, scores)
    for row, is_crowd in ((10, [False]), (11, []), (12, [True])):
        target: dict[str, Any] = {
            "boxes": torch.tensor([[10.0, 10, 40, 50]])[: len(is_crowd)],
            "labels": torch.tensor([1])[: len(is_crowd)],
            "is_crowd": torch.tensor(is_crowd, dtype=torch.bool),
            "masks": [sample["mask_bytes"].tobytes()][: len(is_crowd)],
        }
        expected.add(row, size, found(size), target)
    result = scores.result()
    assert result == expected.result()
    assert 0 < result["val/box_ap"] < 100  # IoU 37/40 with the only object
    assert set(scores.state()["images"]) == {10, 11, 12}
    assert model.seen[0].shape == (3, *size)
    assert float(model.seen[0].max()) <= 1 and float(model.seen[0].min()) >= 0


def test_targets_without_masks_have_none():
    sample = tiny.samples("detect", 1)[0]
    del sample["mask_bytes"], sample["mask_lengths"]
    assert "masks" not in evaluation_target(sample)
    task = tiny.task("detect", {"detector.kind": "faster_rcnn"})
    prediction = found((64, 64))
    del prediction["masks"]
    (predicted,) = task.predict(Stub(prediction).eval(), [sample["image"]], CPU)
    assert set(predicted) == {"boxes", "labels", "scores"}
    scores = task.new_scores()
    task.score(Stub(prediction).eval(), tiny.batch([sample]), CPU, scores)
    assert not any("mask" in key for key in scores.result())


def test_an_image_without_objects_is_background_to_learn_from():
    task = tiny.task("detect")
    samples = [tiny.without_objects(), *tiny.samples("detect", 1)]
    losses, gradients = tiny.gradients_of(task, tiny.batch(samples))
    assert losses.isfinite().all() and all(g.isfinite().all() for g in gradients.values())
    alone, gradients = tiny.gradients_of(task, tiny.batch(samples[:1]))
    by_name = dict(zip(task.loss_names, alone.tolist(), strict=True))
    assert by_name["loss_classifier"] > 0 and by_name["loss_objectness"] > 0
    assert by_name["loss_box_reg"] == by_name["loss_mask"] == by_name["loss_rpn_box_reg"] == 0


def test_predicting_with_a_model_in_training_mode_is_refused():
    task = tiny.task("detect")
    with pytest.raises(AssertionError, match=r"call model\.eval\(\)"):
        task.predict(task.build().train(), [tiny.samples("detect", 1)[0]["image"]], CPU)


def test_the_model_is_built_as_the_config_says():
    overrides = {
        "detector.kind": "cascade_rcnn",
        "detector.box_loss": "smooth_l1",
        "detector.min_sizes": (48, 64),
        "detector.eval_min_size": 80,
        "data.mean": (0.1, 0.2, 0.3),
        "data.std": (0.4, 0.5, 0.6),
        "model.drop_path_rate": 0.3,
    }
    task: Any = tiny.task("detect", overrides)
    model: Any = task.build()
    assert tiny.drop_path_rate(model) == 0.3
    transform, heads = model.transform, model.roi_heads
    assert transform.min_size == (48, 64, 80) and transform.max_size == 128
    assert transform.image_mean == [0.1, 0.2, 0.3] and transform.image_std == [0.4, 0.5, 0.6]
    assert len(heads.stages) == 3 and heads.mask_head is None and heads.box_loss == "smooth_l1"
    assert heads.stages[0].box_predictor.cls_score.in_features == 32
    assert heads.stages[0].fg_bg_sampler.batch_size_per_image == 32
    assert model.num_classes == 3 and model.backbone.encoder.backbone.rel_pos_bias
    model = type(task)(task.config, task.classes, pretrain_size=96).build()
    assert model.backbone.encoder.backbone.pos_embed_grid == (6, 6)
