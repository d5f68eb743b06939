"""Segmentation: few good samples, windows, sizes, distortion, predictions."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.downstream.mean_iou import SegmentationScores
from pipeline.downstream.segment_samples import SegmentSamples
from pipeline.reading import Sample
from tests.pipeline.downstream import tiny_tasks as tiny
from tests.pipeline.downstream.tiny_tasks import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

BOX = (20, 10, 70, 66)
SIZE = (77, 101)


def test_a_tiny_model_learns_four_images_and_finds_them_at_any_size():
    task, samples = tiny.task("segment"), tiny.samples("segment")
    samples[3] = tiny.sample("segment", 0, (4, 4, 50, 44))
    model, scores = tiny.overfit(task, tiny.batch(samples), num_steps=40, lr=3e-3)
    assert scores["val/miou"] > 85  # the borders are drawn on cells of 4 pixels

    # The same classes and place, in another frame: (77, 101) is resized to (64, 84) and back.
    image, mask = tiny.drawing(0, BOX, SIZE, tiny.COLOURS[1])
    (prediction,) = task.predict(model, [image], CPU)
    found = prediction["mask"]
    assert found.shape == SIZE and found.dtype == np.uint8
    union = ((found == 0) | mask).sum()
    assert ((found == 0) & mask).sum() / union > 0.7


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (48, 20)])
def test_scores_are_those_of_logits_resized_to_the_target(window: int, stride: int):
    overrides = {"segmenter.window": window, "segmenter.stride": stride}
    task = tiny.task("segment", overrides)
    model: Any = tiny.built(task).eval()
    sample = tiny.sample("segment", 1, (10, 10, 50, 40), (80, 64))
    target = np.random.default_rng(0).integers(0, 4, (120, 96)).astype(np.uint8)
    target[target == 3] = 255
    scores, expected = task.new_scores(), SegmentationScores(list(tiny.CLASSES))
    task.score(model, tiny.batch([sample | {"target": target}]), CPU, scores)

    data = task.config.data
    pixels = torch.from_numpy(sample["image"]).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    images = ((pixels - mean) / std)[None]
    with torch.no_grad():
        logits = model.predict(images, window=window or None, stride=stride)
    logits = F.interpolate(logits, (120, 96), mode="bilinear", align_corners=False)
    expected.add(logits[0].argmax(0), torch.from_numpy(target))
    assert torch.equal(scores.state()["confusion"], expected.confusion)


@pytest.mark.parametrize("short_side", [0, 32])
def test_images_are_predicted_in_the_size_of_evaluation(short_side: int):
    task: Any = tiny.task("segment", {"segmenter.eval_short_side": short_side})
    model = tiny.built(task).eval()
    image = np.random.default_rng(2).integers(0, 256, (70, 111, 3), dtype=np.uint8)
    files = [io.BytesIO(), io.BytesIO()]
    for file, pixels in zip(files, (image, np.zeros((70, 111), np.uint8)), strict=True):
        Image.fromarray(pixels).save(file, "PNG")
    encoded, mask = (file.getvalue() for file in files)
    sample = SegmentSamples(task.config, 3).evaluate(Sample(0, encoded, {"mask": mask}))
    scores = task.new_scores()
    task.score(model, tiny.batch([sample]), CPU, scores)
    (prediction,) = task.predict(model, [image], CPU)
    counts = np.bincount(prediction["mask"].ravel(), minlength=3)
    assert (counts > 0).sum() > 1  # or any size would do
    assert scores.state()["confusion"][0].tolist() == counts.tolist()


def test_windows_are_those_of_the_config():
    whole, sliding = (
        tiny.task("segment", {"segmenter.window": w, "segmenter.stride": 16}) for w in (0, 32)
    )
    model = tiny.built(whole).eval()
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    masks = [task.predict(model, [image], CPU)[0]["mask"] for task in (whole, sliding)]
    assert (masks[0] != masks[1]).any()


def test_beside_one_good_sample_bad_ones_are_seen_but_not_learnt():
    task = tiny.task("segment")
    (good,) = tiny.samples("segment", 1)
    bad = tiny.sample("segment", 1, (0, 0, 60, 60))
    ignored = bad | {"target": np.full_like(bad["target"], 255)}
    results = [
        tiny.gradients_of(task, tiny.batch([first, good], bad=(0,))) for first in (bad, ignored)
    ]
    assert torch.equal(results[0][0], results[1][0]) and results[0][0][0] > 0
    for parameter, gradient in results[0][1].items():
        assert gradient.isfinite().all() and gradient.any(), parameter
        assert torch.equal(gradient, results[1][1][parameter]), parameter


def test_good_samples_without_a_labelled_pixel_give_zeros():
    task = tiny.task("segment")
    nothing = {"target": np.full((tiny.SIDE, tiny.SIDE), 255, np.uint8)}
    samples = [sample | nothing for sample in tiny.samples("segment", 2)]
    losses, gradients = tiny.gradients_of(task, tiny.batch(samples))
    assert losses.tolist() == [0, 0, 0]
    assert not any(gradient.any() for gradient in gradients.values())


def test_only_training_images_are_distorted_each_in_its_own_way():
    task: Any = tiny.task("segment", {"segmenter.photometric": True})
    plain: Any = tiny.task("segment")
    same = tiny.samples("segment", 1) * 8
    torch.manual_seed(0)
    distorted, given = task._training_images(same, CPU), plain._training_images(same, CPU)
    assert len({tuple(image.flatten().tolist()) for image in distorted}) > 5
    assert torch.equal(given, given[:1].expand_as(given))
    model = tiny.built(task).eval()
    images = [same[0]["image"]]
    first, second = (t.predict(model, images, CPU)[0]["mask"] for t in (task, plain))
    assert (first == second).all()


def test_the_model_is_built_as_the_config_says():
    task: Any = tiny.task("segment", {"model.rel_pos_bias": False, "model.drop_path_rate": 0.3})
    model: Any = task.build()
    assert tiny.drop_path_rate(model) == 0.3
    assert model.num_classes == 3 and not model.encoder.backbone.rel_pos_bias
    assert model.decode_head.fuse[0].out_channels == 16
    model = type(task)(task.config, task.classes, pretrain_size=96).build()
    assert model.encoder.backbone.pos_embed_grid == (6, 6)
    assert model.encoder.backbone.grid == (4, 4)
