"""`jobs/evaluate.py`: the scores of a fine-tuned model, or probes of a pre-trained encoder.

Surprising: there is no process group. Workers are Ray tasks that each score their share, and the
driver combines them, so any number of workers gives the same figures.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import tyro

from models.itpn import create_itpn
from models.weights import load_weights
from pipeline.cluster import joined_cluster, require_room
from pipeline.config import InitConfig, require_positive
from pipeline.data import Batch, made_ahead
from pipeline.downstream.finetuned import Finetuned, load_finetuned
from pipeline.downstream.probes import knn_predict, linear_probe
from pipeline.downstream.samples import maker_builder
from pipeline.downstream.task_samples import (
    check_data,
    check_same_classes,
    classes_of,
    task_samples,
)
from pipeline.encoder_settings import pretrained_encoder_kwargs
from pipeline.evaluate import Share, combine, score_share
from pipeline.evaluation_data import share_of
from pipeline.finetune_config import task_of
from pipeline.frozen_features import LabelledFeatures, embed, probe_config
from pipeline.init_weights import read_initial_weights, run_config
from pipeline.onednn_products import use_onednn
from pipeline.placement import Work, remote_args, require_labels, resource_share
from pipeline.sources import Index, build_index

logger = logging.getLogger(__name__)
VALIDATION = maker_builder(task_samples, is_training=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What to evaluate, on what."""

    run: tyro.conf.Positional[str]
    """Folder of a fine-tuning run; or a pre-training run or its weights, which are then probed."""
    data: str = ""
    """Prepared validation set; empty: the run's own data.val_path."""
    train_data: str = ""
    """Prepared training set of a probe; its labels vote and train the linear probe."""
    out: str = ""
    """Folder for scores.json and pictures; empty: only print."""
    num_workers: int = 1
    """Processes that share the validation set."""
    use_gpu: bool = False
    """One GPU a worker."""
    worker_resource: str = ""
    """Custom Ray resource of the nodes to work on, for several workers or GPUs; each takes a
    thousandth of one."""
    worker_labels: tuple[str, ...] = ()
    """Labels of these nodes: KEY=VALUE, or KEY=!VALUE for all others."""
    batch_size: int = 32
    """Images at a time."""
    knn_k: Annotated[int, tyro.conf.arg(name="knn-k")] = 20
    """Neighbours that vote."""

    def __post_init__(self) -> None:
        for key in ("num_workers", "batch_size", "knn_k"):
            require_positive(key, getattr(self, key))
        require_labels("worker_labels", self.worker_labels)


def evaluate_run(config: EvaluateConfig) -> dict[str, float]:
    """Evaluate; returns the metrics, and writes them where asked.

    Raises:
        ValueError: the run, its weights or the data do not fit.
        FileNotFoundError: one of them does not exist.
    """
    values = run_config(config.run)
    if task_of(values) is not None:
        metrics, pictures = _evaluate_finetuned(config)
    else:
        metrics, pictures = _probe_pretrained(config, values), {}
    if config.out:
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(metrics, indent=1))
        for name, png in pictures.items():
            (folder / f"{name}.png").write_bytes(png)
    return metrics


def _evaluate_finetuned(config: EvaluateConfig) -> tuple[dict[str, float], dict[str, bytes]]:
    finetuned = load_finetuned(config.run)
    data = finetuned.config.data
    index = build_index(config.data or data.val_path, "data", data.max_bad_fraction)
    check_data(finetuned.config, index, "data")
    _check_classes(finetuned, index)
    shares = _scored(config, finetuned, index)
    metrics, scores = combine(finetuned.task, shares)
    device = torch.device("cuda" if config.use_gpu and torch.cuda.is_available() else "cpu")
    first = next(_batches(finetuned, index, config.batch_size, 0, 1))
    with torch.no_grad():
        pictures = finetuned.task.pictures(finetuned.model.to(device), first, device, scores)
    return metrics, pictures


def _check_classes(finetuned: Finetuned, index: Index) -> None:
    given = classes_of(finetuned.config, index)
    if given != finetuned.classes[: len(given)]:
        raise ValueError(
            f"data='{index.root}' has the classes {', '.join(given[:5])}, ..., the run "
            f"{', '.join(finetuned.classes[:5])}, ...; evaluate on data prepared with its classes"
        )


def _scored(config: EvaluateConfig, finetuned: Finetuned, index: Index) -> list[Share]:
    if config.num_workers == 1 and not config.use_gpu:
        return [_score(finetuned, index, config.batch_size, 0, 1)]
    world_size = config.num_workers
    with joined_cluster(world_size):
        require_room(
            Work(
                what="a worker",
                count=1,  # where there is less room than wanted, they take turns
                each={"CPU": 1.0, "GPU": float(config.use_gpu)}
                | resource_share(config.worker_resource),
                labels=config.worker_labels,
                settings="use_gpu, worker_resource or worker_labels",
            )
        )
        score = ray.remote(_score).options(
            num_cpus=1,
            num_gpus=1 if config.use_gpu else 0,
            **remote_args(config.worker_resource, config.worker_labels),
        )
        shared = [ray.put(finetuned), ray.put(index)]
        shares: list[Share] = ray.get(
            [
                score.remote(*shared, config.batch_size, rank, world_size)
                for rank in range(world_size)
            ]
        )
    return shares


def _score(
    finetuned: Finetuned, index: Index, batch_size: int, rank: int, world_size: int
) -> Share:
    device = torch.device("cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu")
    if device.type == "cpu":
        use_onednn()  # as the run did, for its figures
    batches = _batches(finetuned, index, batch_size, rank, world_size)
    return score_share(finetuned.task, finetuned.model.to(device), batches, device)


def _batches(
    finetuned: Finetuned, index: Index, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    maker = VALIDATION(finetuned.config, index)
    return made_ahead(maker, share_of(maker, batch_size, rank, world_size))


def _probe_pretrained(config: EvaluateConfig, values: dict[str, Any]) -> dict[str, float]:
    """kNN and linear-probe accuracy of frozen features, in percent."""
    weights = read_initial_weights(InitConfig(path=config.run), "run")
    if not (config.data and config.train_data):
        raise ValueError(
            f"run='{config.run}' is pre-trained, and knows no classes: give labelled sets to probe "
            "it on, --train-data DIR and --data DIR"
        )
    if not weights.model_name or weights.image_size is None or weights.state is None:
        raise ValueError(
            f"run='{config.run}' does not say which variant it is; give the folder of its run"
        )
    probe = probe_config(
        train=config.train_data,
        val=config.data,
        image_size=weights.image_size,
        mean=tuple(values["data"]["mean"]),
        std=tuple(values["data"]["std"]),
        batch_size=config.batch_size,
    )
    args = pretrained_encoder_kwargs(weights.model_name, weights.image_size, weights.state, values)
    encoder = create_itpn(weights.model_name, **args).eval()
    logger.info(load_weights(encoder, weights.state))
    train, val = (
        build_index(path, name)
        for path, name in ((config.train_data, "train_data"), (config.data, "data"))
    )
    for index, name in ((train, "train_data"), (val, "data")):
        check_data(probe, index, name)
    check_same_classes(train, val)

    use_onednn()

    def features(index: Index) -> LabelledFeatures:
        maker = VALIDATION(probe, index)
        batches = made_ahead(maker, share_of(maker, config.batch_size))
        return embed(encoder, batches, probe, torch.device("cpu"))

    from_train, from_val = features(train), features(val)
    num_classes = len(classes_of(probe, train, val))
    votes = knn_predict(*from_train, from_val.features, num_classes=num_classes, k=config.knn_k)
    knn = (votes.argmax(1) == from_val.labels).double().mean()
    return {
        "val/knn_top1": float(100 * knn),
        "val/linear_top1": linear_probe(*from_train, *from_val),
        "val/num_samples": float(len(from_val.labels)),
    }
