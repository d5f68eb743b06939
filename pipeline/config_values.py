"""Configs as plain values: dicts and back, dotted overrides, differences, a digest.

One set of dotted keys serves the command line (`--optim.base-lr 3e-4`), Tune's search spaces and
tests (`apply_overrides(config, {"optim.base_lr": 3e-4})`). At every boundary (Ray, MLflow,
checkpoints, files) a config is the same JSON.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from typing import Any, TypeVar, get_type_hints

ConfigT = TypeVar("ConfigT")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict (tuples become lists), as JSON, checkpoints and MLflow hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def config_from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """The inverse of `config_to_dict`; validates like any construction."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(_unknown_key(key, list(hints)))
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            value = config_from_dict(hints[key], value)
        elif isinstance(value, list):  # JSON knows no tuples, configs no lists
            value = tuple(value)
        arguments[key] = value
    return cls(**arguments)


def flatten_config(config: Any) -> dict[str, Any]:
    """Dotted keys -> values: {"optim.base_lr": 1.5e-4, ...}."""
    flat: dict[str, Any] = {}
    for section, values in config_to_dict(config).items():
        flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat


def apply_overrides(config: ConfigT, overrides: dict[str, Any]) -> ConfigT:
    """A copy with dotted keys replaced.

    Raises:
        ValueError: unknown key (names the nearest real one) or an invalid value.
    """
    values = config_to_dict(config)
    known = flatten_config(config)
    for key, value in overrides.items():
        if key not in known:
            raise ValueError(_unknown_key(key, list(known)))
        section, name = key.split(".", 1)
        values[section][name] = value
    return config_from_dict(type(config), values)


def config_diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Readable differences of two config dicts; settings that cannot change results are ignored."""
    ignored = {
        *("run.dry_run", "run.allow_config_change", "run.storage_path", "run.max_failures"),
        *("run.pause_at_step", "run.profile_steps"),
        *("run.keep_checkpoints", "run.keep_every_steps", "run.checkpoint_every_minutes"),
        *("run.on_checkpoint_error", "scaling.resize_check_s", "scaling.worker_resource"),
        *("scaling.worker_labels", "scaling.wait_for_nodes_s"),
        *("data.worker_resource", "data.worker_labels"),
        *("tracking.parent_run_id", "tracking.varied", "scaling.gpus_per_worker"),
    }
    flat = [{f"{s}.{k}": v for s, d in c.items() for k, v in d.items()} for c in (old, new)]
    keys = sorted((set(flat[0]) | set(flat[1])) - ignored)
    missing = "<absent>"
    pairs = [(k, flat[0].get(k, missing), flat[1].get(k, missing)) for k in keys]
    return [f"{k}: {a!r} -> {b!r}" for k, a, b in pairs if a != b]


def config_hash(config: Any) -> str:
    """Short digest of everything in the config."""
    text = json.dumps(config_to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown setting '{key}'{hint} Known: {', '.join(known)}"
