"""How long Ray Data's loop rests beside training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline import data


@pytest.mark.parametrize(
    "num_ready, rest_s", [(0, 0.02), (1, 0.02), (3, 0.06), (5, 0.1), (500, 0.1)]
)
def test_the_loop_rests_longer_the_more_blocks_lie_ready(
    num_ready: int, rest_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(data.time, "sleep", rests.append)
    output = SimpleNamespace(output_queue=[None] * num_ready)
    data._LoopThrottle().on_execution_step(SimpleNamespace(_output_node=("operator", output)))
    assert rests == [pytest.approx(rest_s)]
