"""Classification: torchvision's evaluation crops, timm's RandAugment, and samples that stay put."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform, transforms_imagenet_eval
from torchvision import transforms

from pipeline.decoding import BadImageError
from pipeline.downstream.classify_samples import (
    ClassifySamples,
    global_generators_from,
    rand_augment,
)
from pipeline.downstream.samples import Arrays, BadAnnotationError
from pipeline.transforms import random_resized_crop
from tests.pipeline.downstream.labelled import classify_config, make_sample, rng
from tests.pipeline.samples import bad_images, encode, noise_image

POLICY = "rand-m9-mstd0.5-inc1"
IMAGE = encode(noise_image(1, (90, 70)))


def samples(**overrides: Any) -> ClassifySamples:
    return ClassifySamples(classify_config(**overrides), num_classes=3)


def augmented(seed: int = 0, image: bytes = IMAGE, **overrides: Any) -> NDArray[np.uint8]:
    maker = samples(augment__rand_augment=POLICY, **overrides)
    return maker.train(make_sample(image, label=1), rng(seed))["image"]


def assert_same(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


# ---- training ----


def test_a_training_sample_is_the_crop_of_pre_training_and_the_label():
    config = classify_config(data__crop_scale=(0.08, 1.0))
    made = samples(data__crop_scale=(0.08, 1.0)).train(make_sample(IMAGE, label=2), rng(5))
    crop = random_resized_crop(
        IMAGE, rng(5), image_size=64, scale=(0.08, 1.0), ratio=config.data.crop_ratio, flip_prob=0.5
    )
    np.testing.assert_array_equal(made["image"], crop)
    assert made["label"] == 2 and made["label"].shape == () and made["label"].dtype == np.int64


@pytest.mark.parametrize("policy", [POLICY, "rand-m7-n3", "rand-m9-mstd0.5-inc1-tweights"])
def test_rand_augment_is_that_of_timms_create_transform(policy: str):
    mean = (0.48, 0.46, 0.41)
    theirs = create_transform(
        64, is_training=True, auto_augment=policy, interpolation="bicubic", mean=mean
    ).transforms[2]
    ours: Any = rand_augment(policy, 64, mean)
    for a, b in zip(ours.ops, theirs.ops, strict=True):
        assert a.hparams == b.hparams and a.kwargs == b.kwargs
    image = noise_image(2, (64, 64))
    for seed in range(20):
        outputs = []
        for augment in (ours, theirs):
            with global_generators_from(rng(seed)):
                outputs.append(np.asarray(augment(image)))
        np.testing.assert_array_equal(*outputs)


def test_rand_augment_changes_most_crops_and_each_in_its_own_way():
    flat = encode(Image.new("RGB", (64, 64), (90, 140, 60)).resize((64, 64)))
    images = {augmented(seed, flat).tobytes() for seed in range(40)}
    # Two of 15 operations, each with probability 1/2; some leave a flat image as it is.
    assert len(images) > 10


def test_an_augmented_sample_depends_on_its_own_generator_alone():
    expected = [augmented(seed) for seed in range(8)]
    for seed in reversed(range(8)):
        random.seed(seed * 3)
        np.random.seed(seed * 5)
        random.random(), np.random.rand(3)
        np.testing.assert_array_equal(augmented(seed), expected[seed])


def test_threads_that_augment_at_the_same_time_make_the_same_samples():
    expected = [augmented(seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(augmented, range(40)))
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_global_generators_are_left_as_they_were():
    random.seed(1)
    np.random.seed(2)
    before = (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])
    augmented()
    with pytest.raises(KeyError), global_generators_from(rng()):
        random.random(), np.random.rand()
        raise KeyError
    after = (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])
    assert before == after


@pytest.mark.parametrize("policy", ["rand-m9-x3", "random"])
def test_an_unknown_policy_is_named(policy: str):
    with pytest.raises(ValueError, match=rf"rand_augment='{policy}' is no policy of timm.*rand-m9"):
        rand_augment(policy, 64, (0.5, 0.5, 0.5))


# ---- evaluation ----


def evaluated(image: bytes, image_size: int) -> NDArray[np.uint8]:
    return samples(data__image_size=image_size).evaluate(make_sample(image, label=0))["image"]


def muted_noise(size: tuple[int, int]) -> Image.Image:
    """Noise around grey: the kernel's overshoot stays between 0 and 255."""
    return Image.fromarray(np.asarray(noise_image(0, size)) // 4 + 96)


def official_crop(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """itpn_pixel/util/datasets.py:51-65."""
    ratio = 224 / 256 if image_size <= 224 else 1.0
    bicubic = transforms.InterpolationMode.BICUBIC
    resized = transforms.Resize(int(image_size / ratio), interpolation=bicubic)(image)
    return np.asarray(transforms.CenterCrop(image_size)(resized))


def assert_close(pixels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    assert pixels.shape == expected.shape
    error = np.abs(pixels.astype(int) - expected)
    # Two roundings in another order, as in test_transforms.py; a shift by a pixel of this noise
    # would be 20 levels in the mean.
    assert error.max() <= 2
    assert error.mean() < 0.5


@settings(deadline=None, max_examples=50)
@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    image_size=st.sampled_from([16, 48, 64, 224, 240]),
)
def test_evaluation_crop_is_torchvisions_by_the_official_rule(
    size: tuple[int, int], image_size: int
):
    image = muted_noise(size)
    assert_close(evaluated(encode(image), image_size), official_crop(image, image_size))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (256, 900)])
def test_evaluation_crop_at_224_is_timms(size: tuple[int, int]):
    image = muted_noise(size)
    transform = transforms_imagenet_eval(
        224, crop_pct=0.875, interpolation="bicubic", use_prefetcher=True
    )
    expected = np.asarray(transform(image)).transpose(1, 2, 0)
    assert_close(evaluated(encode(image), 224), expected)


def test_above_224_pixels_the_short_side_is_not_cropped():
    image = Image.new("RGB", (600, 480), (0, 200, 0))
    image.paste((200, 0, 0), (0, 0, 600, 2))  # 2 of 480 rows are one of 240
    assert evaluated(encode(image), 240)[0, :, 0].min() > 100
    assert evaluated(encode(image), 224)[..., 0].max() < 10, "here the margin is cropped away"


def test_evaluation_draws_nothing():
    maker = samples(augment__rand_augment=POLICY)
    first, second = (maker.evaluate(make_sample(IMAGE, label=0)) for _ in range(2))
    assert_same(first, second)


def test_a_blank_sample_looks_like_any_other():
    maker = samples()
    made, blank = maker.train(make_sample(IMAGE, label=0), rng()), maker.blank()
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (v.shape, v.dtype) for k, v in blank.items()
    }
    assert not blank["image"].any()


# ---- what is wrong ----


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"label is null; labels are 0 \.\.\. 2"),
        (3, "label 3 is outside the 3 classes"),
        (-1, "label -1 is outside the 3 classes"),
    ],
)
def test_a_label_of_no_class_makes_the_sample_bad(label: int | None, message: str):
    with pytest.raises(BadAnnotationError, match=message):
        samples().train(make_sample(IMAGE, label=label), rng())
    with pytest.raises(BadAnnotationError, match=message):
        samples().evaluate(make_sample(IMAGE, label=label))


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_said_to_be_bad(name: str):
    for make in (lambda s: samples().train(s, rng()), samples().evaluate):
        with pytest.raises(BadImageError):
            make(make_sample(bad_images()[name][0], label=0))
