"""The detector: levels, heads against torchvision's, a training step, predictions, Cascade."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import generalized_box_iou

from models.detector import ITPNDetector, PyramidBackbone, create_detector
from models.itpn import create_itpn
from models.roi_heads import STAGE_IOUS, StagedRoIHeads
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES = 3
KINDS = ["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "cascade_rcnn"]
Targets = list[dict[str, Tensor]]


def detector(kind: str = "mask_rcnn", **kwargs: object) -> ITPNDetector:
    """The debug encoder with narrow heads, on images of 64 to 128 pixels."""
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "fc_dim": 16, "min_size": 64, "max_size": 128, "samples_per_image": 32}
    return create_detector("itpn_debug", num_classes=NUM_CLASSES, kind=kind, **{**sizes, **kwargs})


def batch() -> tuple[list[Tensor], Targets]:
    """Two images of different sizes, the second without an object."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((90, 120), (70, 64))]
    boxes = torch.tensor([[10.0, 10, 60, 50], [60, 30, 110, 80]])
    masks = torch.zeros(2, 90, 120, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 70, 64, dtype=torch.uint8),
    }
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}, nothing]


# ---- levels ----


@pytest.mark.parametrize("rel_pos_bias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (160, 224)])
def test_the_backbone_gives_five_levels_of_any_image_size(
    height: int, width: int, rel_pos_bias: bool
):
    backbone = PyramidBackbone(create_itpn("itpn_debug", rel_pos_bias=rel_pos_bias))
    levels = backbone(tiny.images(1, height, width))
    assert list(levels) == ["0", "1", "2", "3", "4"]
    for stride, level in zip((4, 8, 16, 32, 64), levels.values(), strict=True):
        assert level.shape == (1, backbone.out_channels, height // stride, width // stride)


def test_coarse_levels_are_averages_of_the_level_before():
    levels = list(PyramidBackbone(create_itpn("itpn_debug"))(tiny.images(1, 64, 128)).values())
    for fine, coarse in pairwise(levels[2:]):
        mean = fine.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
        torch.testing.assert_close(coarse, mean)


def test_anchors_have_the_strides_of_the_levels_and_the_official_sizes():
    model = detector()
    images, _ = model.transform(batch()[0])
    assert images.tensors.shape[-2] % 64 == images.tensors.shape[-1] % 64 == 0
    features = list(model.backbone(images.tensors).values())
    anchors = model.rpn.anchor_generator(ImageList(images.tensors, images.image_sizes), features)[0]
    start = 0
    for stride, level in zip((4, 8, 16, 32, 64), features, strict=True):
        here = anchors[start : start + 3 * level[0, 0].numel()]
        start += len(here)
        assert float(here[3, 0] - here[0, 0]) == (stride if level.shape[-1] > 1 else 0)
        area = (here[1, 2] - here[1, 0]) * (here[1, 3] - here[1, 1])  # the square one
        assert float(area.sqrt()) == 8 * stride
    assert start == len(anchors)


# ---- training ----


@pytest.mark.parametrize(
    ("kind", "box_loss"), [*((kind, "giou") for kind in KINDS), ("mask_rcnn", "smooth_l1")]
)
def test_a_step_reaches_every_parameter_with_finite_losses(kind: str, box_loss: str):
    model = detector(kind, box_loss=box_loss).train()
    images, targets = batch()
    if "mask" not in kind:
        targets = [{k: t for k, t in target.items() if k != "masks"} for target in targets]
    losses = model(images, targets)
    stages = ["_1", "_2", "_3"] if "cascade" in kind else [""]
    expected = {f"loss_{name}{i}" for name in ("classifier", "box_reg") for i in stages}
    expected |= {"loss_objectness", "loss_rpn_box_reg"}
    expected |= {"loss_mask"} if "mask" in kind else set()
    assert set(losses) == expected
    assert all(bool(loss.isfinite()) for loss in losses.values())
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
def test_a_batch_without_objects_trains(kind: str):
    model = detector(kind).train()
    images, targets = batch()
    losses = model(images[1:], targets[1:])
    sum(losses.values()).backward()
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert float(losses["loss_mask"].detach()) == 0
    # distributed training waits for the gradient of every parameter
    assert all(p.grad is not None for p in model.parameters())


def test_a_few_steps_lower_the_loss():
    model = detector().train()
    images, targets = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(6):
        total = sum(model(images, targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.8 * totals[0], totals


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
def test_boxes_keep_their_precision_under_autocast(kind: str):
    model = detector(kind)
    images, targets = batch()
    tensors, _ = model.transform(images)
    with torch.no_grad():
        plain = model.rpn.anchor_generator(tensors, list(model.backbone(tensors.tensors).values()))
        with torch.autocast("cpu", torch.bfloat16):
            levels = model.backbone(tensors.tensors)
            scores, deltas = model.rpn.head(list(levels.values()))
            anchors = model.rpn.anchor_generator(tensors, list(levels.values()))
            predictions = model.eval()(images)
    assert torch.equal(anchors[0], plain[0])
    assert {x.dtype for x in (*scores, *deltas, *levels.values())} == {torch.float32}
    assert {p["boxes"].dtype for p in predictions} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_evaluation_has_a_size_of_its_own_that_training_never_draws():
    model = detector(min_size=(64, 80), eval_min_size=96, max_size=200)
    image = torch.rand(3, 50, 60)
    drawn = {model.train().transform([image])[0].image_sizes[0][0] for _ in range(30)}
    assert drawn == {64, 80}  # one of them alone: once in 2 ** 29
    assert model.eval().transform([image])[0].image_sizes[0][0] == 96
    assert detector(min_size=(64, 80)).eval().transform([image])[0].image_sizes[0][0] == 80


def test_training_without_masks_or_targets_is_refused():
    images, targets = batch()
    del targets[0]["masks"]
    with pytest.raises(ValueError, match="'masks' for a detector with masks"):
        detector().train()(images, targets)
    with pytest.raises(ValueError, match="training needs targets"):
        detector().train().roi_heads({}, [], [], None)


# ---- predictions ----


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_have_torchvisions_format(kind: str):
    model = detector(kind).eval()
    images, _ = batch()
    with torch.no_grad():
        predictions = model(images)
    assert len(predictions) == 2
    for image, p in zip(images, predictions, strict=True):
        n, (height, width) = len(p["scores"]), image.shape[-2:]
        assert 0 < n <= 100
        assert p["boxes"].shape == (n, 4) and p["labels"].shape == (n,)
        assert bool((p["boxes"] >= 0).all())
        assert bool((p["boxes"][:, 2] <= width).all()) and bool((p["boxes"][:, 3] <= height).all())
        assert p["labels"].dtype == torch.int64
        assert set(p["labels"].tolist()) <= set(range(1, NUM_CLASSES + 1))
        assert torch.equal(p["scores"], p["scores"].sort(descending=True).values)
        assert bool(((p["scores"] > 0.05) & (p["scores"] <= 1)).all())
        assert ("masks" in p) == ("mask" in kind)
        if "masks" in p:
            assert p["masks"].shape == (n, 1, height, width)
            assert bool(((p["masks"] >= 0) & (p["masks"] <= 1)).all())


def test_a_prediction_does_not_depend_on_the_other_images_but_for_their_padding():
    model = detector().eval()  # both images fill 64x64
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    with torch.no_grad():
        together, alone = model(images)[0], model(images[:1])[0]
    for key, value in alone.items():  # another batch size, another order of float32 sums
        torch.testing.assert_close(together[key], value, atol=1e-4, rtol=1e-4)


# ---- heads ----


def head_inputs() -> tuple[dict[str, Tensor], list[Tensor], list[tuple[int, int]], Targets]:
    generator = torch.Generator().manual_seed(5)
    features = {
        str(i): torch.randn(1, 16, 128 // s, 128 // s, generator=generator)
        for i, s in enumerate((4, 8, 16, 32, 64))
    }
    corner = torch.rand(60, 2, generator=generator) * 80
    proposals = torch.cat([corner, corner + 8 + torch.rand(60, 2, generator=generator) * 40], dim=1)
    boxes = proposals[:3] + 2
    masks = torch.ones(3, 128, 128, dtype=torch.uint8)
    return (
        features,
        [proposals],
        [(128, 128)],
        [{"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": masks}],
    )


def heads(**kwargs: object) -> StagedRoIHeads:
    torch.manual_seed(0)
    arguments = {"head_dim": 8, "fc_dim": 16, "samples_per_image": 32, **kwargs}
    return tiny.randomize(StagedRoIHeads(16, NUM_CLASSES, **arguments))


def test_one_stage_with_smooth_l1_is_torchvisions_mask_rcnn_head():
    ours = heads(box_loss="smooth_l1")
    stock: RoIHeads = heads(box_loss="smooth_l1").stages[0]
    stock.load_state_dict(ours.stages[0].state_dict())
    stock.mask_roi_pool, stock.mask_head = ours.mask_roi_pool, ours.mask_head
    stock.mask_predictor = ours.mask_predictor
    features, proposals, sizes, targets = head_inputs()
    for model in (ours.eval(), stock.eval()):
        model.eval()
    mine, other = ours(features, proposals, sizes)[0], stock(features, proposals, sizes)[0]
    assert len(mine[0]["boxes"]) > 0
    for key, value in other[0].items():  # ours takes the softmax of a log-softmax
        torch.testing.assert_close(mine[0][key], value, atol=1e-6, rtol=1e-5)

    losses = []
    for model in (ours.train(), stock.train()):
        torch.manual_seed(1)  # the sampler draws regions
        losses.append(model(features, list(proposals), sizes, targets)[1])
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[1].items():
        assert torch.equal(losses[0][key], value), key


def test_the_giou_loss_is_ten_times_one_minus_giou_per_region():
    model = heads(with_masks=False).train()
    stage: RoIHeads = model.stages[0]
    features, proposals, sizes, targets = head_inputs()
    torch.manual_seed(1)
    loss = model(features, list(proposals), sizes, targets)[1]["loss_box_reg"]

    torch.manual_seed(1)
    regions, matched, labels, _ = stage.select_training_samples(list(proposals), targets)
    _, deltas = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, regions, sizes)))
    decoded = stage.box_coder.decode(deltas, regions)  # (R, K, 4)
    total = 0.0
    for r, label in enumerate(labels[0].tolist()):
        if label:
            wanted = targets[0]["boxes"][matched[0][r]]
            total += 10 * (
                1 - float(generalized_box_iou(decoded[r, label][None], wanted[None]).detach())
            )
    assert total > 0
    assert float(loss.detach()) == pytest.approx(total / len(labels[0]), rel=1e-4)


def test_a_cascade_of_equal_stages_that_move_no_box_detects_as_its_stages_do():
    model = heads(num_stages=3, with_masks=False).eval()
    for stage in model.stages:
        stage.load_state_dict(model.stages[0].state_dict())
        torch.nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        torch.nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
    features, proposals, sizes, _ = head_inputs()
    cascade = model(features, proposals, sizes)[0][0]
    model.stages = model.stages[:1]
    single = model(features, proposals, sizes)[0][0]
    for key, value in single.items():  # the mean of three equal numbers, in float32
        torch.testing.assert_close(cascade[key], value, atol=1e-5, rtol=1e-5)


def test_stages_of_a_cascade_ask_for_growing_overlap_and_refine_the_proposals():
    model = heads(num_stages=3).train()
    assert [stage.proposal_matcher.high_threshold for stage in model.stages] == list(STAGE_IOUS)
    assert all(stage.box_predictor.bbox_pred.out_features == 4 for stage in model.stages)
    seen: list[Tensor] = []
    for stage in model.stages:
        stage.box_roi_pool.register_forward_pre_hook(lambda _, args: seen.append(args[1][0]))
    features, proposals, sizes, targets = head_inputs()
    model.eval()(features, proposals, sizes)
    assert torch.equal(seen[0], proposals[0])
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])
    for boxes in seen:
        assert bool((boxes >= 0).all()) and bool((boxes <= 128).all())
    model.train()(features, list(proposals), sizes, targets)


# ---- construction ----


def test_unknown_kinds_and_no_classes_are_refused():
    with pytest.raises(ValueError, match=r"unknown detector 'yolo'\. Known: mask_rcnn, faster"):
        detector("yolo")
    with pytest.raises(ValueError, match="num_classes=0 must be >= 1"):
        create_detector("itpn_debug", num_classes=0)


def test_the_heads_have_the_official_shapes():
    """Four convolutions and one linear layer of 1024; four mask convolutions; 28x28 masks."""
    with torch.device("meta"):
        model = create_detector("itpn_base_patch16_224", num_classes=80)
    assert model.backbone.out_channels == 256
    box_head = model.roi_heads.stages[0].box_head
    kinds = [type(m).__name__ for m in box_head.modules()]
    assert (kinds.count("Conv2d"), kinds.count("Linear")) == (4, 1)
    assert kinds.count("BatchNorm2d") == 4
    assert model.roi_heads.stages[0].box_predictor.cls_score.weight.shape == (81, 1024)
    assert model.roi_heads.stages[0].box_predictor.bbox_pred.weight.shape == (324, 1024)
    mask_kinds = [type(m).__name__ for m in model.roi_heads.mask_head.modules()]
    assert mask_kinds.count("Conv2d") == 4
