"""From a source to samples, without Ray; and data sets a task cannot learn from."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.data import Batch, Draws
from pipeline.downstream.detect_samples import mask_runs, unpack_masks
from pipeline.downstream.samples import Arrays, maker_builder, unpack
from pipeline.downstream.task_samples import (
    check_data,
    check_same_classes,
    classes_of,
    num_classes_of,
    task_samples,
)
from pipeline.finetune_config import FinetuneConfig
from pipeline.sources import Index, build_index
from tests.conftest import REPO_ROOT
from tests.pipeline.downstream.labelled import (
    PALETTE,
    classify_config,
    detect_config,
    random_rectangles,
    rng,
    run_lengths,
    segment_config,
)
from tests.pipeline.preparing import no_ray, prepare_rows
from tests.pipeline.samples import noise_image

SIZE = (60, 40)
NUM_IMAGES = 6
needs_preparing = pytest.mark.usefixtures(no_ray.__name__)


def prepared(source: Path, **settings: Any) -> Index:
    """Index of a prepared source; damaged images stay in, as only their headers are read."""
    prepare_rows(source, source.parent / "out", verify=False, **settings)
    return build_index(str(source.parent / "out/train"))


def class_folders(folder: Path) -> Index:
    """Images of three classes, each of the colour of its class."""
    for i in range(NUM_IMAGES):
        path = folder / "in" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), PALETTE[i % 3], np.uint8)).save(path)
    return prepared(folder / "in")


def coco(folder: Path, *, with_masks: bool = True) -> Index:
    """Images with 0 to 5 rectangles over each other; object j is of class j."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(NUM_IMAGES):
        ids, boxes = random_rectangles(rng(i), SIZE, i)
        Image.fromarray(PALETTE[ids]).save(folder / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]})
        for j, (x0, y0, x1, y1) in enumerate(boxes, 1):
            runs = {"size": [SIZE[1], SIZE[0]], "counts": run_lengths(ids == j).decode()}
            values = {"id": len(annotations), "image_id": i, "category_id": j, "iscrowd": 0}
            values |= {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            annotations.append(values | ({"segmentation": runs} if with_masks else {}))
    categories = [{"id": j, "name": f"class {j}"} for j in range(1, NUM_IMAGES)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))
    return prepared(folder / "instances.json", images=str(folder / "images"))


def pairs(folder: Path) -> Index:
    """Images in the colours of their masks' classes."""
    for i in range(NUM_IMAGES):
        ids, _ = random_rectangles(rng(i), SIZE, 1 + i % 4)
        for name, pixels in (("images", PALETTE[ids]), ("annotations", ids)):
            (folder / "in" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "in" / name / f"{i}.png")
    return prepared(folder / "in")


def batch(config: FinetuneConfig, index: Index, *, is_training: bool = True) -> Batch:
    """All samples of a data set, last row first."""
    rows = np.arange(index.num_samples)[::-1].copy()
    build = pickle.loads(pickle.dumps(maker_builder(task_samples, is_training=is_training)))
    return build(config, index).batch(Draws(rows + 100, np.zeros_like(rows), rows))


def assert_all_good(made: Batch) -> list[Arrays]:
    assert made["bad"].tolist() == [""] * NUM_IMAGES
    assert made["row"].tolist() == [*range(NUM_IMAGES)][::-1]
    assert made["position"].tolist() == [100 + row for row in made["row"]]
    return unpack(made)


# ---- end to end ----


@needs_preparing
@pytest.mark.parametrize("is_training", [True, False])
def test_class_folders_become_crops_with_labels(tmp_path: Path, is_training: bool):
    index, config = class_folders(tmp_path), classify_config()
    check_data(config, index)
    assert classes_of(config, index) == ("a", "b", "c")
    samples = assert_all_good(batch(config, index, is_training=is_training))
    for made in samples:
        assert made["image"].shape == (64, 64, 3)
        assert (made["image"] == PALETTE[made["label"].item()]).all()
    assert sorted(made["label"].item() for made in samples) == [0, 0, 1, 1, 2, 2]


@needs_preparing
@pytest.mark.parametrize("is_training", [True, False])
def test_a_coco_file_becomes_images_with_objects(tmp_path: Path, is_training: bool):
    index, config = coco(tmp_path), detect_config()
    check_data(config, index)
    assert num_classes_of(config, index) == 5
    samples = assert_all_good(batch(config, index, is_training=is_training))
    num_objects = 0
    for made in samples:
        height, width = made["image"].shape[:2]
        masks = unpack_masks(made, (height, width))
        num_objects += len(made["boxes"])
        for label, mask in zip(made["labels"], masks, strict=True):
            is_colour = (made["image"] == PALETTE[label]).all(-1)
            np.testing.assert_array_equal(mask.astype(bool), is_colour)
    assert num_objects == 15 or is_training, "0 + 1 + ... + 5"
    assert num_objects > 8
    assert all(("is_crowd" in made) != is_training for made in samples)


@needs_preparing
@pytest.mark.parametrize("is_training", [True, False])
def test_pairs_become_images_with_targets(tmp_path: Path, is_training: bool):
    config = segment_config(
        segmenter__reduce_zero_label=True,
        segmenter__scale_range=(40 / 64, 40 / 64),  # to their own size
        segmenter__eval_short_side=0,
    )
    index = pairs(tmp_path)
    check_data(config, index)
    assert classes_of(config, index) == ("1", "2", "3", "4")
    for made in assert_all_good(batch(config, index, is_training=is_training)):
        is_labelled = made["target"] != 255
        colours = PALETTE[made["target"][is_labelled] + 1]  # 0 is no class
        np.testing.assert_array_equal(made["image"][is_labelled], colours)
        assert is_labelled.any() and made["target"][is_labelled].max() <= 3


@needs_preparing
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_bad_samples_keep_their_places_and_leave_the_others_alone(
    tmp_path: Path, task: str, is_training: bool
):
    """A class less than the data have makes some bad, a damaged file another."""
    config: FinetuneConfig = classify_config()
    if task == "classify":
        index, error = class_folders(tmp_path), "outside the 2 classes"
    elif task == "detect":
        config, index, error = detect_config(), coco(tmp_path), "outside the 4 classes"
    else:
        config, index, error = segment_config(), pairs(tmp_path), "a pixel of class 4"
    whole = batch(config, index, is_training=is_training)
    fewer = replace(index, classes=index.classes[:-1])
    made = batch(config, fewer, is_training=is_training)
    is_bad = made["bad"] != ""
    assert is_bad.any() and not is_bad.all()
    assert made["row"].tolist() == whole["row"].tolist()
    for bad, row, before, after in zip(
        made["bad"], made["row"], whole["packed"], made["packed"], strict=True
    ):
        assert bad or before == after
        if bad:
            path, sample_id, kind, message = json.loads(bad)
            assert path.endswith(f":0:{row}") and isinstance(sample_id, int)
            assert kind == "BadAnnotationError" and error in message
    samples = unpack(made)
    assert all(not samples[i]["image"].any() for i in np.flatnonzero(is_bad))


@needs_preparing
def test_a_damaged_image_keeps_its_place(tmp_path: Path):
    for i in range(4):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i).save(path)
    damaged = tmp_path / "in/b/3.png"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    made = batch(classify_config(), prepared(tmp_path / "in"))
    assert (made["bad"] != "").sum() == 1
    place = int(np.flatnonzero(made["bad"] != "")[0])
    assert "image file is truncated" in made["bad"][place]
    for i, sample in enumerate(unpack(made)):
        assert sample["image"].any() == (i != place)


@needs_preparing
def test_the_same_draw_gives_the_same_bytes_and_another_epoch_others(tmp_path: Path):
    config, index = detect_config(), coco(tmp_path)
    maker = maker_builder(task_samples, is_training=True)(config, index)
    rows = np.arange(NUM_IMAGES)
    batches = [maker.batch(Draws(rows, np.full_like(rows, epoch), rows)) for epoch in (0, 0, 1)]
    first, again, other = (made["packed"].tolist() for made in batches)
    assert first == again
    assert first != other


@needs_preparing
def test_data_without_masks_teach_boxes(tmp_path: Path):
    index = coco(tmp_path, with_masks=False)
    config = detect_config(detector__kind="faster_rcnn")
    check_data(config, index)
    assert all("mask_bytes" not in made for made in assert_all_good(batch(config, index)))
    with pytest.raises(ValueError, match=r"has no box_masks.*it has boxes: .*kind faster_rcnn"):
        check_data(detect_config(), index)
    with pytest.raises(ValueError, match=r"detector\.kind cascade_rcnn"):
        check_data(detect_config(detector__kind="cascade_mask_rcnn"), index)
    # Prepared together with others that have masks, these are forgiven in evaluation.
    made = unpack(batch(detect_config(), index, is_training=False))
    assert all(not any(mask_runs(sample)) for sample in made)


# ---- what is refused ----


def an_index(classes: tuple[str, ...] = ("a", "b"), *annotations: str, **values: Any) -> Index:
    options = {"is_parquet": True, "is_prepared": True, **values}
    return Index("/data", pa.table({}), classes=classes, annotations=annotations, **options)


@pytest.mark.parametrize(
    ("config", "annotations", "message"),
    [
        (classify_config(), ("mask",), r"has no label, which task 'classify' needs; it has mask:"),
        (detect_config(), ("label",), r"has no boxes and no box_masks, .* it has label: prepare a"),
        (segment_config(), (), r"has no mask, .* it has no annotations: prepare images with masks"),
    ],
)
def test_data_without_the_tasks_annotations_are_refused(
    config: FinetuneConfig, annotations: tuple[str, ...], message: str
):
    with pytest.raises(ValueError, match=message):
        check_data(config, an_index(("a", "b"), *annotations))


def test_data_that_are_not_prepared_are_refused():
    index = an_index(is_prepared=False)
    with pytest.raises(ValueError, match=r"data\.val_path='/data' is no prepared.*jobs\.prepare_"):
        check_data(classify_config(), index, "data.val_path")


def test_data_without_classes_are_refused():
    with pytest.raises(ValueError, match="has 0 classes"):
        check_data(classify_config(), an_index((), "label"))
    config = segment_config(segmenter__reduce_zero_label=True)
    with pytest.raises(ValueError, match="1 classes, 0 of which can be learnt"):
        check_data(config, an_index(("0",), "mask"))


def test_a_policy_timm_does_not_know_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="no policy of timm"):
        check_data(classify_config(augment__rand_augment="rand-z9"), an_index(("a",), "label"))


def test_masks_hold_254_classes():
    numbers = tuple(str(i) for i in range(255))
    check_data(segment_config(), an_index(numbers[:254], "mask"))
    check_data(segment_config(segmenter__reduce_zero_label=True), an_index(numbers, "mask"))
    with pytest.raises(ValueError, match="255 classes, segmentation takes at most 254"):
        check_data(segment_config(), an_index(numbers, "mask"))
    check_data(classify_config(), an_index(numbers, "label"))


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (("a", "b", "c"), ("a", "c"), r"only in data\.path: b\)"),
        (("a", "b"), ("a", "d", "b"), r"only in data\.val_path: d\)"),
        (("a", "b"), ("b", "a"), r"differ \(in their order\)"),
        (("a", "b"), ("0", "1"), r"data\.path: a, b; only in data\.val_path: 0, 1"),
        (("a",), tuple("abcdefghijklmnop"), r"b, c, d, e, f, g, h, i, j, k, \.\.\.\)"),
        (("1", "2"), ("0", "1", "2"), r"only in data\.val_path: 0"),
    ],
)
def test_train_and_val_must_number_their_classes_alike(
    train: tuple[str, ...], val: tuple[str, ...], message: str
):
    with pytest.raises(ValueError, match=message):
        check_same_classes(an_index(train), an_index(val))


def test_of_numbered_classes_the_longer_list_holds():
    train, val = an_index(("0", "1", "2")), an_index(("0", "1", "2", "3"))
    for pair in ((train, val), (val, train), (train, train)):
        check_same_classes(*pair)
    config = segment_config(segmenter__reduce_zero_label=True)
    assert classes_of(config, train, val) == ("1", "2", "3")
    assert num_classes_of(segment_config(), val, train) == 4
    check_same_classes(an_index(("x", "y")), an_index(("x", "y")))


# ---- data processes ----


def test_a_data_process_does_not_import_torch():
    names = ("resized_crop", "classify_samples", "detect_samples", "segment_samples")
    code = "import importlib, sys\n"
    for name in (*names, "task_samples"):
        code += f"importlib.import_module('pipeline.downstream.{name}')\n"
        code += f"assert 'torch' not in sys.modules, '{name}'\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO_ROOT, timeout=120)


@needs_preparing
def test_making_samples_does_not_import_torch_either(tmp_path: Path):
    """Of all tasks, in training and evaluation."""
    for folder, source in (("c", class_folders), ("d", coco), ("s", pairs)):
        index = source(tmp_path / folder)
        (tmp_path / f"{folder}.pickle").write_bytes(pickle.dumps(index))
    code = """
import pickle, sys
from pathlib import Path
import numpy as np
from pipeline.data import Draws
from pipeline.downstream.samples import maker_builder
from pipeline.downstream.task_samples import task_samples
rows = np.arange(6)
for name in "cds":
    config, index = (pickle.loads(Path(f"{sys.argv[1]}/{name}{end}").read_bytes())
                     for end in (".config", ".pickle"))
    for is_training in (True, False):
        build = maker_builder(task_samples, is_training=is_training)
        batch = build(config, index).batch(Draws(rows, rows * 0, rows))
        assert not any(batch["bad"]), batch["bad"]
assert "torch" not in sys.modules and "timm" not in sys.modules
"""
    configs = {"c": classify_config(), "d": detect_config(), "s": segment_config()}
    for name, config in configs.items():
        (tmp_path / f"{name}.config").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, cwd=REPO_ROOT, timeout=120)
