"""`--dry-run`: everything that can go wrong early, looked at without training.

Memory and time are estimated by really running one step on two images here, not from a formula.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import torch
from mlflow import MlflowClient

from pipeline import tracking
from pipeline.config import PretrainConfig
from pipeline.config_values import config_to_dict
from pipeline.data import SyntheticBatches
from pipeline.datasets import DataSets
from pipeline.pretrain import forward_backward, to_device
from pipeline.run_folder import RunFolder
from pipeline.train_state import TrainState
from pipeline.trainer import describe

_PROBE_BATCH = 2


def dry_run(config: PretrainConfig) -> str:
    """Report of a run that is not started.

    Raises:
        ValueError: whatever would have stopped the real run, too.
    """
    folder = RunFolder(config)
    folder.check()
    data = DataSets.open(config)
    device = torch.device("cuda" if config.scaling.use_gpu and torch.cuda.is_available() else "cpu")
    state = TrainState.build(config, device)
    estimate = _estimate(config, data, state, device)
    lines = [
        json.dumps(config_to_dict(config), indent=1),
        describe(config, data),
        *_describe_data(data),
        f"model     {estimate['num_parameters']:,} parameters, "
        f"{estimate['num_trainable']:,} trainable, teacher {estimate['num_teacher']:,}",
        f"memory    {estimate['memory_gib']:.2f} GiB a worker: weights, gradients, AdamW, teacher "
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
    config: PretrainConfig, data: DataSets, state: TrainState, device: torch.device
) -> dict[str, Any]:
    """Parameters, bytes and seconds, from one real forward and backward of two images."""
    batch = {key: values[:_PROBE_BATCH] for key, values in SyntheticBatches(config).batch.items()}
    images, mask = to_device(batch, config, device)

    saved: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        forward_backward(state.model, state.teacher, images, mask, config)
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    seconds = min(_timed_step(config, state, images, mask) for _ in range(2)) / len(images)

    parameters = list(state.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    teacher = sum(p.numel() for p in state.teacher.parameters()) if state.teacher else 0
    state_gib = 4 * (total + 3 * trainable + teacher) / 2**30
    activations_gib = activations / len(images) * config.batch_size_per_worker / 2**30
    images_per_worker = (
        config.num_steps(data.num_samples)
        * config.data.global_batch_size
        / config.scaling.max_workers
    )
    return {
        "num_parameters": total,
        "num_trainable": trainable,
        "num_teacher": teacher,
        "state_gib": state_gib,
        "activations_gib": activations_gib,
        "memory_gib": state_gib + activations_gib,
        "image_s": seconds,
        "run_s": seconds * images_per_worker,
    }


def _timed_step(
    config: PretrainConfig, state: TrainState, images: torch.Tensor, mask: torch.Tensor
) -> float:
    start = time.perf_counter()
    forward_backward(state.model, state.teacher, images, mask, config)
    state.optimizer.step()
    if images.is_cuda:
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


def _check_mlflow(config: PretrainConfig, folder: RunFolder) -> str:
    uri = config.tracking.uri
    if not uri:
        return f"{tracking.default_tracking_uri(folder.storage_path)} (written when the run starts)"
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        raise ValueError(
            f"tracking.uri='{uri}' does not answer: {error}; start the server, or leave it empty "
            "for SQLite"
        ) from error
    return f"{uri} answers"
