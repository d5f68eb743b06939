"""Average precision of a detector as COCO defines it, of boxes and of masks, through pycocotools.

Surprising: COCO's small, medium and large go by the area of an object's *mask*, for boxes too.
Without masks it is the area of the box, and the three figures are not those of the COCO server.
An object whose mask was lost in preparation is, for masks, a crowd region of its box: predictions
there count neither way.
"""

# n objects or predictions of an image, T IoU thresholds, R recall levels, K classes, A area ranges

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from pipeline.downstream.scores import by_class, check_labels

Kind = Literal["box", "mask"]
_IOU_TYPES = {"box": "bbox", "mask": "segm"}
_AREAS = ("", "_small", "_medium", "_large")  # the order of COCOeval's area ranges
_MAX_PREDICTIONS = 100  # of one image and class, as COCO's primary metric


class CocoScores:
    """Boxes and run lengths of every image.

    Args:
        classes: names; label 1 is the first, since 0 is the detectors' background.
        with_masks: whether the model predicts masks.
    """

    def __init__(self, classes: list[str], with_masks: bool) -> None:
        self.classes = list(classes)
        self.kinds: tuple[Kind, ...] = ("box", "mask") if with_masks else ("box",)
        self._images: dict[int, dict[str, Any]] = {}
        self._precision: dict[Kind, NDArray[np.float64]] = {}

    def add(
        self,
        image_id: int,
        size: tuple[int, int],
        prediction: dict[str, Tensor],
        target: dict[str, Any],
    ) -> None:
        """Add an image.

        Args:
            image_id: the sample id, up to 64 bits.
            size: (H, W) of the original image, which all coordinates are pixels of.
            prediction: what torchvision's detectors return: boxes (n, 4) as (x0, y0, x1, y1),
                labels (n,) from 1, scores (n,), and masks (n, 1, H, W) probabilities if the model
                predicts masks. One that is not finite is dropped.
            target: boxes (n, 4), labels (n,) from 1, is_crowd (n,) bool, and masks, if there are
                any: a list of n compressed run lengths, None where an object has none.

        Raises:
            ValueError: a label outside the classes, an image given twice, or no masks predicted
                although the scores are to be with masks.
        """
        image_id = int(image_id)  # a numpy number or a tensor becomes a Python int, which is exact
        if image_id in self._images:
            raise ValueError(f"image_id={image_id} was added twice; every sample counts once")
        for what, labels in (("predicted", prediction["labels"]), ("target", target["labels"])):
            check_labels(labels, 1, len(self.classes), what)
        if "mask" in self.kinds and "masks" not in prediction:
            raise ValueError(
                "the prediction has no masks; use a model that predicts them, or with_masks=False"
            )
        boxes, scores = prediction["boxes"].detach(), prediction["scores"].detach()
        kept = boxes.isfinite().all(1) & scores.isfinite()
        self._images[image_id] = {
            "size": (int(size[0]), int(size[1])),
            "boxes": boxes[kept].cpu(),
            "labels": prediction["labels"][kept].cpu(),
            "scores": scores[kept].cpu(),
            "masks": _encode(prediction["masks"][kept], size) if "mask" in self.kinds else None,
            "target_boxes": torch.as_tensor(target["boxes"]).cpu().reshape(-1, 4),
            "target_labels": target["labels"].cpu(),
            "target_is_crowd": torch.as_tensor(target["is_crowd"]).cpu(),
            "target_masks": target.get("masks"),
        }
        self._precision.clear()

    def state(self) -> dict[str, Any]:
        """{"images": {image_id: boxes, labels, scores and run lengths}}."""
        return {"images": dict(self._images)}

    def merge(self, states: list[dict[str, Any]]) -> None:
        """Replace the own content by the union of all workers' states."""
        images: dict[int, dict[str, Any]] = {}
        for state in states:
            twice = images.keys() & state["images"].keys()
            assert not twice, f"workers evaluated image_id={min(twice)} twice"
            images |= state["images"]
        self._images = images
        self._precision.clear()

    def result(self) -> dict[str, float]:
        """val/box_ap, _ap50, _ap75, _ap_small, _ap_medium, _ap_large, the same of masks, percent.

        Figures of which there is no object, such as of large ones, are left out.
        """
        metrics: dict[str, float] = {}
        for kind in self.kinds:
            precision = self._evaluate(kind)  # (T, R, K, A)
            figures = {f"ap{area}": precision[..., i] for i, area in enumerate(_AREAS)}
            figures["ap50"], figures["ap75"] = precision[0, ..., 0], precision[5, ..., 0]
            means = {name: _mean_percent(values) for name, values in figures.items()}
            metrics |= {f"val/{kind}_{n}": v for n, v in means.items() if not np.isnan(v)}
        return metrics

    def per_class(self, kind: Kind = "box") -> dict[str, float]:
        """AP in percent of each class that has an object."""
        precision = self._evaluate(kind)
        each = range(len(self.classes))
        return by_class(self.classes, [_mean_percent(precision[:, :, k, 0]) for k in each])

    def _evaluate(self, kind: Kind) -> NDArray[np.float64]:
        """Precision (T, R, K, A); -1 of a class without an object in the area range."""
        if kind not in self._precision:
            with contextlib.redirect_stdout(io.StringIO()):
                targets, predictions = self._annotations(kind)
                evaluation = COCOeval(targets, predictions, _IOU_TYPES[kind])
                evaluation.params.maxDets = [_MAX_PREDICTIONS]
                evaluation.evaluate()
                evaluation.accumulate()
            self._precision[kind] = evaluation.eval["precision"][..., 0]
        return self._precision[kind]

    def _annotations(self, kind: Kind) -> tuple[COCO, COCO]:
        targets: list[dict[str, Any]] = []
        predictions: list[dict[str, Any]] = []
        # Small numbers, because COCOeval makes ids numpy numbers, which take no 64 bits unsigned;
        # in the order of the ids, because equal scores rank in the order of their images.
        numbers = list(enumerate(sorted(self._images)))
        for number, image_id in numbers:
            image = self._images[image_id]
            targets += _targets(number, image, kind)
            predictions += _predictions(number, image, kind)
        sizes = [(number, *self._images[image_id]["size"]) for number, image_id in numbers]
        images = [{"id": number, "height": h, "width": w} for number, h, w in sizes]
        return self._coco(images, targets), self._coco(images, predictions)

    def _coco(self, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": images,
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)],
            # Ids from 1: COCOeval takes a match with id 0 for none.
            "annotations": [a | {"id": i} for i, a in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        return coco


def _targets(number: int, image: dict[str, Any], kind: Kind) -> list[dict[str, Any]]:
    boxes = _to_xywh(image["target_boxes"])
    masks = image["target_masks"] or [None] * len(boxes)
    annotations = []
    for box, label, is_crowd, counts in zip(
        boxes,
        image["target_labels"].tolist(),
        image["target_is_crowd"].tolist(),
        masks,
        strict=True,
    ):
        run_lengths = None if counts is None else {"size": list(image["size"]), "counts": counts}
        annotation = {
            "image_id": number,
            "category_id": label,
            "bbox": box,
            "iscrowd": int(is_crowd),
            "area": box[2] * box[3] if run_lengths is None else float(coco_mask.area(run_lengths)),
        }
        if kind == "mask":
            if run_lengths is None:
                (run_lengths,) = coco_mask.frPyObjects(np.array([box]), *image["size"])
                annotation["iscrowd"] = 1
            annotation["segmentation"] = run_lengths
        annotations.append(annotation)
    return annotations


def _predictions(number: int, image: dict[str, Any], kind: Kind) -> list[dict[str, Any]]:
    boxes, labels = _to_xywh(image["boxes"]), image["labels"].tolist()
    annotations = []
    for i, score in enumerate(image["scores"].tolist()):
        annotation = {"image_id": number, "category_id": labels[i], "score": score}
        if kind == "mask":
            run_lengths = {"size": list(image["size"]), "counts": image["masks"][i]}
            annotation["segmentation"] = run_lengths
            annotation["area"] = float(coco_mask.area(run_lengths))
        else:
            annotation["bbox"] = boxes[i]
            annotation["area"] = boxes[i][2] * boxes[i][3]
        annotations.append(annotation)
    return annotations


def _to_xywh(boxes: Tensor) -> list[list[float]]:
    """(n, 4) corners -> [[x0, y0, width, height]] in float64."""
    corners = boxes.double()
    sides: list[list[float]] = torch.cat(
        [corners[:, :2], corners[:, 2:] - corners[:, :2]], 1
    ).tolist()
    return sides


def _encode(masks: Tensor, size: tuple[int, int]) -> list[bytes]:
    """Probabilities (n, 1, H, W) -> compressed run lengths of where they are above 0.5."""
    assert masks.shape[1:] == (1, *size), (
        f"masks of shape {tuple(masks.shape)} for an image of (H, W) = {tuple(size)}"
    )
    if len(masks) == 0:
        return []
    pixels = (masks.detach()[:, 0] > 0.5).byte().cpu().permute(1, 2, 0).numpy()  # (H, W, n)
    return [bytes(rle["counts"]) for rle in coco_mask.encode(np.asfortranarray(pixels))]


def _mean_percent(precision: NDArray[np.float64]) -> float:
    """100 * mean over entries of classes that have objects; NaN when none has.

    Rounded, because COCOeval divides by true + false positives + 2e-16: a perfect detector with one
    object of a class would have 99.99999999999997.
    """
    defined = precision[precision > -1]
    return round(100 * float(defined.mean()), 9) if defined.size else float("nan")
