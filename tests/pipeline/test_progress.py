"""Log lines."""

from __future__ import annotations

import pytest

from pipeline.progress import ProgressDisplay, format_record

TRAIN = {
    "train/loss": 1.23456,
    "train/loss_mim": 0.98765,
    "train/loss_mfm4": 0.1,
    "train/loss_mfm8": 0.22222,
    "train/loss_mfm16": 0.5,
    "train/grad_norm": 2.5,
    "optim/lr": 1.5e-4,
    "perf/images_per_s": 123.456,
    "perf/data_wait_frac": 0.031,
    "perf/step_s": 2.0,
    "memory/peak_gib": 1.26,
    "train/epoch": 3.0,
}
HELD_OUT = {"val/mim_loss_over_baseline": 0.51234, "val/mfm_loss_over_baseline": 0.75}


@pytest.mark.parametrize(
    ("step", "record", "line"),
    [
        (
            50,
            TRAIN,
            "step   50/1000  loss 1.2346  mim 0.9877  mfm4 0.100  mfm8 0.222  mfm16 0.500  "
            "lr 1.50e-04  grad 2.500  img/s 123.5  wait 3%  mem 1.3GiB  eta 31:40",
        ),
        (
            1000,
            {"train/loss": 0.5, "train/loss_mim": 0.5, "perf/step_s": 2.0, **HELD_OUT},
            "step 1000/1000  loss 0.5000  mim 0.5000  | held-out mim/baseline 0.512  "
            "mfm/baseline 0.750",
        ),
        (1, {"perf/step_s": 0.001}, "step    1/1000  eta 0:00"),
        (20, HELD_OUT, "step   20/1000  | held-out mim/baseline 0.512  mfm/baseline 0.750"),
        (7, {"unknown/key": 1.0}, "step    7/1000"),
    ],
    ids=["train", "last step", "eta", "held-out", "nothing known"],
)
def test_record_becomes_one_line_of_the_fields_it_has(
    step: int, record: dict[str, float], line: str
) -> None:
    assert format_record(step, 1000, record) == line


def test_display_prints_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressDisplay(1000) as display:
        display.show(50, TRAIN)
        display.say("stopping")
    # One line each, however long, and no bar.
    assert capsys.readouterr().out == f"{format_record(50, 1000, TRAIN)}\nstopping\n"


def test_lines_of_a_run_beside_others_begin_with_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressDisplay(1000, "scratch") as display:
        display.show(50, TRAIN)
        display.say("stopping")
    assert capsys.readouterr().out == (
        f"scratch  {format_record(50, 1000, TRAIN)}\nscratch  stopping\n"
    )
