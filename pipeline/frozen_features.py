"""Frozen features of labelled images, for kNN and linear probes.

A feature is the mean over tokens of stage 16, normalised over its channels without weights of its
own: what a fresh classifier would see. Surprising: it needs no trained head, so it can be asked for
at any step of pre-training, which is how `OnlineKnn` watches a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.itpn import ITPN
from pipeline.config import RunConfig
from pipeline.data import Batch, Draws, SampleMaker, made_ahead
from pipeline.downstream.accuracy import ClassificationScores
from pipeline.downstream.probes import knn_predict
from pipeline.downstream.samples import maker_builder, unpack
from pipeline.downstream.task_samples import check_same_classes, classes_of, task_samples
from pipeline.evaluation_data import share_of
from pipeline.finetune_config import (
    ClassifyConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    LabelledDataConfig,
)
from pipeline.pretrain_config import PretrainConfig
from pipeline.sources import Index
from pipeline.train_state import Worker, gather_from_workers


class LabelledFeatures(NamedTuple):
    """Features of a data set's images, in row order, without those that are bad."""

    features: Tensor
    """(N, D) float32 on the CPU."""
    labels: Tensor
    """(N,) int64."""


def probe_config(
    *,
    train: str,
    val: str,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int = 64,
) -> ClassifyConfig:
    """The configuration of classification that makes a probe's samples: evaluation crops."""
    return ClassifyConfig(
        run=RunConfig(name="probe"),
        data=LabelledDataConfig(
            path=train,
            val_path=val,
            image_size=image_size,
            global_batch_size=batch_size,
            mean=mean,
            std=std,
        ),
        model=FinetuneModelConfig(rel_pos_bias=False, drop_path_rate=0.0),
        optim=FinetuneOptimConfig(num_steps=1),
    )


@torch.no_grad()
def embed(
    encoder: ITPN, batches: Iterable[Batch], config: ClassifyConfig, device: torch.device
) -> LabelledFeatures:
    """Features of the good samples of evaluation batches, in order.

    Args:
        encoder: in eval mode.
        batches: as the evaluation maker of `probe_config` yields them.
        config: of `probe_config`.
        device: where the encoder is.
    """
    mean = torch.tensor(config.data.mean, device=device) * 255
    std = torch.tensor(config.data.std, device=device) * 255
    features, labels = [], []
    for batch in batches:
        good = [s for s, bad in zip(unpack(batch), batch["bad"], strict=True) if not bad]
        if not good:
            continue
        pixels = torch.stack([torch.from_numpy(s["image"]) for s in good]).to(device)
        images = ((pixels.float() - mean) / std).permute(0, 3, 1, 2)
        tokens = encoder.backbone(images)[16].flatten(2).mean(1).float()  # (B, D)
        features.append(F.layer_norm(tokens, tokens.shape[1:]).cpu())
        labels += [int(s["label"]) for s in good]
    width = encoder.backbone.embed_dim
    joined = torch.cat(features) if features else torch.zeros(0, width)
    return LabelledFeatures(joined, torch.tensor(labels, dtype=torch.int64))


class OnlineKnn:
    """The kNN accuracy of a run's features, at any step.

    Args:
        config: the run; its data.num_knn_images bounds the images of each set.
        train: labelled training set, whose images vote.
        val: labelled validation set, whose images are classified.
        worker: this process; each embeds its share.
    """

    def __init__(self, config: PretrainConfig, train: Index, val: Index, worker: Worker) -> None:
        data = config.data
        self.worker = worker
        self.config = probe_config(
            train=data.path,
            val=data.val_path,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
            batch_size=config.batch_size_per_worker,
        )
        self.classes = classes_of(self.config, train, val)
        build = maker_builder(task_samples, is_training=False)
        self._makers = [build(self.config, index) for index in (train, val)]
        self._micros = [self._spread(maker, data.num_knn_images) for maker in self._makers]

    @classmethod
    def where_labelled(
        cls, config: PretrainConfig, train: Index, val: Index, worker: Worker
    ) -> OnlineKnn | None:
        """One, where both sets are prepared with labels of the same classes and it is asked for."""
        if not config.data.num_knn_images or train is val:
            return None
        if not all(index.is_prepared and "label" in index.annotations for index in (train, val)):
            return None
        try:
            check_same_classes(train, val)
        except ValueError:
            return None
        return cls(config, train, val, worker)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """val/knn_top1 in percent, over all workers. All of them must call it."""
        train, val = (
            self._features(encoder, maker, micros)
            for maker, micros in zip(self._makers, self._micros, strict=True)
        )
        if not len(train.labels) or not len(val.labels):
            return {}
        votes = knn_predict(
            train.features, train.labels, val.features, num_classes=len(self.classes)
        )
        scores = ClassificationScores(list(self.classes))
        scores.add(votes, val.labels)
        return {"val/knn_top1": scores.result()["val/top1"]}

    def _spread(self, maker: SampleMaker, num_images: int) -> list[Draws]:
        """This worker's micro-batches of at most so many images, from all over the set."""
        every = -(-len(maker.reader) // num_images)
        micros = share_of(maker, self.config.data.global_batch_size, 0, every)
        return micros[self.worker.rank :: self.worker.world_size]

    def _features(
        self, encoder: nn.Module, maker: SampleMaker, micros: list[Draws]
    ) -> LabelledFeatures:
        was_training = encoder.training
        encoder.eval()
        assert isinstance(encoder, ITPN), "features are those of an encoder"
        mine = embed(encoder, made_ahead(maker, micros), self.config, self.worker.device)
        encoder.train(was_training)
        parts = gather_from_workers(mine, self.worker)
        features = torch.cat([part.features for part in parts])
        return LabelledFeatures(features, torch.cat([part.labels for part in parts]))
