"""How much each varied setting decides about the metric: functional ANOVA by Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.sweeps.report import TrialRow
from pipeline.sweeps.space import Axis
from pipeline.sweeps.trials import index_of

_LEAST_TRIALS = 4


def compared_at(rows: Sequence[TrialRow]) -> float:
    """The largest share of its steps that every trial with an evaluation has been evaluated at."""
    return min((row.step / row.num_steps for row in rows if row.curve), default=0.0)


def values_at(rows: Sequence[TrialRow], share: float) -> list[float | None]:
    """The metric of each trial at its last evaluation up to that share of its steps."""
    found = []
    for row in rows:
        here = [value for step, value in row.curve if step <= share * row.num_steps + 1e-9]
        found.append(here[-1] if here else None)
    return found


def importances(rows: Sequence[TrialRow], axes: Sequence[Axis]) -> dict[str, float]:
    """Share of the metric's variance that each setting explains; empty where too few trials say.

    Trials given up early count as the others do: all are compared at the share of their steps
    that each has reached.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    values = values_at(rows, compared_at(rows))
    known = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if len(known) < _LEAST_TRIALS or len({value for _, value in known}) == 1:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    spaces = {axis.key: _distribution(axis) for axis in axes}
    for row, value in known:
        params = {axis.key: _param(axis, row.overrides[axis.key]) for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {key: float(value) for key, value in found.items()}


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if axis.values:
        return CategoricalDistribution(tuple(range(len(axis.values))))
    if axis.kind == "int":
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(axis.low, axis.high, log=axis.kind == "loguniform")


def _param(axis: Axis, value: Any) -> Any:
    return index_of(axis, value) if axis.values else value
