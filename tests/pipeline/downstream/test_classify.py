"""Classification: erasing, mixup, smoothing, scores and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from pipeline.downstream.accuracy import ClassificationScores
from pipeline.downstream.classify import erased, mixed
from pipeline.finetune_config import AugmentConfig
from tests.pipeline.downstream import tiny_tasks as tiny
from tests.pipeline.downstream.tiny_tasks import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

K = len(tiny.CLASSES)
BOTH = AugmentConfig(mixup=0.8, cutmix=1.0)


class Recorder(nn.Module):
    """Returns given logits and remembers the images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.images = torch.zeros(0)

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return 1 * self.logits[: len(images)]


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_tiny_model_learns_four_images_by_heart():
    task, given = tiny.task("classify"), tiny.batch(tiny.samples("classify"))
    model, scores = tiny.overfit(task, given, num_steps=40, lr=4e-3)
    assert scores["val/top1"] == 100 and scores["val/loss"] < 0.2
    shown = [sample["image"] for sample in tiny.samples("classify")]
    for number, prediction in enumerate(task.predict(model, shown, CPU)):
        assert prediction["label"] == number % K
        assert prediction["score"] == prediction["scores"].max() > 0.5
        assert prediction["scores"].shape == (K,)
        # probabilities in float32
        assert prediction["scores"].sum() == pytest.approx(1, abs=1e-6)


def test_scores_are_those_of_the_logits_of_normalised_images():
    task, samples = tiny.task("classify"), tiny.samples("classify")
    logits = torch.randn(4, K)
    model = Recorder(logits)
    scores, expected = task.new_scores(), ClassificationScores(list(tiny.CLASSES))
    task.score(model, tiny.batch(samples), CPU, scores)
    expected.add(logits, torch.tensor([0, 1, 2, 0]))
    assert scores.result() == expected.result()
    pixels = np.stack([sample["image"] for sample in samples]) / 255
    data = task.config.data
    normal = (pixels - np.array(data.mean)) / np.array(data.std)
    # tolerance: float32 against float64
    np.testing.assert_allclose(model.images.permute(0, 2, 3, 1).numpy(), normal, atol=1e-5)


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"augment.label_smoothing": 0.3},
        {"augment.mixup": 0.8, "augment.label_smoothing": 0.3},
        {"augment.mixup": 0.8, "augment.cutmix": 1.0},
    ],
)
def test_the_loss_is_timms(augment: dict[str, Any]):
    task, samples = tiny.task("classify", augment), tiny.samples("classify")
    logits, labels = torch.randn(4, K), torch.tensor([0, 1, 2, 0])
    tiny.seed_all(1)
    model = Recorder(logits)
    (loss,) = task.losses(model, tiny.batch(samples), CPU)

    settings: Any = task.config
    smoothing = settings.augment.label_smoothing
    tiny.seed_all(1)
    if settings.augment.mixup:
        mix = Mixup(
            mixup_alpha=settings.augment.mixup,
            cutmix_alpha=settings.augment.cutmix,
            label_smoothing=smoothing,
            num_classes=K,
        )
        plain = Recorder(logits)
        tiny.task("classify").losses(plain, tiny.batch(samples), CPU)
        tiny.seed_all(1)
        mixture, targets = mix(plain.images.clone(), labels)
        assert torch.equal(model.images, mixture)
        expected = SoftTargetCrossEntropy()(logits, targets)
    else:
        expected = LabelSmoothingCrossEntropy(smoothing)(logits, labels)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)  # order of the sums


@pytest.mark.parametrize("count", [2, 4, 6])
def test_an_image_is_mixed_with_the_one_at_its_mirrored_place(count: int):
    given, labels = images(count), torch.arange(count)
    np.random.seed(0)
    result, targets = mixed(given, labels, AugmentConfig(mixup=0.8), num_classes=count)
    share = float(targets[0, 0])
    assert 0 < share < 1
    for i in range(count):
        expected = share * given[i] + (1 - share) * given[count - 1 - i]
        torch.testing.assert_close(result[i], expected)
        assert targets[i, i] == share
        torch.testing.assert_close(targets[i].sum(), torch.tensor(1.0))
    assert torch.equal(given, images(count))  # the input is left alone


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0), BOTH])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_of_an_odd_number_the_middle_image_stays_as_it_is(count: int, augment: AugmentConfig):
    given, labels = images(count), torch.arange(count)
    np.random.seed(0)
    result, targets = mixed(given, labels, augment, num_classes=count)
    assert result.shape == given.shape and targets.shape == (count, count)
    middle = count // 2
    torch.testing.assert_close(result[middle], given[middle])
    torch.testing.assert_close(targets[middle], torch.eye(count)[middle])
    for i in set(range(count)) - {middle}:
        assert not torch.equal(result[i], given[i])
        assert targets[i, i] < 1 and targets[i, count - 1 - i] > 0
        torch.testing.assert_close(targets[i].sum(), torch.tensor(1.0))


def test_erasing_puts_noise_in_a_rectangle_of_its_own_in_each_image():
    given = torch.full((40, 3, 64, 64), 9.0)  # far outside of normal noise
    torch.manual_seed(0)
    result = erased(given, 1.0)
    assert (given == 9).all()
    boxes = set()
    for image in result:
        changed = (image != 9).all(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        height, width = len(rows), len(columns)
        assert changed.sum() == height * width  # a full rectangle
        assert 0.01 < height * width / 64**2 < 0.35  # 0.02 ... 1/3, of whole pixels
        boxes.add((int(rows[0]), int(columns[0]), height, width))
    assert len(boxes) > 30
    noise = result[result != 9]
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02  # > 5 sigma
    assert torch.equal(erased(given, 0.0), given)


def test_images_of_any_size_are_predicted_from_their_middle():
    """Of a short side of 73 pixels, 64 / (224/256), nothing is resized: what is left is a crop."""
    task: Any = tiny.task("classify")
    model = Recorder(torch.zeros(1, K))
    image = np.random.default_rng(0).integers(0, 256, (73, 101, 3), dtype=np.uint8)
    task.predict(model, [image], CPU)
    upper, left = round((73 - 64) / 2), round((101 - 64) / 2)
    middle = image[upper : upper + 64, left : left + 64]
    expected = task._images([{"image": middle}], CPU)
    # tolerance: a level of 255 in units of the smallest deviation, for the rounding of the resizer
    torch.testing.assert_close(model.images, expected, rtol=0, atol=1 / 255 / 0.224)


def test_predictions_do_not_depend_on_how_many_images_are_asked_for():
    task = tiny.task("classify")
    model = tiny.built(task).eval()
    shown = [np.random.default_rng(i).integers(0, 256, (70, 80 + i, 3), np.uint8) for i in range(6)]
    together = task.predict(model, shown, CPU)  # in micro-batches of 4
    assert len(together) == 6
    for image, prediction in zip(shown, together, strict=True):
        (alone,) = task.predict(model, [image], CPU)
        # kernels sum in another order for another batch size
        np.testing.assert_allclose(prediction["scores"], alone["scores"], atol=1e-5)


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_the_model_is_built_as_the_config_says(rel_pos_bias: bool):
    overrides = {
        "data.image_size": 96,
        "model.rel_pos_bias": rel_pos_bias,
        "model.drop_path_rate": 0.3,
    }
    model: Any = tiny.task("classify", overrides).build()
    assert model.num_classes == K and tiny.drop_path_rate(model) == 0.3
    assert model.backbone.grid == model.backbone.pos_embed_grid == (6, 6)
    assert model.backbone.rel_pos_bias == rel_pos_bias
