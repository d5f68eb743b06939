"""`--dry-run`: everything that can go wrong early, looked at without training.

Memory and time are estimated by really running one step on two images here, not from a formula.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from pipeline import tracking
from pipeline.config import TrainingConfig
from pipeline.config_values import config_to_dict
from pipeline.data import SyntheticBatches
from pipeline.datasets import DataSets
from pipeline.downstream.tasks import create_task
from pipeline.evaluation_data import share_of
from pipeline.finetune import build_state
from pipeline.finetune_config import FinetuneConfig
from pipeline.finetuning_run import TRAINING, build_model, open_data, resolve_init
from pipeline.finetuning_run import describe as describe_finetuning
from pipeline.mlflow_delivery import connect
from pipeline.pretrain import forward_backward, to_device
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_weights import read_pretrain_weights
from pipeline.pretraining_run import describe, load_report
from pipeline.run_folder import RunFolder
from pipeline.train_state import TrainState, Worker

_PROBE_BATCH = 2


def dry_run(config: PretrainConfig) -> str:
    """Report of a pre-training run that is not started.

    Raises:
        ValueError: whatever would have stopped the real run, too.
    """
    folder = RunFolder(config)
    folder.check()
    weights = read_pretrain_weights(config)
    load = load_report(config, weights)
    data = DataSets.open(config)
    state = TrainState.build(config, _device(config), weights)
    batch = {key: values[:_PROBE_BATCH] for key, values in SyntheticBatches(config).batch.items()}
    images, mask = to_device(batch, config, _device(config))

    def step() -> None:
        forward_backward(state.model, state.teacher, images, mask, config)

    lines = [describe(config, data, weights, load), *_describe_data(data)]
    return _report(config, folder, lines, _estimate(config, state, step, data.num_samples))


def finetune_dry_run(config: FinetuneConfig) -> str:
    """Report of a fine-tuning run that is not started.

    Raises:
        ValueError: whatever would have stopped the real run, too.
    """
    config, weights = resolve_init(config)
    folder = RunFolder(config)
    folder.check()
    train, val, classes = open_data(config)
    task = create_task(config, classes, pretrain_size=weights.image_size)
    _, load_report = build_model(task, weights)
    worker = Worker(device=_device(config))
    state = build_state(config, task, weights, worker)
    state.model.train()
    maker = TRAINING(config, train)
    batch = maker.batch(share_of(maker, _PROBE_BATCH)[0])

    def step() -> None:
        task.losses(state.model, batch, worker.device)[0].backward()

    lines = [describe_finetuning(config, train, val, task, weights, load_report)]
    num_samples = config.num_used(train.num_samples)
    return _report(config, folder, lines, _estimate(config, state, step, num_samples))


def _device(config: TrainingConfig) -> torch.device:
    return torch.device("cuda" if config.scaling.use_gpu and torch.cuda.is_available() else "cpu")


def _report(
    config: TrainingConfig, folder: RunFolder, description: list[str], estimate: dict[str, float]
) -> str:
    device = _device(config)
    lines = [
        json.dumps(config_to_dict(config), indent=1),
        *description,
        f"model     {estimate['num_parameters']:,.0f} parameters, "
        f"{estimate['num_trainable']:,.0f} trainable, average {estimate['num_average']:,.0f}",
        f"memory    {estimate['memory_gib']:.2f} GiB a worker: weights, gradients, AdamW, average "
        f"{estimate['state_gib']:.2f} + activations of {config.batch_size_per_worker} images "
        f"{estimate['activations_gib']:.2f} (float32)",
        f"time      {estimate['image_s'] * 1000:.0f} ms an image on one {device.type} worker here; "
        f"{config.scaling.max_workers} such workers need {estimate['run_s'] / 3600:.2f} h",
        f"storage   {_check_storage(folder)}",
        f"mlflow    {_check_mlflow(config, folder)}",
        "dry run: nothing was trained",
    ]
    return "\n".join(lines)


def _describe_data(data: DataSets) -> list[str]:
    if not data.facts:
        return ["data      synthetic: random pixels, nothing is read"]
    facts = data.facts
    return [
        f"data      {facts['num_samples']} images; {facts['num_probed']} probed, "
        f"{len(facts['problems'])} unreadable; sizes {facts['smallest']} to {facts['largest']}, "
        f"{facts['seconds_per_image'] * 1000:.1f} ms to decode and crop one",
        *(f"          unreadable: {problem}" for problem in facts["problems"][:5]),
    ]


def _estimate(
    config: TrainingConfig, state: TrainState, step: Callable[[], None], num_samples: int
) -> dict[str, float]:
    """Parameters, bytes and seconds, from really running `step` on two images.

    Args:
        config: the run.
        state: its fresh state.
        step: forward and backward of `_PROBE_BATCH` images.
        num_samples: training samples.
    """
    saved: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        step()
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    seconds = min(_timed_step(state, step) for _ in range(2)) / _PROBE_BATCH

    total, trainable = _count(state.model), _count(state.model, only_trainable=True)
    average = _count(state.teacher) + _count(state.ema)
    state_gib = 4 * (total + 3 * trainable + average) / 2**30
    activations_gib = activations / _PROBE_BATCH * config.batch_size_per_worker / 2**30
    num_images = config.num_steps(num_samples) * config.data.global_batch_size
    return {
        "num_parameters": total,
        "num_trainable": trainable,
        "num_average": average,
        "state_gib": state_gib,
        "activations_gib": activations_gib,
        "memory_gib": state_gib + activations_gib,
        "image_s": seconds,
        "run_s": seconds * num_images / config.scaling.max_workers,
    }


def _count(model: nn.Module | None, *, only_trainable: bool = False) -> int:
    if model is None:
        return 0
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable)


def _timed_step(state: TrainState, step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    state.optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _check_storage(folder: RunFolder) -> str:
    existing = next(p for p in (folder.path, *folder.path.parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"run.storage_path='{folder.config.run.storage_path}' cannot be written: {error}; "
            "choose another with --run.storage-path"
        ) from error
    return f"{folder.path} is writable"


def _check_mlflow(config: TrainingConfig, folder: RunFolder) -> str:
    uri = tracking.tracking_uri(config.tracking.uri, folder.storage_path)
    if uri == tracking.default_tracking_uri(folder.storage_path):
        return f"{uri} (written when the run starts)"
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:
        raise ValueError(
            f"tracking.uri='{uri}' does not answer: {error}; start the server, or leave it empty "
            "for SQLite"
        ) from error
    return f"{uri} answers"
