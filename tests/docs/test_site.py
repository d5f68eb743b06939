"""The documentation as a site: it builds, no link leads nowhere, nothing comes from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT
from tests.docs.markdown import PAGES

ZENSICAL = str(Path(sys.executable).parent / "zensical")
LINK = re.compile(r"(?<!\\)!?\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


class Page(HTMLParser):
    """What a built page refers to, and the ids it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value for key, value in attrs if value}
        if "id" in found:
            self.ids.add(str(found["id"]))
        if tag == "a" and "href" in found:
            self.links.add(str(found["href"]))
        elif tag in ("script", "img", "iframe") and "src" in found:
            self.loaded.add(str(found["src"]))
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.add(str(found["href"]))


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of the documentation."""
    command = [ZENSICAL, "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(REPO_ROOT / "docs", folder / "docs")
    shutil.copy(REPO_ROOT / "mkdocs.yml", folder)
    return folder


@pytest.fixture(scope="module")
def pages(copy: Path) -> dict[Path, Page]:
    """The pages of the built site, by their path in it."""
    done = build(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    site = copy / "site"
    found = {path.relative_to(site): Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(found) > 15
    return found


def test_no_link_of_the_site_leads_nowhere(pages: dict[Path, Page], copy: Path) -> None:
    site = copy / "site"
    for path, page in pages.items():
        for link in page.links | page.loaded:
            target = urllib.parse.urlsplit(link)
            if target.scheme or target.netloc or path.name == "404.html":
                continue
            file = (site / path).parent / urllib.parse.unquote(target.path)
            file = (file / "index.html" if file.is_dir() or not target.path else file).resolve()
            file = (site / path).resolve() if not target.path else file
            assert file.exists(), f"{path}: {link}"
            if target.fragment and file.suffix == ".html":
                ids = pages[file.relative_to(site.resolve())].ids
                assert target.fragment in ids, f"{path}: no place {link}"


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        foreign = [link for link in page.loaded if urllib.parse.urlsplit(link).netloc]
        assert not foreign, f"{path}: {foreign}"


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    listed = re.findall(r"^ +- ([\w-]+\.md)$", (REPO_ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in (REPO_ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("planted", ["[x](no-such-page.md)", "[x](data.md#no-such-place)"])
def test_a_link_to_nowhere_stops_the_build(copy: Path, tmp_path: Path, planted: str) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(copy, folder, ignore=shutil.ignore_patterns("site", ".cache"))
    with (folder / "docs" / "faq.md").open("a") as file:
        file.write(f"\n{planted}\n")
    done = build(folder)
    assert done.returncode != 0
    assert "no-such" in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_of_the_sources_work_where_the_code_is_read(page: Path) -> None:
    """README and the like are not part of the site; docs are read in both places."""
    for link in LINK.findall(CODE.sub("", page.read_text())):
        target = urllib.parse.urlsplit(link)
        if target.scheme or not target.path:
            continue
        file = page.parent / target.path
        assert file.exists(), f"{page.name}: {link}"
        if target.fragment and file.suffix == ".md":
            assert target.fragment in places(file), f"{page.name}: no heading {link}"


def places(page: Path) -> set[str]:
    """Anchors of the headings of a page, as code hosts and the site make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }
