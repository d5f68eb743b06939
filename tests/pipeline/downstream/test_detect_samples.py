"""Detection: boxes, masks and pixels stay together through crop and flip; DETR's crops."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.downstream.detect_samples import (
    DetectSamples,
    crop_objects,
    mask_runs,
    random_crop_box,
    unpack_masks,
)
from pipeline.downstream.samples import Arrays, BadAnnotationError
from pipeline.reading import Sample
from tests.pipeline.downstream.labelled import (
    PALETTE,
    detect_config,
    detection_sample,
    make_sample,
    png,
    random_rectangles,
    rng,
    run_lengths,
)
from tests.pipeline.samples import encode, exif, noise_image

SIZE = (40, 30)
IMAGE = encode(noise_image(0, SIZE))
BOX = [4.0, 6.0, 20.0, 16.0]


def samples(**overrides: Any) -> DetectSamples:
    return DetectSamples(detect_config(**overrides), num_classes=80)


def masks_of(made: Arrays) -> NDArray[np.uint8]:
    height, width = made["image"].shape[:2]
    return unpack_masks(made, (height, width))


def pixel_mask(box: list[float], size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """The pixels (H, W) of a box."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = 1
    return mask


def one_box(**values: Any) -> Sample:
    """A sample of one object, with what is given in place of the usual annotations."""
    mask = run_lengths(pixel_mask(BOX))
    usual = {"boxes": [BOX], "box_labels": [1], "box_is_crowd": [False], "box_masks": [mask]}
    return make_sample(IMAGE, **(usual | values))


# ---- geometry ----


def assert_objects_are_where_their_pixels_are(made: Arrays) -> None:
    """Each mask is exactly the pixels of its colour, each box holds them all."""
    masks = masks_of(made)
    for label, box, mask in zip(made["labels"], made["boxes"], masks, strict=True):
        is_colour = (made["image"] == PALETTE[label]).all(-1)
        np.testing.assert_array_equal(mask.astype(bool), is_colour)
        rows, columns = np.nonzero(is_colour)
        assert box[0] <= columns.min() and box[2] >= columns.max() + 1
        assert box[1] <= rows.min() and box[3] >= rows.max() + 1
    height, width = made["image"].shape[:2]
    assert (made["boxes"] >= 0).all()
    assert (made["boxes"] <= [width, height, width, height]).all()


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    num=st.integers(0, 6),
    seed=st.integers(0, 2**32),
    flip_prob=st.sampled_from([0.0, 1.0]),
    crop_prob=st.sampled_from([0.0, 1.0]),
)
def test_boxes_masks_and_pixels_go_through_crop_and_flip_together(
    size: tuple[int, int], num: int, seed: int, flip_prob: float, crop_prob: float
):
    sample = detection_sample(*random_rectangles(rng(seed), size, num))
    maker = samples(data__flip_prob=flip_prob, detector__crop_prob=crop_prob)
    made = maker.train(sample, rng(seed))
    assert_objects_are_where_their_pixels_are(made)
    colours = [i for i in range(1, num + 1) if (made["image"] == PALETTE[i]).all(-1).any()]
    assert made["labels"].tolist() == colours, "all that can be seen, and nothing else"
    assert made["boxes"].dtype == np.float32 and made["labels"].dtype == np.int64


@settings(deadline=None, max_examples=100)
@given(
    size=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    seed=st.integers(0, 2**32),
    flip_prob=st.sampled_from([0.0, 1.0]),
)
def test_the_box_of_a_whole_rectangle_fits_its_pixels_exactly(
    size: tuple[int, int], seed: int, flip_prob: float
):
    maker = samples(data__flip_prob=flip_prob, detector__crop_prob=1.0)
    made = maker.train(detection_sample(*random_rectangles(rng(seed), size, 1)), rng(seed))
    for box in made["boxes"]:
        rows, columns = np.nonzero((made["image"] == PALETTE[1]).all(-1))
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == expected  # whole numbers: nothing to round


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_boxes_are_in_the_frame_a_viewer_sees(orientation: int):
    viewed = Image.fromarray(PALETTE[random_rectangles(rng(3), SIZE, 3)[0]])
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    stored = viewed.transpose(turns.get(orientation, Image.Transpose.ROTATE_270))
    sample = detection_sample(*random_rectangles(rng(3), SIZE, 3))
    turned = sample._replace(encoded=encode(stored, exif=exif(orientation)))
    np.testing.assert_array_equal(samples().evaluate(turned)["image"], np.asarray(viewed))
    for seed in range(5):
        assert_objects_are_where_their_pixels_are(samples().train(turned, rng(seed)))


def test_boxes_are_clipped_as_detr_does_it_and_not_shrunk_to_the_mask():
    mask = pixel_mask([5, 5, 15, 8]) | pixel_mask([5, 5, 8, 25])  # an L
    sample = one_box(boxes=[[5.0, 5.0, 15.0, 25.0]], box_masks=[run_lengths(mask)])
    objects = samples()._objects(sample.annotations, SIZE)
    cropped = crop_objects(objects, SIZE, (9, 0, 40, 30), is_flipped=False)
    assert cropped.boxes.tolist() == [[0, 5, 6, 25]], "the mask ends at 8"


@pytest.mark.parametrize(
    ("crop", "is_kept"), [((0, 0, 40, 30), True), ((9, 9, 40, 30), False), ((20, 0, 40, 30), False)]
)
def test_objects_without_a_pixel_in_the_crop_are_dropped(
    crop: tuple[int, int, int, int], is_kept: bool
):
    mask = pixel_mask([5, 5, 15, 8]) | pixel_mask([5, 5, 8, 25])
    sample = one_box(boxes=[[5.0, 5.0, 15.0, 25.0]], box_masks=[run_lengths(mask)])
    for is_flipped in (False, True):
        objects = crop_objects(samples()._objects(sample.annotations, SIZE), SIZE, crop, is_flipped)
        assert len(objects.boxes) == len(objects.masks or ()) == len(objects.labels) == is_kept


@pytest.mark.parametrize(
    ("box", "is_kept"),
    [([4.0, 6.0, 5.0, 16.0], True), ([4.0, 6.0, 4.9, 16.0], False), ([4, 6, 20, 6.5], False)],
)
def test_boxes_below_a_pixel_are_not_learnt_but_evaluated(box: list[float], is_kept: bool):
    maker = samples(detector__kind="faster_rcnn")
    assert len(maker.train(one_box(boxes=[box]), rng())["boxes"]) == is_kept
    assert len(maker.evaluate(one_box(boxes=[box]))["boxes"]) == 1


# ---- DETR's crops ----


def detr_crop(size: tuple[int, int], max_size: int) -> tuple[float, float, float, float]:
    """Crop as shares of the image: det/configs/itpn/pixel_itpn_base_1x_ld090_dp005.py, second
    branch, with what mmdet's Resize and RandomCrop('absolute_range') do."""
    short = random.choice([400, 500, 600])
    scale = min(short / min(size), max_size / max(size))
    w, h = int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
    crop_h = random.randint(min(h, 384), min(h, 600))
    crop_w = random.randint(min(w, 384), min(w, 600))
    upper, left = random.randint(0, h - crop_h), random.randint(0, w - crop_w)
    return (left / w, upper / h, (left + crop_w) / w, (upper + crop_h) / h)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 1000), (300, 260), (3000, 700)])
def test_crops_are_distributed_as_detrs(size: tuple[int, int]):
    num = 4000
    random.seed(0)
    theirs = np.array([detr_crop(size, 1333) for _ in range(num)])
    generator = rng()
    ours = np.array([random_crop_box(generator, size, 1333) for _ in range(num)]) / (size * 2)
    for moment in (1, 2):
        a, b = theirs**moment, ours**moment
        deviation = np.sqrt((a.var(0) + b.var(0)) / num)
        # 5 standard deviations of the difference; and where nothing is random, half a pixel of the
        # original image, to which ends are rounded.
        assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * deviation + 1 / min(size)).all()
    whole = (theirs[:, 2] - theirs[:, 0]).max(), (theirs[:, 3] - theirs[:, 1]).max()
    found = (ours[:, 2] - ours[:, 0]).max(), (ours[:, 3] - ours[:, 1]).max()
    assert found == pytest.approx(whole, abs=0.02)


@settings(deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_crops_lie_inside_an_image_of_any_shape(width: int, height: int, seed: int):
    left, upper, right, lower = random_crop_box(rng(seed), (width, height), 1333)
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_half_of_the_samples_are_cropped_and_half_of_them_flipped():
    ids = np.repeat(np.arange(64, dtype=np.uint8)[None], 64, 0)
    sample = make_sample(png(PALETTE[ids]), boxes=None, box_labels=None, box_is_crowd=None)
    num, num_cropped, num_flipped, num_both = 600, 0, 0, 0
    maker = samples(detector__kind="faster_rcnn")
    for seed in range(num):
        pixels = maker.train(sample, rng(seed))["image"]
        order = [int((colour == PALETTE).all(1).argmax()) for colour in pixels[0, :2]]
        is_cropped, is_flipped = pixels.shape[:2] != (64, 64), order[0] > order[1]
        num_cropped += is_cropped
        num_flipped += is_flipped
        num_both += is_cropped and is_flipped
    # 5 standard deviations of 600 fair coins; 1 % of the crops are of the whole image.
    assert abs(num_flipped - num / 2) < 5 * (num / 4) ** 0.5
    assert abs(num_cropped - num / 2) < 5 * (num / 4) ** 0.5 + 0.02 * num
    assert abs(num_both - num / 4) < 5 * (num * 3 / 16) ** 0.5 + 0.02 * num


# ---- which objects ----


@pytest.mark.parametrize("value", [None, []])
def test_an_image_without_objects_is_kept(value: list[Any] | None):
    sample = one_box(boxes=value, box_labels=value, box_is_crowd=value, box_masks=value)
    for made in (samples().train(sample, rng()), samples().evaluate(sample)):
        assert made["boxes"].shape == (0, 4) and made["labels"].shape == (0,)
        assert mask_runs(made) == [] and masks_of(made).shape == (0, *made["image"].shape[:2])


def test_crowds_are_left_out_of_training_and_marked_in_evaluation():
    mask = run_lengths(pixel_mask(BOX))
    sample = one_box(
        boxes=[BOX, BOX], box_labels=[3, 4], box_is_crowd=[True, False], box_masks=[mask, mask]
    )
    made = samples().train(sample, rng())
    assert made["labels"].tolist() == [5], "counted from 1"
    assert "is_crowd" not in made
    made = samples().evaluate(sample)
    assert made["labels"].tolist() == [4, 5] and made["is_crowd"].tolist() == [True, False]
    assert mask_runs(made) == [mask, mask]
    np.testing.assert_array_equal(masks_of(made)[1], pixel_mask(BOX))


def test_evaluation_takes_the_whole_image():
    ids, boxes = random_rectangles(rng(1), (70, 50), 4)
    made = samples().evaluate(detection_sample(ids, boxes))
    np.testing.assert_array_equal(made["image"], PALETTE[ids])
    assert made["boxes"].tolist() == boxes
    np.testing.assert_array_equal(masks_of(made), [(ids == i) for i in range(1, 5)])


def test_masks_are_neither_read_nor_needed_without_a_mask_head():
    maker = samples(detector__kind="cascade_rcnn")
    assert "box_masks" not in maker.columns and "box_masks" in samples().columns
    sample = one_box()
    del sample.annotations["box_masks"]
    for made in (maker.train(sample, rng()), maker.evaluate(sample), maker.blank()):
        assert not {"mask_bytes", "mask_lengths"} & made.keys()


def test_a_blank_sample_has_all_arrays_and_no_object():
    blank, made = samples().blank(), samples().evaluate(one_box())
    assert {k: v.dtype for k, v in blank.items()} == {k: v.dtype for k, v in made.items()}
    assert len(blank["boxes"]) == len(mask_runs(blank)) == 0
    assert blank["image"].ndim == 3 and not blank["image"].any()


def test_a_sample_depends_on_its_generator_alone():
    sample = detection_sample(*random_rectangles(rng(1), (70, 50), 4))
    made = [samples().train(sample, rng(seed)) for seed in (0, 1, 0)]
    for key in made[0]:
        np.testing.assert_array_equal(made[0][key], made[2][key])
    assert made[0]["image"].tobytes() != made[1]["image"].tobytes()


# ---- what is wrong ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"boxes": [[4.0, 6.0, float("nan"), 16.0]]}, r"box 0 is \(4, 6, nan, 16\)"),
        ({"boxes": [[4.0, 6.0, None, 16.0]]}, "box 0 is"),
        ({"boxes": [[20.0, 6.0, 4.0, 16.0]]}, "0 <= x0 < x1 <= 40"),
        ({"boxes": [[4.0, 6.0, 4.0, 16.0]]}, "0 <= x0 < x1 <= 40"),
        ({"boxes": [[-1.0, 6.0, 4.0, 16.0]]}, r"\(-1, 6, 4, 16\) in an image of 40x30"),
        ({"boxes": [[4.0, 6.0, 20.0, 30.5]]}, "0 <= y0 < y1 <= 30: prepare the data again"),
        ({"box_labels": [80]}, r"box 0 has label 80, outside the 80 classes"),
        ({"box_labels": [-1]}, "box 0 has label -1"),
        ({"box_labels": [None]}, "box 0 has label None"),
        ({"box_labels": [1, 2]}, "1 boxes have 2 labels"),
        ({"box_masks": [b"\x01"]}, "run lengths of mask 0 are malformed"),
        ({"box_masks": [run_lengths(np.eye(5))]}, "cover 25 pixels, the image has 40x30"),
    ],
)
def test_annotations_that_do_not_fit_make_the_sample_bad(values: dict[str, Any], message: str):
    with pytest.raises(BadAnnotationError, match=message):
        samples().train(one_box(**values), rng())
    with pytest.raises(BadAnnotationError, match=message):
        samples().evaluate(one_box(**values))


@pytest.mark.parametrize("masks", [[None], None])
def test_a_missing_mask_cannot_be_learnt_from_but_is_forgiven_in_evaluation(masks: Any):
    with pytest.raises(
        BadAnnotationError, match=r"1 of 1 objects lack a mask, the first at \(4, 6, "
    ):
        samples().train(one_box(box_masks=masks), rng())
    made = samples().evaluate(one_box(box_masks=masks))
    assert mask_runs(made) == [b""]
    assert not masks_of(made).any()
    is_crowd = one_box(box_masks=masks, box_is_crowd=[True])
    assert len(samples().train(is_crowd, rng())["boxes"]) == 0
