"""Which samples a task makes of a data set, and whether the data set has what it needs.

Surprising: classes that are mere numbers count only as far as the labels in a split go, so the
lists of two splits may differ in length. The longer one holds for both.
"""

from __future__ import annotations

from pipeline.downstream.classify_samples import ClassifySamples, rand_augment
from pipeline.downstream.detect_samples import DetectSamples
from pipeline.downstream.samples import TaskSamples
from pipeline.downstream.segment_samples import SegmentSamples
from pipeline.finetune_config import (
    ClassifyConfig,
    DetectConfig,
    DetectorKind,
    FinetuneConfig,
    SegmentConfig,
    Task,
)
from pipeline.sources import Index

_MAX_SEGMENTED_CLASSES = 254  # ids are bytes, 255 is no class, and 0 may be none either
_NUM_NAMED = 10
_ANNOTATIONS: dict[Task, str] = {"classify": "label", "detect": "boxes", "segment": "mask"}
_WAYS_OUT: dict[Task, str] = {
    "classify": "prepare class folders, or another source with labels",
    "detect": "prepare a COCO file with annotations",
    "segment": "prepare images with masks (--kind pairs)",
}
_KINDS_WITHOUT_MASKS: dict[DetectorKind, DetectorKind] = {
    "mask_rcnn": "faster_rcnn",
    "cascade_mask_rcnn": "cascade_rcnn",
}


def task_samples(config: FinetuneConfig, index: Index) -> TaskSamples:
    """What makes the samples of a data set."""
    num_classes = num_classes_of(config, index)
    if isinstance(config, ClassifyConfig):
        return ClassifySamples(config, num_classes)
    if isinstance(config, DetectConfig):
        return DetectSamples(config, num_classes)
    assert isinstance(config, SegmentConfig), f"no samples for {type(config).__name__}"
    return SegmentSamples(config, num_classes)


def classes_of(config: FinetuneConfig, *indices: Index) -> tuple[str, ...]:
    """Names of a run's classes, by label.

    Args:
        config: the run; with `segmenter.reduce_zero_label` the first name is no class.
        indices: its data sets, which passed `check_same_classes`.
    """
    classes = max((index.classes for index in indices), key=len)
    is_reduced = isinstance(config, SegmentConfig) and config.segmenter.reduce_zero_label
    return classes[1:] if is_reduced else classes


def num_classes_of(config: FinetuneConfig, *indices: Index) -> int:
    """How many classes a run has; see `classes_of`."""
    return len(classes_of(config, *indices))


def check_data(config: FinetuneConfig, index: Index, setting: str = "data.path") -> None:
    """Refuse a data set the task cannot learn from, before any worker is started.

    Args:
        config: the run.
        index: the data set.
        setting: the setting its path came from, for error messages.

    Raises:
        ValueError: not prepared, without the annotations or classes the task needs, or with more
            classes than a mask can hold; or a RandAugment policy timm does not know.
    """
    where = f"{setting}='{index.root}'"
    if not index.is_prepared:
        raise ValueError(
            f"{where} is no prepared data set, and only such have annotations; prepare it: "
            f"python -m jobs.prepare_data --source {index.root} --out DIR"
        )
    _check_annotations(config, index, where)
    num_classes = num_classes_of(config, index)
    if not num_classes:
        raise ValueError(
            f"{where} has {len(index.classes)} classes, {num_classes} of which can be learnt; "
            "prepare data with labels, or check segmenter.reduce_zero_label"
        )
    if config.task == "segment" and num_classes > _MAX_SEGMENTED_CLASSES:
        raise ValueError(
            f"{where} has {num_classes} classes, segmentation takes at most "
            f"{_MAX_SEGMENTED_CLASSES}: ids are bytes and 255 is no class; merge classes"
        )
    if isinstance(config, ClassifyConfig) and config.augment.rand_augment:
        rand_augment(config.augment.rand_augment, config.data.image_size, config.data.mean)


def _check_annotations(config: FinetuneConfig, index: Index, where: str) -> None:
    needed, way_out = [_ANNOTATIONS[config.task]], _WAYS_OUT[config.task]
    if isinstance(config, DetectConfig) and config.detector.with_masks:
        needed.append("box_masks")
        if "boxes" in index.annotations:
            way_out = f"train without: --detector.kind {_KINDS_WITHOUT_MASKS[config.detector.kind]}"
    missing = [name for name in needed if name not in index.annotations]
    if missing:
        raise ValueError(
            f"{where} has no {' and no '.join(missing)}, which task '{config.task}' needs; it has "
            f"{', '.join(index.annotations) or 'no annotations'}: {way_out}"
        )


def check_same_classes(train: Index, val: Index) -> None:
    """Refuse data sets that number their classes differently.

    Raises:
        ValueError: the lists differ, and are not numbers of which one only has more.
    """
    if train.classes == val.classes or (_are_numbers(train) and _are_numbers(val)):
        return
    only = [
        f"only in {name}: {_named(set(one.classes) - set(other.classes), one)}"
        for name, one, other in (("data.path", train, val), ("data.val_path", val, train))
        if set(one.classes) - set(other.classes)
    ]
    raise ValueError(
        f"the {len(train.classes)} classes of data.path and the {len(val.classes)} of "
        f"data.val_path differ ({'; '.join(only) or 'in their order'}), so labels mean different "
        "things; prepare both with the same classes, in one folder with --split-name"
    )


def _are_numbers(index: Index) -> bool:
    return index.classes == tuple(str(i) for i in range(len(index.classes)))


def _named(names: set[str], index: Index) -> str:
    """A few of the names, in the order of the data set."""
    listed = [name for name in index.classes if name in names]
    return ", ".join(listed[:_NUM_NAMED]) + (", ..." if len(listed) > _NUM_NAMED else "")
