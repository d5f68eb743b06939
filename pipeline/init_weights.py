"""Where the weights of a fine-tuning run come from: reading what `--init` names.

Surprising: the driver reads them, once, and the workers get them through Ray's object store; so the
path needs to exist on one machine only.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs
from safetensors import SafetensorError
from torch import Tensor, nn

from models.key_layouts import to_canonical
from models.variants import get_variant
from models.weight_shapes import infer_shape
from models.weights import LoadReport, load_weights, read_state_dict
from pipeline import storage
from pipeline.checkpoint import ENCODER_FILE, STATE_FILE
from pipeline.config import SCRATCH, InitConfig
from pipeline.config_values import apply_overrides
from pipeline.finetune_config import ConfigOfTask, task_of
from pipeline.run_folder import CONFIG_FILE

_SUFFIXES = (".safetensors", ".pth", ".pt")
_NECK = "encoder.pyramid."


@dataclass(frozen=True)
class InitialWeights:
    """What a fine-tuning run starts from."""

    state: dict[str, Tensor] | None
    """Tensors in the official layout or ours; None for random weights."""
    source: str
    """Where they are from, for people."""
    model_name: str = ""
    """Variant of the run they are from; empty when nothing says."""
    image_size: int | None = None
    """Side in pixels of the images of that run; None when nothing says."""


def read_initial_weights(init: InitConfig, setting: str = "--init") -> InitialWeights:
    """Read what `--init` names.

    Args:
        init: what to read.
        setting: the setting its path came from, for error messages.

    Raises:
        ValueError: nothing is named, or what is named holds no weights to start from.
        FileNotFoundError: it does not exist.
    """
    path = init.path.rstrip("/")
    if not path:
        raise ValueError(
            f"{setting} is not given; name a pre-training run, one of its checkpoints or a weights "
            f"file, or say '{setting} {SCRATCH}' to train from random weights"
        )
    if init.is_scratch:
        return InitialWeights(None, "random weights (--init scratch)")
    filesystem, root = storage.resolve(path)
    info = storage.info_of(filesystem, root)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{setting} '{path}' does not exist; give a run folder or a file")
    facts = run_config(path)
    if task_of(facts) is not None:
        raise ValueError(
            f"{setting} '{path}' is of a fine-tuning run; give the pre-training run it started from"
        )
    if info.type == fs.FileType.Directory:
        root = _weights_in(filesystem, root, f"{setting} '{path}'")
    state = _read(filesystem, root, setting)
    if not init.neck:
        state = _without_neck(state)
    return InitialWeights(
        state,
        f"{path} (backbone only)" if not init.neck else path,
        facts.get("model", {}).get("name", ""),
        facts.get("data", {}).get("image_size"),
    )


def run_config(path: str) -> dict[str, Any]:
    """The config of the run whose folder, checkpoint or weights file this is; empty for others."""
    filesystem, root = storage.resolve(path.rstrip("/"))
    if root.endswith(_SUFFIXES):
        root = root.rpartition("/")[0]
    for folder in (root, "/".join(root.split("/")[:-2])):
        file = f"{folder}/{CONFIG_FILE}"
        if storage.info_of(filesystem, file).type == fs.FileType.File:
            values: dict[str, Any] = json.loads(storage.read_bytes(filesystem, file))
            return values
    return {}


def _weights_in(filesystem: fs.FileSystem, root: str, given: str) -> str:
    """The encoder of a run folder or checkpoint; of an unfinished run the newest checkpoint's."""
    here = f"{root}/{ENCODER_FILE}"
    if storage.info_of(filesystem, here).type == fs.FileType.File:
        return here
    folder = f"{root}/checkpoints"
    listed = storage.list_folder(filesystem, folder, recursive=True)
    found = [info.path.removeprefix(folder) for info in listed]
    encoders = sorted(p for p in found if p.endswith(f"/{ENCODER_FILE}") and "/." not in p)
    if encoders:
        return folder + encoders[-1]
    raise ValueError(
        f"{given} holds no {ENCODER_FILE} and no checkpoint with one; give the folder of a "
        f"pre-training run, or a weights file ({', '.join(_SUFFIXES)})"
    )


def _read(filesystem: fs.FileSystem, path: str, setting: str) -> dict[str, Tensor]:
    if path.endswith(f"/{STATE_FILE}") or not path.endswith(_SUFFIXES):
        raise ValueError(
            f"{setting} '{path}' is no weights file; give one of {', '.join(_SUFFIXES)} (of a "
            f"checkpoint its {ENCODER_FILE})"
        )
    return read_tensors(filesystem, path, setting)


def read_tensors(filesystem: fs.FileSystem, path: str, setting: str) -> dict[str, Tensor]:
    """Read a weights file, whatever its name; nothing in it is executed.

    Args:
        filesystem: where the file is.
        path: the file.
        setting: the setting its path came from, for error messages.

    Raises:
        ValueError: the file is damaged, or holds more than tensors.
        FileNotFoundError: it does not exist.
    """
    try:
        if storage.is_local(filesystem):
            return read_state_dict(path)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.rsplit("/", 1)[-1]
            storage.download(filesystem, path, local)
            return read_state_dict(local)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = (
            str(error).partition("\n")[0].partition(". ")[0]
        )  # torch adds advice on its options
        raise ValueError(
            f"{setting} '{path}' is damaged, or holds more than tensors ({reason}); copy it again, "
            "or give another file"
        ) from error


def _without_neck(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """In our layout whatever the layout was, so that the neck has one name."""
    canonical, unknown = to_canonical(state)
    kept = {key: tensor for key, tensor in canonical.items() if not key.startswith(_NECK)}
    return kept | {key: state[key] for key in unknown}  # for the load to refuse


def with_model_name(config: ConfigOfTask, weights: InitialWeights) -> ConfigOfTask:
    """The config with the variant of the weights and the dimensions of their neck, where it names
    none itself. What no run says is read off the shapes.

    Raises:
        ValueError: neither says which variant, or they differ.
    """
    name, found = config.model.name, weights.model_name
    if name and found and name != found:
        raise ValueError(
            f"model.name='{name}', but {weights.source} holds a {found}; leave --model.name out"
        )
    shape = None
    with contextlib.suppress(ValueError):  # loading says what is wrong with them, key by key
        shape = None if weights.state is None else infer_shape(weights.state)
    name = name or found or (shape.variants[0] if shape and shape.variants else "")
    if not name:
        raise ValueError(
            f"model.name is empty and {weights.source} does not say which variant it is; give "
            "--model.name"
        )
    settings: dict[str, Any] = {"model.name": name}
    variant = get_variant(name)
    for key in ("fpn_dim", "fpn_depth"):
        theirs = getattr(shape, key, 0)
        if theirs != getattr(variant, key) and not getattr(config.model, key):
            settings[f"model.{key}"] = theirs
    return apply_overrides(config, settings)


def load_initial_weights(model: nn.Module, weights: InitialWeights) -> LoadReport | None:
    """Load them into a downstream model; None for random weights.

    Raises:
        ValueError: they do not fit, with the keys or the report (see `models.weights`).
    """
    if weights.state is None:
        return None
    return load_weights(model, weights.state)
