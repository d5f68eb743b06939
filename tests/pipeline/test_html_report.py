"""The HTML report of a run: true to its files, closed to their markup, whole if they are not."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.html_report.contents import read_contents
from pipeline.html_report.headline import course_figures, result_figures
from pipeline.html_report.number_format import duration, number
from pipeline.html_report.page import MAX_PAGE_BYTES, render_report, try_write_report, write_report
from pipeline.logbook import Logbook
from pipeline.run_folder import REPORT_FILE
from tests.pipeline.reported_runs import (
    NASTY,
    pretrain_records,
    write_finetuned_run,
    write_json,
    write_lines,
    write_picture,
    write_run,
)

VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "my-run")


def test_markup_in_names_paths_classes_and_errors_is_shown_and_never_run(tmp_path: Path) -> None:
    html = render_report(write_run(tmp_path / "nasty", nasty=True))
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags, "nor do we have any of our own"
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert all(str(attrs["src"]).startswith("data:") for tag, attrs in page.tags if tag == "img")
    # Name, path of the data, class, two errors, quarantine (path and message), host:
    assert page.text.count(NASTY) >= 8
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'"), "the second line"


def test_nothing_is_fetched_from_anywhere(run: Path) -> None:
    html = render_report(run)
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert links and all(link.startswith(("data:", "#")) for link in links), links
    assert "@import" not in html


def test_figures_are_those_of_metrics_and_summary(run: Path) -> None:
    contents = read_contents(run)
    shown = {f.label: f.value for f in (*result_figures(contents), *course_figures(contents))}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert shown["Pixel error over baseline"] == number(last["val/mim_loss_over_baseline"])
    assert shown["Feature error over baseline"] == number(last["val/mfm_loss_over_baseline"])
    assert shown["Steps"] == "500" and shown["Throughput"] == "131"
    assert shown["Peak memory"] == "1.50" and shown["Waiting for data"] == "1.1"
    assert shown["Restarts"] == "1" and shown["Bad samples"] == "1"
    text = Page(render_report(run)).text
    assert all(value in text for value in shown.values())
    assert "70 steps computed again, 1 failed checkpoint." in text


def test_the_figures_of_a_run_at_work_come_from_its_rows(run: Path) -> None:
    (run / "summary.json").unlink()
    rows = [row for row in pretrain_records() if row["step"] <= 50]
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "events.jsonl", [{"event": "submit", "time": 1.0, "num_workers": 2}])
    contents = read_contents(run)
    shown = {figure.label: figure for figure in course_figures(contents)}
    assert contents.status == "RUNNING"
    assert shown["Steps"].value == "50" and shown["Steps"].unit == "of 500"
    assert shown["Throughput"].value == "115", "median of 120, 100, 110, 120"
    assert "Median" in shown["Throughput"].reading
    assert "--run.name my-run" in Page(render_report(run)).text, "the command that resumes it"


def test_why_a_run_failed_is_on_the_page(run: Path) -> None:
    Logbook(run / "events.jsonl").write("end", status="FAILED", error="loss is nan at step 7")
    html = render_report(run)
    assert ">failed<" in html and '<p class="error">loss is nan at step 7</p>' in html
    Logbook(run / "events.jsonl").write("submit", num_workers=1)
    assert 'class="error"' not in render_report(run), "at work again"


def test_a_fine_tuned_run_shows_its_score_and_what_to_do_with_it(tmp_path: Path) -> None:
    text = Page(render_report(write_finetuned_run(tmp_path / "classes"))).text
    assert "Classification" in text and "50.00" in text and "Accuracy" in text
    assert "runs/demo" in text and "python -m jobs.predict" in text


FILES = [
    *("config.json", "metrics.jsonl", "events.jsonl", "summary.json", "environment.json"),
    *("classes.json", "quarantine.parquet", "reconstructions/step_00000500.png"),
]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_costs_its_part_of_the_page_only(run: Path, file: str) -> None:
    (run / file).unlink()
    text = Page(render_report(run)).text
    assert "could not be read" not in text and "could not be shown" not in text
    assert "Next" in text


@pytest.mark.parametrize("content", [b"", b"\xff\x00garbage{", b"[1, 2]", b'{"a": 1}\n{"b"'])
@pytest.mark.parametrize("file", FILES)
def test_a_broken_file_becomes_a_remark(run: Path, file: str, content: bytes) -> None:
    (run / file).write_bytes(content)
    text = Page(render_report(run)).text
    assert "Next" in text
    is_lenient = file.endswith(".jsonl") or (file.endswith(".json") and content == b'{"a": 1}')
    name = file.rsplit("/", 1)[-1]
    assert is_lenient or f"{name} could not be" in text


def test_a_run_without_metrics_pictures_or_events_has_a_page(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"run": {"name": "young"}})
    text = Page(render_report(tmp_path)).text
    assert "young" in text and "No metrics yet" in text


def test_values_that_are_no_numbers_are_told_not_drawn(run: Path) -> None:
    rows = pretrain_records()
    rows[10]["train/loss"] = float("nan")
    rows[20]["train/loss_mim"] = float("inf")
    rows[-1]["train/grad_norm"] = float("nan")
    write_lines(run / "metrics.jsonl", rows)
    html = render_report(run)
    drawn = re.findall(r'(?:points|cx|cy|x1|y1|d|transform)="([^"]*)"', html)
    assert drawn and not [d for d in drawn if "nan" in d or "inf" in d]
    assert "total is not finite at step 110" in html


def test_the_page_stays_under_its_limit_whatever_is_in_the_folder(run: Path) -> None:
    for step in (250, 500):
        for kind in ("reconstructions", "predictions", "confusion"):
            file = run / kind / f"step_{step:08d}.png"
            write_picture(file, (1300, 1300), is_noise=True)
    assert sum(file.stat().st_size for file in run.glob("*/*.png")) > 2 * MAX_PAGE_BYTES
    write_lines(run / "metrics.jsonl", pretrain_records(num_steps=5_000))
    logbook = Logbook(run / "events.jsonl")
    for step in range(2000):
        logbook.write("checkpoint", step=step, bytes=10)
        logbook.write("crash", rank=0, error="x" * 5000)
    write_json(run / "classes.json", {"classes": ["c" * 2000] * 21_000})
    write_json(run / "environment.json", {f"p{i}": "v" * 900 for i in range(3000)})
    write_json(run / "config.json", {"run": {f"s{i}": "v" * 900 for i in range(3000)}})
    html = render_report(run)
    assert len(html.encode()) < MAX_PAGE_BYTES
    images = [attrs for tag, attrs in Page(html).tags if tag == "img"]
    assert len(images) == 4, "newest of each kind and the first reconstruction"
    assert all(attrs["alt"] for attrs in images)


def test_pictures_on_the_page_are_whole(run: Path) -> None:
    images = [attrs for tag, attrs in Page(render_report(run)).tags if tag == "img"]
    assert [str(attrs["alt"]).split(":")[0] for attrs in images] == [
        *("Reconstructions at step 500", "Reconstructions at step 250")
    ]
    for attrs in images:
        content = base64.b64decode(str(attrs["src"]).split(",")[1], validate=True)
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # raises where some is missing
            assert image.size == (int(attrs["width"] or 0), int(attrs["height"] or 0)) == (400, 640)


def test_pictures_go_before_the_page_gets_too_large(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "<img" in render_report(run)
    monkeypatch.setattr("pipeline.html_report.page.MAX_PAGE_BYTES", 20_000)
    page = Page(render_report(run))
    assert "img" not in {tag for tag, _ in page.tags}
    assert "step_00000500.png could not be shown" in page.text


def test_writing_replaces_the_old_page_and_leaves_no_other_file(run: Path) -> None:
    before = {file.name for file in run.iterdir()}
    (run / REPORT_FILE).write_text("old")
    assert write_report(run) == run / REPORT_FILE
    assert "<!doctype html>" in (run / REPORT_FILE).read_text()
    assert {file.name for file in run.iterdir()} == before | {REPORT_FILE}


def test_a_report_that_cannot_be_written_is_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.html_report.page.write_report", no_room)
    try_write_report(run)
    monkeypatch.undo()
    try_write_report(run / "nowhere")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "No space left" in caplog.text and "python -m jobs.report" in caplog.text


def test_credentials_in_addresses_are_blotted_out(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["tracking"]["uri"] = "http://me:hunter2@server:5000"
    config["data"]["path"] = config["data"]["val_path"] = "s3://key:hunter2@bucket/images"
    Logbook(run / "events.jsonl").write("crash", rank=0, error="http://me:hunter2@server is away")
    write_json(run / "config.json", config)
    html = render_report(run)
    assert "hunter2" not in html and "***@server:5000" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7157, "0.716"),
        (131.41, "131"),
        (5.467904943851076e-09, "5.47e\u22129"),
        (0.0, "0"),
        (12345.0, "12\u202f345"),
        (1234.5, "1234"),
        (-0.25, "\u22120.250"),
        (float("inf"), "inf"),
        (None, "\u2013"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_durations_have_two_units() -> None:
    assert [duration(s) for s in (0.5, 82, 725, 12_000, 187_200)] == [
        *("0.50 s", "82 s", "12 min 5 s", "3 h 20 min", "2 d 4 h")
    ]
