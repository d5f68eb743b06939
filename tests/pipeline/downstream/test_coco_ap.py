"""AP of boxes and masks: by hand, against faster-coco-eval, with crowds, and over workers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pipeline.downstream.coco_ap import CocoScores
from tests.pipeline.downstream.detections import (
    SIZE,
    Scene,
    prediction_of,
    random_scene,
    target_of,
)
from tests.pipeline.downstream.splitting import merged_keepers

SMALL, MEDIUM, LARGE = [10, 10, 30, 30], [20, 20, 80, 90], [0, 0, 160, 120]
NOTHING: list[list[float]] = []


def scored(
    scenes: list[Scene], classes: tuple[str, ...] = ("cat",), *, with_masks: bool = True
) -> CocoScores:
    scores = CocoScores(list(classes), with_masks=with_masks)
    add(scores, scenes)
    return scores


def add(scores: CocoScores, scenes: list[Scene]) -> None:
    for scene in scenes:
        scores.add(scene.image_id, SIZE, scene.prediction, scene.target)


def scene(prediction: dict[str, Any], target: dict[str, Any], image_id: int = 0) -> Scene:
    return Scene(image_id, prediction, target)


def test_a_perfect_predictor_scores_exactly_100_in_every_figure():
    boxes = [SMALL, MEDIUM, LARGE]
    scenes = [
        scene(prediction_of(boxes, [k, 1, 2]), target_of(boxes, [k, 1, 2]), k) for k in (1, 2)
    ]
    scores = scored(scenes, ("cat", "dog"))
    result = scores.result()
    figures = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    assert result == {f"val/{kind}_{f}": 100.0 for kind in ("box", "mask") for f in figures}
    assert scores.per_class() == scores.per_class("mask") == {"cat": 100.0, "dog": 100.0}


def test_average_precision_of_a_worked_example():
    # Right, wrong, right of three objects: precision 1 up to recall 1/3 (34 of the 101 levels),
    # 2/3 up to recall 2/3 (33 levels), then 0.
    found = prediction_of([SMALL, [100, 90, 130, 110], MEDIUM], scores=[0.9, 0.8, 0.7])
    result = scored([scene(found, target_of([SMALL, MEDIUM, LARGE]))]).result()
    expected = 100 * (34 + 33 * 2 / 3) / 101
    assert result["val/box_ap"] == pytest.approx(expected, abs=1e-8)  # rounded to 9 digits
    assert result["val/mask_ap"] == pytest.approx(expected, abs=1e-8)


def test_overlap_decides_at_which_thresholds_a_box_is_right():
    found = prediction_of([[0, 0, 62, 100]])  # IoU 0.62: right at 0.5, 0.55 and 0.6 of ten
    result = scored([scene(found, target_of([[0, 0, 100, 100]]))]).result()
    for kind in ("box", "mask"):
        figures = [result[f"val/{kind}_{name}"] for name in ("ap", "ap50", "ap75")]
        assert figures == [30.0, 100.0, 0.0]


def test_a_constant_predictor_scores_what_its_share_of_right_images_gives():
    # The same box everywhere with one score, right in every second image: when i are right,
    # precision is i / (2 i - 1) and recall i / 102; above recall 1/2 precision is 0.
    found = prediction_of([SMALL])
    scenes = [scene(found, target_of([MEDIUM if i % 2 else SMALL]), i) for i in range(102)]
    right = [max(1, math.ceil(102 * level / 100)) for level in range(51)]
    expected = 100 * sum(i / (2 * i - 1) for i in right) / 101
    assert scored(scenes).result()["val/box_ap50"] == pytest.approx(expected, abs=1e-8)


def reference_figures(scenes: list[Scene], num_classes: int, iou_type: str) -> dict[str, float]:
    """The same through faster-coco-eval (C++), which reads COCO's own result format."""
    categories = [{"id": k, "name": str(k)} for k in range(1, num_classes + 1)]
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    numbers = {s.image_id: i + 1 for i, s in enumerate(sorted(scenes, key=lambda s: s.image_id))}
    for s in sorted(scenes, key=lambda s: s.image_id):
        number, t, p = numbers[s.image_id], s.target, s.prediction
        for i, (x0, y0, x1, y1) in enumerate(t["boxes"].double().tolist()):
            rle = {"size": list(SIZE), "counts": t["masks"][i].decode()}
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": int(t["labels"][i]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": int(t["is_crowd"][i]),
                    "segmentation": rle,
                    "area": int(coco_mask.decode(rle).sum()),
                }
            )
        for i, (x0, y0, x1, y1) in enumerate(p["boxes"].double().tolist()):
            pixels = np.asfortranarray((p["masks"][i, 0] > 0.5).numpy().astype(np.uint8))
            rle = coco_mask.encode(pixels)
            given = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            if iou_type == "segm":
                given = {"segmentation": {**rle, "counts": rle["counts"].decode()}}
            score = float(p["scores"][i])
            label = int(p["labels"][i])
            found.append({"image_id": number, "category_id": label, "score": score, **given})
    images = [{"id": n, "height": SIZE[0], "width": SIZE[1]} for n in numbers.values()]
    gt = COCO({"images": images, "annotations": truth, "categories": categories})
    evaluation = COCOeval_faster(gt, gt.loadRes(found), iou_type, print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    return {n: 100 * v for n, v in zip(names, evaluation.stats[:6], strict=True) if v > -1}


@pytest.mark.parametrize("seed", range(8))
def test_figures_agree_with_faster_coco_eval(seed: int):
    scenes = [random_scene(100 * seed + i, num_classes=3) for i in range(25)]
    result = scored(scenes, ("cat", "dog", "cup")).result()
    assert 0 < result["val/mask_ap"] < result["val/box_ap50"] < 100, "the scenes prove nothing"
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        reference = reference_figures(scenes, 3, iou_type)
        ours = {k.removeprefix(f"val/{kind}_"): v for k, v in result.items() if f"/{kind}_" in k}
        assert ours == pytest.approx(reference, abs=1e-6)  # ours are rounded to 9 digits


def test_nothing_found_scores_0():
    result = scored([scene(prediction_of(NOTHING), target_of([SMALL, LARGE]))]).result()
    assert set(result.values()) == {0.0}
    assert {"val/box_ap", "val/mask_ap50", "val/box_ap_large"} <= set(result)
    assert "val/box_ap_medium" not in result, "there is no medium object"


def test_where_nothing_is_annotated_there_is_no_figure():
    empty = target_of(NOTHING)
    assert scored([scene(prediction_of([SMALL]), empty)]).result() == {}
    assert scored([scene(prediction_of(NOTHING), empty)]).per_class() == {}
    del empty["masks"]
    assert scored([scene(prediction_of([SMALL]), empty)]).result() == {}


def test_false_positives_in_an_image_without_annotations_count():
    hit = scene(prediction_of([SMALL], scores=[0.5]), target_of([SMALL]), 1)
    assert scored([hit]).result()["val/box_ap"] == 100.0
    false = scene(prediction_of([MEDIUM], scores=[0.9]), target_of(NOTHING), 2)
    result = scored([hit, false]).result()
    assert result["val/box_ap"] == result["val/mask_ap"] == 50.0


def test_a_class_without_objects_is_left_out_of_the_mean():
    found = prediction_of([SMALL, MEDIUM], [1, 2])
    scores = scored([scene(found, target_of([SMALL]))], ("cat", "dog"))
    assert scores.per_class() == {"cat": 100.0}
    assert scores.result()["val/box_ap"] == 100.0


def test_predictions_in_a_crowd_count_neither_way():
    inside, outside = [25, 25, 60, 60], [90, 10, 150, 60]
    target = target_of([SMALL, MEDIUM], is_crowd=[False, True])
    found = prediction_of([inside, inside, SMALL], scores=[0.9, 0.8, 0.5])
    result = scored([scene(found, target)]).result()
    assert result["val/box_ap"] == result["val/mask_ap"] == 100.0
    worse = prediction_of([outside, SMALL], scores=[0.9, 0.5])
    result = scored([scene(worse, target)]).result()
    assert result["val/box_ap"] == result["val/mask_ap"] == 50.0
    unmarked = scored([scene(found, target_of([SMALL, MEDIUM]))]).result()
    assert unmarked["val/box_ap"] < 50, "the crowd flag makes no difference"


def test_an_object_without_mask_is_a_crowd_region_for_masks_only():
    target = target_of([SMALL, MEDIUM])
    target["masks"][1] = None
    both = prediction_of([SMALL, MEDIUM], scores=[0.5, 0.9])
    result = scored([scene(both, target)]).result()
    assert result["val/box_ap"] == result["val/mask_ap"] == 100.0
    missed = scored([scene(prediction_of([SMALL]), target)]).result()
    assert missed["val/box_ap"] < 100 and missed["val/mask_ap"] == 100.0
    del target["masks"]
    without = scored([scene(both, target)]).result()
    assert without["val/box_ap"] == 100.0 and "val/mask_ap" not in without


def test_sizes_go_by_the_mask_where_there_is_one():
    target = target_of([LARGE])
    target["masks"] = target_of([SMALL])["masks"]
    found = prediction_of([LARGE], masks=prediction_of([SMALL])["masks"])
    result = scored([scene(found, target)]).result()
    assert result["val/box_ap_small"] == result["val/mask_ap_small"] == 100.0
    assert "val/box_ap_large" not in result
    del target["masks"]
    result = scored([scene(found, target)], with_masks=False).result()
    assert result["val/box_ap_large"] == 100.0 and "val/box_ap_small" not in result


def test_ids_that_differ_only_beyond_53_bits_are_different_images():
    ids = [2**64 - 1, 2**64 - 2, 2**63, 2**63 + 1, 2**53, 2**53 + 1, 0]
    boxes = [[10.0 * i, 10, 10 * i + 40, 60] for i in range(len(ids))]
    scenes = [scene(prediction_of([b]), target_of([b]), i) for i, b in zip(ids, boxes, strict=True)]
    scores = scored(scenes)
    assert scores.result()["val/box_ap"] == 100.0
    assert sorted(scores.state()["images"]) == sorted(ids)
    numpy_id = CocoScores(["cat"], with_masks=False)
    numpy_id.add(np.uint64(2**64 - 1), SIZE, prediction_of([SMALL]), target_of([SMALL]))  # type: ignore[arg-type]
    assert list(numpy_id.state()["images"]) == [2**64 - 1]


def test_predictions_that_are_not_finite_are_dropped():
    nan, masks = float("nan"), torch.zeros(3, 1, *SIZE)
    masks[1] = prediction_of([SMALL])["masks"][0]
    # Kept, the first would be a false positive ahead of the only hit.
    found = prediction_of([[nan, 0, 9, 9], SMALL, MEDIUM], scores=[0.95, 0.9, nan], masks=masks)
    result = scored([scene(found, target_of([SMALL, MEDIUM]))]).result()
    only = scored([scene(prediction_of([SMALL]), target_of([SMALL, MEDIUM]))]).result()
    assert result == only


def test_nothing_is_printed_and_the_order_of_ids_decides_between_equal_scores(
    capsys: pytest.CaptureFixture[str],
):
    hit = [scene(prediction_of([SMALL]), target_of([SMALL]), 1)]
    false = [scene(prediction_of([MEDIUM]), target_of([SMALL]), 2)]
    first = scored(hit + false).result()
    assert first == scored(false + hit).result()
    swapped = scored([false[0]._replace(image_id=1), hit[0]._replace(image_id=2)]).result()
    assert swapped["val/box_ap"] < first["val/box_ap"]
    assert capsys.readouterr() == ("", "")


def test_what_does_not_fit_is_refused():
    scores = CocoScores(["cat", "dog"], with_masks=True)
    ok = prediction_of([SMALL]), target_of([SMALL])
    with pytest.raises(ValueError, match=r"target label 0 is outside the classes: .* 1 \.\.\. 2"):
        scores.add(0, SIZE, ok[0], target_of([SMALL], [0]))
    with pytest.raises(ValueError, match=r"predicted label 3 is outside the classes"):
        scores.add(0, SIZE, prediction_of([SMALL], [3]), ok[1])
    bare = {name: value for name, value in ok[0].items() if name != "masks"}
    with pytest.raises(ValueError, match="the prediction has no masks; use a model that"):
        scores.add(0, SIZE, bare, ok[1])
    with pytest.raises(AssertionError, match=r"masks of shape \(1, 1, 120, 160\) for an image"):
        scores.add(0, (SIZE[1], SIZE[0]), *ok)
    assert scores.result() == {}, "what was refused must not count"
    scores.add(7, SIZE, *ok)
    with pytest.raises(ValueError, match="image_id=7 was added twice"):
        scores.add(7, SIZE, *ok)
    with pytest.raises(AssertionError, match="workers evaluated image_id=7 twice"):
        scores.merge([scores.state(), scores.state()])


def test_figures_follow_what_is_added_after_they_were_asked_for():
    scores = scored([scene(prediction_of([SMALL]), target_of([SMALL]), 1)])
    state = scores.state()
    assert scores.result()["val/box_ap"] == 100.0
    add(scores, [scene(prediction_of(NOTHING), target_of([SMALL]), 2)])
    assert scores.result()["val/box_ap"] < 100 and scores.per_class()["cat"] < 100
    scores.merge([state])
    assert scores.result()["val/box_ap"] == 100.0


@settings(max_examples=15, deadline=None)
@given(
    num_samples=st.integers(1, 8),
    num_workers=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_sharing_samples_between_workers_changes_no_bit(
    num_samples: int, num_workers: int, seed: int
):
    scenes = [random_scene(seed + i, num_classes=2) for i in range(num_samples)]
    alone = scored(scenes, ("cat", "dog"))
    for keeper in merged_keepers(
        lambda: CocoScores(["cat", "dog"], with_masks=True), add, scenes, num_workers, seed
    ):
        assert keeper.result() == alone.result()
        assert keeper.per_class("mask") == alone.per_class("mask")
