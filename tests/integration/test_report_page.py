"""The HTML report of a run as a person sees it: in a real browser, on a desk, a phone and paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from pipeline.html_report.page import write_report
from tests.integration.chromium import CHROMIUM, Tab, chromium_tab
from tests.pipeline.reported_runs import (
    pretrain_records,
    write_finetuned_run,
    write_json,
    write_lines,
    write_run,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
RUNS = ("pretrained", "nasty", "finetuned", "long", "young")
VIEWS = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text of any size

# Text of the page, its colour and the first opaque colour behind it.
CONTRASTS = """(() => {
  const number = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  ).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = number(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3 && n.data.trim());
    if (!text.length || ['title', 'style'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const [a, b] = [
      light(number(e.tagName === 'text' ? style.fill : style.color)), light(behind(e))
    ];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text[0].data.trim()]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 3).concat([[found.length, 'texts']]);
})()"""
# Labels of a chart that overlap another or stick out of its drawing.
CLASHES = """[...document.querySelectorAll('svg.chart:not(.timeline)')].flatMap(svg => {
  const frame = svg.closest('figure').getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(
    text => [text.firstChild.data, text.getBoundingClientRect()]
  );
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 3 && b.top < a.bottom - 3;
  return boxes.flatMap(([name, box], i) => [
    ...(box.left < frame.left || box.right > frame.right ? [name + ' sticks out'] : []),
    ...boxes.slice(i + 1).filter(([_, other]) => meet(box, other)).map(([o]) => name + ' on ' + o),
  ]);
})"""


class Pages(NamedTuple):
    """A browser, and pages to open in it."""

    tab: Tab
    files: dict[str, Path]
    shots: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("report")
    runs = {
        "pretrained": write_run(folder / "pretrained"),
        "nasty": write_run(folder / "nasty", nasty=True),
        "finetuned": write_finetuned_run(folder / "finetuned"),
        "long": write_run(folder / "long"),
    }
    write_lines(runs["long"] / "metrics.jsonl", pretrain_records(num_steps=5000, every=137))
    write_json(runs["long"] / "classes.json", {"classes": ["w" * 300, *map(str, range(99))]})
    runs["young"] = folder / "young"
    runs["young"].mkdir()
    write_json(runs["young"] / "config.json", {"run": {"name": "young"}})
    files = {name: write_report(path) for name, path in runs.items()}
    with chromium_tab(folder) as tab:
        yield Pages(tab, files, folder)


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("run", RUNS)
def test_the_page_is_whole_and_quiet_and_as_wide_as_the_window(
    pages: Pages, run: str, width: int, scheme: str
) -> None:
    tab, file = pages.tab, pages.files[run]
    tab.open(file, width=width, scheme=scheme)
    assert tab.problems == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [file.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    decoded = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    widths = tab.evaluate(decoded)
    assert widths == tab.evaluate("[...document.images].map(i => Number(i.getAttribute('width')))")
    assert len(widths) == {"young": 0, "finetuned": 1}.get(run, 2)
    assert tab.evaluate("document.scripts.length") == 0
    marks = "svg => svg.querySelectorAll('.dot, .mark, polyline').length"
    charts = tab.evaluate(f"[...document.querySelectorAll('svg.chart')].map({marks})")
    assert all(charts) and (len(charts) >= 2 or run == "young"), charts
    assert tab.evaluate("[...document.images].every(image => image.alt.length > 10)")
    named = "svg => svg.getAttribute('aria-label').length > 20"
    assert tab.evaluate(f"[...document.querySelectorAll('svg.chart')].every({named})")


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_text_stands_out_from_what_is_behind_it(
    pages: Pages, width: int, scheme: str
) -> None:
    pages.tab.open(pages.files["pretrained"], width=width, scheme=scheme)
    *lowest, (count, _) = pages.tab.evaluate(CONTRASTS)
    assert count > 100, "texts were found"
    assert lowest[0][0] >= LEAST_CONTRAST, lowest


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("run", ["pretrained", "finetuned", "long"])
def test_labels_of_charts_are_readable(pages: Pages, run: str, width: int) -> None:
    pages.tab.open(pages.files[run], width=width)
    assert pages.tab.evaluate(CLASHES) == []
    sizes = pages.tab.evaluate(
        "[...document.querySelectorAll('svg.chart text')].map(t => parseFloat("
        "getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert min(sizes) >= 9.5, "pixels on the screen"


def test_a_dark_desktop_gets_a_dark_page(pages: Pages) -> None:
    middles = {}
    for scheme in ("light", "dark"):
        pages.tab.open(pages.files["pretrained"], width=1280, scheme=scheme)
        shot = pages.shots / f"{scheme}.png"
        pages.tab.screenshot(shot)
        grey = Image.open(shot).convert("L")
        assert len(set(grey.tobytes())) > 50, "something is drawn"
        middles[scheme] = sorted(grey.resize((64, 64)).tobytes())[64 * 64 // 2]
    assert middles["light"] > 200 and middles["dark"] < 70


def test_on_paper_there_is_everything_and_no_menu(pages: Pages) -> None:
    pages.tab.open(pages.files["pretrained"], width=1280)
    content = pages.tab.pdf()
    assert content.startswith(b"%PDF") and content.count(b"/Type /Page\n") <= 14
    pages.tab.call("Emulation.setEmulatedMedia", media="print")
    shown = "getComputedStyle(document.querySelector('nav')).display"
    assert pages.tab.evaluate(shown) == "none"
    unfolded = "document.querySelector('#metrics table').checkVisibility()"
    assert pages.tab.evaluate(unfolded), "what is folded away on the screen"
    pages.tab.call("Emulation.setEmulatedMedia", media="screen")
    assert not pages.tab.evaluate(unfolded)
    pages.tab.call("Emulation.setEmulatedMedia", media="")
