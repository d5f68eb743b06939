"""How long Ray Data's loop rests beside training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline import data


def rests_between_rounds(
    num_ready: int, taken_after: int, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """Seconds of each rest, where training takes a block after so many of them."""
    rests: list[float] = []
    queue = [None] * num_ready

    def sleep(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == taken_after:
            queue.pop()

    monkeypatch.setattr(data.time, "sleep", sleep)
    output = SimpleNamespace(output_queue=queue)
    data._LoopThrottle().on_execution_step(SimpleNamespace(_output_node=("operator", output)))
    return rests


@pytest.mark.parametrize(
    "num_ready, rest_s", [(0, 0.02), (1, 0.02), (2, 0.08), (3, 0.18), (5, 0.5), (500, 0.5)]
)
def test_the_loop_rests_longer_the_more_blocks_lie_ready(
    num_ready: int, rest_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests = rests_between_rounds(num_ready, 0, monkeypatch)
    assert sum(rests) == pytest.approx(rest_s)


def test_a_block_that_training_takes_ends_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    rests = rests_between_rounds(5, 2, monkeypatch)
    assert rests == [pytest.approx(0.1)] * 2
