"""The figures a reader looks for first, each with how to read it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.html_report.contents import RunContents
from pipeline.html_report.number_format import counted, duration, grouped, number, percent
from pipeline.logbook import fault_metrics

Tone = Literal["good", "warn", "bad", "plain"]
_GOOD_RATIO, _FEW_DATA_WAIT, _GROWN = 0.95, 0.05, 4.0
_WARM_UP_STEPS = 10  # summaries leave them out, too
_SCORES = {
    "val/top1": ("Top-1 accuracy", "of validation images whose first guess is right."),
    "val/top5": ("Top-5 accuracy", "of validation images with the right class among five."),
    "val/box_ap": ("Box AP", "COCO average precision of boxes, over IoU 0.5 to 0.95."),
    "val/mask_ap": ("Mask AP", "COCO average precision of masks, over IoU 0.5 to 0.95."),
    "val/miou": ("mIoU", "overlap of prediction and truth, mean over classes."),
    "val/knn_top1": ("kNN accuracy", "of nearest neighbours on the frozen features."),
    "val/linear_top1": ("Linear probe", "accuracy of a linear layer on the frozen features."),
}
_RATIOS = {
    "val/mim_loss_over_baseline": ("Pixel error over baseline", "the better trivial predictor's"),
    "val/mfm_loss_over_baseline": ("Feature error over baseline", "that of the mean feature"),
    "val/main_loss_over_baseline": ("Pyramid error over baseline", "that of the mean token"),
    "val/auxiliary_loss_over_baseline": ("Stage-3 error over baseline", "that of the mean token"),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A tile of the page."""

    label: str
    value: str
    unit: str = ""
    reading: str = ""
    """How to read it."""
    tone: Tone = "plain"
    verdict: str = ""
    """What the tone means, in a word or two: colour alone tells some readers nothing."""
    share: float | None = None
    """Length of its bar, 0 to 1; None for no bar."""


def result_figures(run: RunContents) -> list[Figure]:
    """What the run has learnt."""
    return list(_results(run))


def course_figures(run: RunContents) -> list[Figure]:
    """How the run went: length, speed, memory, faults."""
    return list(_course(run))


def _results(run: RunContents) -> Iterator[Figure]:
    for key, (label, of_what) in _RATIOS.items():
        ratio = run.newest(key)
        if ratio is not None:
            is_good = ratio < _GOOD_RATIO
            yield Figure(
                label=label,
                value=number(ratio),
                unit="ratio",
                reading=f"Held-out error over {of_what}: 1 is nothing learnt, lower is better.",
                tone="good" if is_good else "warn",
                verdict="below the baseline" if is_good else "nothing learnt yet",
                share=min(max(ratio, 0.0), 1.0),
            )
    for key, (label, reading) in _SCORES.items():
        score = run.newest(key)
        if score is not None:
            share = min(max(score / 100, 0.0), 1.0)
            yield Figure(
                label=label, value=f"{score:.2f}", unit="%", reading=f"Share {reading}"
                if key in ("val/top1", "val/top5") else reading[0].upper() + reading[1:],
                share=share,
            )  # fmt: skip
    sizes = [r["val/stage16_abs_mean"] for r in run.records if "val/stage16_abs_mean" in r]
    if sizes:
        has_grown = len(sizes) > 1 and sizes[-1] > _GROWN * sizes[0]
        yield Figure(
            label="Size of stage-16 features",
            value=number(sizes[-1]),
            unit="mean |x|",
            reading=f"{number(sizes[0])} at the first evaluation. When it grows many times over, "
            "the learning rate is too high for features that are to be reused.",
            tone="warn" if has_grown else "plain",
            verdict="has grown: lower the learning rate" if has_grown else "",
        )


def _course(run: RunContents) -> Iterator[Figure]:
    last = run.last_record
    if "step" in last:
        total = run.section("optim").get("num_steps")
        epoch = last.get("train/epoch")
        passes = f"{number(epoch)} passes over the data." if epoch is not None else ""
        yield Figure(
            label="Steps",
            value=grouped(last["step"]),
            unit=f"of {grouped(total)}" if isinstance(total, int) else "",
            reading=passes,
            share=min(1.0, last["step"] / total) if isinstance(total, int) and total else None,
        )
    speed, source = _throughput(run)
    if speed is not None:
        yield Figure(label="Throughput", value=number(speed), unit="images/s", reading=source)
    wait = run.summary.get("data_wait_frac", run.newest("perf/data_wait_frac"))
    if isinstance(wait, int | float):
        is_fast = wait <= _FEW_DATA_WAIT
        yield Figure(
            label="Waiting for data",
            value=percent(wait).removesuffix(" %"),
            unit="%",
            reading="Share of worker 0's time. Above a few per cent images come too slowly: give "
            "data.num_cpus more, or prepare the data.",
            tone="good" if is_fast else "warn",
            verdict="data keep up" if is_fast else "data are the bottleneck",
            share=min(max(wait, 0.0), 1.0),
        )
    yield from _costs(run)


def _costs(run: RunContents) -> Iterator[Figure]:
    memory = run.newest("memory/peak_gib")
    if memory is not None:
        yield Figure(
            label="Peak memory", value=number(memory), unit="GiB", reading="Most so far, worker 0."
        )
    faults = fault_metrics(run.events)
    if run.events:
        yield Figure(
            label="Wall-clock time",
            value=duration(faults["fault/wall_s"]),
            reading="All attempts together, from submission to the last sign of life.",
        )
        restarts, lost = int(faults["fault/restarts"]), int(faults["fault/lost_steps"])
        failed = int(faults["fault/failed_checkpoints"])
        again, broken = counted(lost, "step"), counted(failed, "failed checkpoint")
        yield Figure(
            label="Restarts",
            value=grouped(restarts),
            reading=f"{again} computed again, {broken}.",
            tone="warn" if restarts or failed else "good",
            verdict="see what happened" if restarts or failed else "undisturbed",
        )
    skipped, bad = run.newest("train/skipped_steps"), _num_bad(run)
    if skipped is not None and skipped > 0:
        yield Figure(
            label="Skipped steps",
            value=grouped(skipped),
            reading="Loss or gradient was not finite.",
            tone="warn",
            verdict="see nonfinite/",
        )
    if bad:
        yield Figure(
            label="Bad samples",
            value=grouped(bad),
            reading="Images that could not be used, left out and listed below.",
            tone="warn",
            verdict="in quarantine",
        )


def _throughput(run: RunContents) -> tuple[float | None, str]:
    speed = run.summary.get("images_per_s")
    if isinstance(speed, int | float):
        return speed, "All workers together, without the first ten steps."
    speeds = [
        record["perf/images_per_s"]
        for record in run.records
        if record["step"] > _WARM_UP_STEPS and "perf/images_per_s" in record
    ]
    return (statistics.median(speeds) if speeds else None), "Median of the logged steps so far."


def _num_bad(run: RunContents) -> int:
    return max(len(run.quarantine), int(run.newest("data/bad_samples") or 0))
