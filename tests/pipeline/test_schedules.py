"""Schedules against official samples and tables worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.schedules import teacher_momentum, warmup_cosine

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden/extras/lr_schedules.json").read_text()
)


@pytest.mark.parametrize("name", ["pixel_pretrain", "pixel_finetune_base"])
def test_warmup_cosine_matches_the_official_schedule(name: str) -> None:
    arguments, steps_per_epoch = GOLDEN[name]["args"], 1_281_167 / 4096
    for epoch, lr, _ in GOLDEN[name]["epoch_lr_scaled"]:
        ours = warmup_cosine(
            epoch * steps_per_epoch,
            peak=arguments["lr"],
            final=arguments["min_lr"],
            warmup_steps=arguments["warmup_epochs"] * steps_per_epoch,
            num_steps=arguments["epochs"] * steps_per_epoch,
        )
        # rel: rounding of the steps; abs: 1 + cos near -1 keeps about 1e-16 of the peak.
        assert ours == pytest.approx(lr, rel=1e-9, abs=1e-15 * arguments["lr"]), f"epoch {epoch}"


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),
        (1, 0.25),
        (2, 0.5),
        (4, 1.0),
        (6, 0.868198052),  # 0.1 + 0.9 * (1 + cos(pi / 4)) / 2
        (8, 0.55),
        (10, 0.231801948),
        (12, 0.1),
        (20, 0.1),
    ],
)
def test_warmup_cosine_matches_the_table(step: int, lr: float) -> None:
    ours = warmup_cosine(step, peak=1.0, final=0.1, warmup_steps=4, num_steps=12)
    assert ours == pytest.approx(lr, abs=1e-9)  # the table has nine digits


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, peak=0.3, final=0.0, warmup_steps=0, num_steps=10) == 0.3


@pytest.mark.parametrize(
    ("step", "momentum"),
    [(0, 0.996), (25, 0.996585786), (50, 0.998), (75, 0.999414214), (100, 1.0)],
)
def test_teacher_momentum_rises_from_start_to_one_on_a_cosine(step: int, momentum: float) -> None:
    ours = teacher_momentum(step, start=0.996, num_steps=100)
    assert ours == pytest.approx(momentum, abs=1e-9)  # the table has nine digits
