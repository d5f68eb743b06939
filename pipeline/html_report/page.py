"""The page itself: fills `report.html.j2` and writes report.html beside the other files of the run.

Jinja escapes everything that is no `Markup`; only our charts and the style sheet are. Surprising:
the page is never larger than `MAX_PAGE_BYTES`, whatever is in the folder: lists are cut, lines
thinned, and pictures made smaller.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.credentials import without_passwords
from pipeline.html_report import timeline
from pipeline.html_report.chart_plan import learning_charts, running_charts
from pipeline.html_report.contents import RunContents, read_contents
from pipeline.html_report.embedded_pictures import MAX_BYTES, embedded_pictures
from pipeline.html_report.headline import course_figures, result_figures
from pipeline.html_report.metric_table import metric_table
from pipeline.html_report.next_steps import next_steps
from pipeline.html_report.number_format import grouped, moment
from pipeline.html_report.settings import nearest_recipe, settings_table
from pipeline.run_folder import REPORT_FILE

logger = logging.getLogger(__name__)
MAX_PAGE_BYTES = 2 * 2**20
_MAX_BAD, _MAX_CLASSES, _MAX_TEXT = 50, 60, 500
_MAX_SETTINGS, _MAX_VERSIONS, _MAX_REMARKS = 400, 60, 20
_KINDS = {
    "pretrain": "Pre-training",
    "classify": "Classification",
    "detect": "Detection",
    "segment": "Segmentation",
    "unknown": "Run",
}
_MEANINGS = {
    "FINISHED": "came to its end",
    "FAILED": "stopped with an error; the same command goes on from its newest checkpoint",
    "KILLED": "was interrupted; the same command goes on from its newest checkpoint",
    "RUNNING": "is at work, or was killed without a word",
}


def write_report(path: Path) -> Path:
    """Write the report of a run into its folder, in one go; returns the file.

    Raises:
        FileNotFoundError: there is no run in that folder.
        OSError: the file cannot be written.
    """
    file = path / REPORT_FILE
    content = render_report(path)
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def try_write_report(path: Path) -> None:
    """As `write_report`, but a warning is all that comes of a problem: the run ended as it did."""
    try:
        write_report(path)
    except Exception as error:
        logger.warning(
            "%s could not be written: %s: %s; nothing else is affected, python -m jobs.report %s "
            "tries again",
            *(path / REPORT_FILE, type(error).__name__, error, path),
        )


def render_report(path: Path) -> str:
    """The page of a run folder, as HTML.

    Raises:
        FileNotFoundError: there is no run in that folder.
    """
    run = read_contents(path)
    content = _render(run, MAX_BYTES)
    if len(content.encode()) > MAX_PAGE_BYTES:  # texts without end; a picture is worth less
        content = _render(run, 0)
    return content


def _render(run: RunContents, picture_bytes: int) -> str:
    pictures, remarks = embedded_pictures(run.path, picture_bytes)
    recipe = nearest_recipe(run)
    rows, left_out = timeline.timeline_rows(run.events)
    template = _environment().get_template("report.html.j2")
    return template.render(
        run=run,
        kind=_KINDS[run.kind],
        meaning=_MEANINGS.get(run.status, ""),
        facts=_facts(run),
        remarks=[*run.remarks, *remarks][:_MAX_REMARKS],
        versions=list(run.environment.items())[:_MAX_VERSIONS],
        figures=[group for group in (result_figures(run), course_figures(run)) if group],
        learning=learning_charts(run),
        running=running_charts(run),
        pictures=pictures,
        timeline=timeline.timeline_svg(run.events),
        happened=timeline.describe_events(run.events) if run.events else "",
        events=rows,
        events_left_out=left_out,
        bad_samples=run.quarantine[:_MAX_BAD],
        bad_left_out=max(0, len(run.quarantine) - _MAX_BAD),
        classes=run.classes[:_MAX_CLASSES],
        classes_left_out=max(0, len(run.classes) - _MAX_CLASSES),
        recipe=recipe,
        settings=settings_table(run, recipe)[:_MAX_SETTINGS],
        metrics=metric_table(run.records),
        steps=next_steps(run, recipe),
        written_at=moment(time.time()),
        style=Markup((_folder() / "report.css").read_text()),
    )


def _facts(run: RunContents) -> list[tuple[str, Any]]:
    """What stands under the name of the run."""
    data, env = run.section("data"), run.environment
    model = run.section("model").get("name") or run.summary.get("model") or "that of --init"
    began = run.events[0]["time"] if run.events else None
    alive = [e["time"] for e in run.events[-1:]] + [
        record["time"] for record in run.records[-1:] if isinstance(record.get("time"), int | float)
    ]
    facts = [
        ("Model", model if run.config else None),
        ("Weights from", run.summary.get("init") or run.section("init").get("path")),
        ("Images", data.get("path")),
        ("Image size", f"{data['image_size']} px" if "image_size" in data else None),
        ("Global batch", data.get("global_batch_size")),
        ("Classes", grouped(len(run.classes)) if run.classes else None),
        ("Started", moment(began, with_seconds=False) if began is not None else None),
        ("Last sign of life", moment(max(alive), with_seconds=False) if alive else None),
        ("Commit", env.get("git_commit")),
        ("Host", env.get("host")),
    ]
    return [(name, _cut(without_passwords(str(fact)))) for name, fact in facts if fact]


def _cut(text: str, length: int = _MAX_TEXT) -> str:
    """At most so many characters; error messages can be whole books."""
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def _num_columns(count: int) -> int:
    """Columns, 2 to 4, of a wide page for so many tiles: as few gaps at the end as possible."""
    return min((4, 3), key=lambda columns: -count % columns) if count > 2 else 2


def _folder() -> Path:
    return Path(__file__).parent


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_folder()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cut"] = _cut
    environment.filters["num_columns"] = _num_columns
    environment.filters["plain"] = lambda text: _cut(without_passwords(str(text)))
    return environment
