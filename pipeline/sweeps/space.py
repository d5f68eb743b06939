"""Search spaces: which settings a sweep varies, and the values of every trial.

An axis is a dotted key of the config, as on the command line and in `apply_overrides`, and a text
such as `loguniform:1e-5:1e-2`. Trial i of a random or grid sweep is a function of (space, seed, i):
a sweep that is run again has the same trials, and more trials leave the first ones as they are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.config_values import apply_overrides
from pipeline.finetune_config import FinetuneConfig
from pipeline.reproducibility import stable_id

AxisKind = Literal["choice", "grid", "uniform", "loguniform", "int"]
_FORMS = "choice:A,B,...  grid:A,B,...  uniform:LOW:HIGH  loguniform:LOW:HIGH  int:LOW:HIGH"
_OURS = ("run.name", "run.storage_path", "tracking.uri", "tracking.experiment", "run.dry_run")
_RANGES = ("uniform", "loguniform", "int")


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One setting that is varied."""

    key: str
    """Dotted key of the config."""
    kind: AxisKind
    text: str = ""
    """As it was given."""
    values: tuple[Any, ...] = ()
    """Of choice and grid."""
    low: float = 0.0
    high: float = 0.0
    """Of the ranges; both ends belong to an int range."""

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1) of the axis: each is as likely as the axis says."""
        if self.values:
            return self.values[int(share * len(self.values))]
        if self.kind == "loguniform":
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        if self.kind == "int":
            return int(self.low) + int(share * (int(self.high) - int(self.low) + 1))
        return self.low + share * (self.high - self.low)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all: those of a choice, the ends of a range."""
        return self.values or (self.at(0.0), int(self.high) if self.kind == "int" else self.high)


def parse_axis(key: str, text: str) -> Axis:
    """An axis from its text; values are read as JSON where they are JSON.

    Raises:
        ValueError: not one of the forms, or a range without room.
    """
    kind, _, rest = text.partition(":")
    if kind in ("choice", "grid"):
        values = tuple(_value(part) for part in _split(rest))
        if not rest or len(set(map(repr, values))) < len(values):
            raise ValueError(f"space.{key}='{text}' needs values, each once; e.g. {kind}:0.65,0.75")
        return Axis(key=key, kind=kind, text=text, values=values)  # type: ignore[arg-type]
    if kind not in _RANGES:
        raise ValueError(f"space.{key}='{text}' is none of: {_FORMS}")
    try:
        low, high = (float(part) for part in rest.split(":"))
    except ValueError:
        raise ValueError(f"space.{key}='{text}' needs two numbers: {kind}:LOW:HIGH") from None
    if not low < high or (kind == "loguniform" and low <= 0):
        raise ValueError(
            f"space.{key}='{text}' must satisfy {'0 < ' if kind == 'loguniform' else ''}LOW < HIGH"
        )
    if kind == "int" and (low % 1 or high % 1):
        raise ValueError(f"space.{key}='{text}' needs whole numbers")
    return Axis(key=key, kind=kind, text=text, low=low, high=high)  # type: ignore[arg-type]


def parse_space(texts: Mapping[str, str]) -> tuple[Axis, ...]:
    """The axes of a space.

    Raises:
        ValueError: no axis, or one that cannot be read.
    """
    if not texts:
        raise ValueError(f"a sweep needs something to vary: --space.KEY with one of {_FORMS}")
    return tuple(parse_axis(key, text) for key, text in texts.items())


def check_space(axes: tuple[Axis, ...], config: FinetuneConfig) -> None:
    """Try every axis on the config that is varied.

    Raises:
        ValueError: an unknown key, one that a sweep sets itself, or a value the config refuses.
    """
    for axis in axes:
        if axis.key in _OURS:
            raise ValueError(f"space.{axis.key}: a sweep sets it for each trial; vary another key")
        for value in axis.ends:
            try:
                apply_overrides(config, {axis.key: value})
            except (ValueError, TypeError) as error:
                raise ValueError(f"space.{axis.key}: {error}") from error


def random_trial(axes: tuple[Axis, ...], seed: int, number: int) -> dict[str, Any]:
    """Overrides of trial `number`: each axis drawn independently of the others."""
    return {
        axis.key: axis.at(np.random.default_rng([seed, number, stable_id(axis.key)]).random())
        for axis in axes
    }


def grid_trials(axes: tuple[Axis, ...]) -> list[dict[str, Any]]:
    """Every combination; the last axis changes fastest.

    Raises:
        ValueError: an axis is a range.
    """
    for axis in axes:
        if not axis.values:
            raise ValueError(
                f"space.{axis.key} is a range ({axis.kind}), a grid needs values: "
                f"grid:{axis.low:g},{axis.high:g}, or --searcher random"
            )
    combinations = itertools.product(*(axis.values for axis in axes))
    return [dict(zip((a.key for a in axes), values, strict=True)) for values in combinations]


def _split(text: str) -> list[str]:
    """Parts between commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
