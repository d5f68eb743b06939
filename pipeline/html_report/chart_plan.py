"""Which metrics are drawn together, what their lines are called, and how to read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.html_report.charts import NUM_COLOURS, TOTAL, LineChart, with_restarts
from pipeline.html_report.contents import RunContents
from pipeline.html_report.series import Series, series_of
from pipeline.html_report.timeline import resume_steps
from pipeline.metrics_file import Record

_PARTS = {
    "loss": TOTAL,
    "loss_mim": "pixels",
    "loss_mfm4": "stage 4",
    "loss_mfm8": "stage 8",
    "loss_mfm16": "stage 16",
    "loss_main": "pyramid",
    "loss_auxiliary": "stage 3",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_objectness": "object",
    "loss_rpn_box_reg": "proposal",
    "loss_seg": "head",
    "loss_aux": "auxiliary",
}
_RATIOS = {
    "val/mim_loss_over_baseline": "pixels",
    "val/mfm_loss_over_baseline": "features",
    "val/main_loss_over_baseline": "pyramid",
    "val/auxiliary_loss_over_baseline": "stage 3",
}
_SCORES = {
    "Accuracy": {"val/top1": "top-1", "val/top5": "top-5"},
    "Box AP": {"val/box_ap": "AP", "val/box_ap50": "AP50", "val/box_ap75": "AP75"},
    "Mask AP": {"val/mask_ap": "AP", "val/mask_ap50": "AP50", "val/mask_ap75": "AP75"},
    "Segmentation": {"val/miou": "mIoU", "val/macc": "classes", "val/pixel_acc": "pixels"},
    "Frozen features": {"val/knn_top1": "kNN", "val/linear_top1": "linear"},
}


def learning_charts(run: RunContents) -> list[LineChart]:
    """What the run minimises and how well it does on held-out images."""
    records = run.records
    charts = [
        _chart(
            "Training loss",
            _lines(records, _loss_keys(records, "train/"), _PARTS, "train/"),
            note="What is minimised and its parts, each before its weight.",
            may_be_log=True,
        ),
        _chart(
            "Held-out error over baseline",
            _lines(records, [k for k in _RATIOS if _has(records, k)], _RATIOS),
            unit="ratio",
            note="Below 1 is better than the best trivial predictor.",
            line_at=1.0,
            line_label="1 = nothing learnt",
            from_zero=True,
        ),
        _chart(
            "Held-out loss",
            _lines(records, _loss_keys(records, "val/"), _PARTS, "val/"),
            note="The losses on fixed images that are never trained on.",
            may_be_log=True,
        ),
    ]
    for title, labels in _SCORES.items():
        keys = [key for key in labels if _has(records, key)]
        lines = _lines(records, keys, labels)
        charts.append(_chart(title, lines, unit="%", note="On the validation set.", from_zero=True))
    size = _lines(records, ["val/stage16_abs_mean"], {})
    charts.append(
        _chart(
            "Size of the features of stage 16",
            size,
            unit="mean |x|",
            note="Should stay within a small multiple of its start.",
            from_zero=True,
        )
    )
    return _marked(charts, run)


def running_charts(run: RunContents) -> list[LineChart]:
    """How the optimiser is driven and how fast the run goes."""
    records = run.records

    def one(title: str, key: str, *, unit: str = "", note: str = "", **how: object) -> LineChart:
        scale = float(how.pop("scale", 1.0))  # type: ignore[arg-type]
        lines = _lines(records, [key], {}, scale=scale)
        return _chart(title, lines, unit=unit, note=note, **how)

    charts = [
        one("Learning rate", "optim/lr", note="Of the last layer.", from_zero=True),
        one("Gradient norm", "train/grad_norm", note="Before clipping.", may_be_log=True),
        one("Throughput", "perf/images_per_s", unit="images/s", from_zero=True),
        one(
            "Waiting for data",
            "perf/data_wait_frac",
            unit="%",
            note="Share of worker 0's time; more than a few per cent: give data.num_cpus more.",
            scale=100.0,
            from_zero=True,
        ),
        one("Time of a step", "perf/step_s", unit="s", from_zero=True),
        one("Peak memory", "memory/peak_gib", unit="GiB", note="Of worker 0.", from_zero=True),
    ]
    for title, key in (
        ("Workers", "scaling/num_workers"),
        ("Skipped steps", "train/skipped_steps"),
        ("Bad samples", "data/bad_samples"),
    ):
        if len({record[key] for record in records if key in record}) > 1:
            charts.append(one(title, key, from_zero=True))
    return _marked(charts, run)


def _marked(charts: Iterable[LineChart], run: RunContents) -> list[LineChart]:
    return with_restarts([c for c in charts if c.series], resume_steps(run.events))


def _chart(title: str, series: list[Series], **how: object) -> LineChart:
    return LineChart(title=title, series=series, **how)  # type: ignore[arg-type]


def _lines(
    records: Sequence[Record],
    keys: Sequence[str],
    labels: dict[str, str],
    prefix: str = "",
    *,
    scale: float = 1.0,
) -> list[Series]:
    found = []
    for key in keys:
        short = key.removeprefix(prefix)
        label = labels.get(short, short.split("/")[-1].removeprefix("loss_")[:16])
        found.append(series_of(records, key, label, scale=scale))
    return [series for series in found if series is not None]


def _loss_keys(records: Sequence[Record], prefix: str) -> list[str]:
    """Losses in the order of `_PARTS`, then others; as many as there are colours."""
    present = {key for record in records for key in record if key.startswith(f"{prefix}loss")}
    order = [f"{prefix}{part}" for part in _PARTS]
    known = [key for key in order if key in present]
    return [*known, *sorted(present - set(order))][:NUM_COLOURS]


def _has(records: Sequence[Record], key: str) -> bool:
    return any(key in record for record in records)
