"""Which task a configuration of fine-tuning asks for."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.downstream.classify import ClassifyTask
from pipeline.downstream.detect import DetectTask
from pipeline.downstream.segment import SegmentTask
from pipeline.downstream.task import DownstreamTask
from pipeline.finetune_config import ClassifyConfig, DetectConfig, FinetuneConfig, SegmentConfig


def create_task(
    config: FinetuneConfig, classes: Sequence[str], *, pretrain_size: int | None = None
) -> DownstreamTask:
    """The task of a run.

    Args:
        config: of one of the three tasks.
        classes: names, by label.
        pretrain_size: side in pixels of the images of pre-training, whose position table detectors
            and segmenters keep; None: the variant's own. A classifier's table is resized to its
            crops when weights are loaded, whatever the size.
    """
    names = tuple(classes)
    if isinstance(config, ClassifyConfig):
        return ClassifyTask(config, names)
    if isinstance(config, DetectConfig):
        return DetectTask(config, names, pretrain_size)
    assert isinstance(config, SegmentConfig), f"{type(config).__name__} is of no known task"
    return SegmentTask(config, names, pretrain_size)
