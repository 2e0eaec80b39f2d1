"""The site that `make docs` builds: strict, whole, and complete in itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.browser import browser, missing
from tests.documents import DOCS, ROOT


class Page(HTMLParser):
    """What a page links to (``links``), what it loads (``loads``), and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.anchors.add(value)
            elif key == "href" and value is not None:
                (self.links if tag == "a" else self.loads).append(value)
            elif key in ("src", "srcset", "poster", "data") and value:
                self.loads.append(value)
            elif key == "style" and value:
                self.loads += re.findall(r"url\(['\"]?([^'\")]+)", value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def is_elsewhere(link: str) -> bool:
    return bool(urlsplit(link).netloc)


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [file for child in children for file in files(child)]  # type: ignore[attr-defined]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages), "give the page one line under nav in mkdocs.yml"


def test_nothing_is_loaded_from_elsewhere(site: Path, parsed: dict[Path, Page]) -> None:
    for path, page in parsed.items():
        assert page.loads, path
        assert not [link for link in page.loads if is_elsewhere(link)], path
        # The theme's script would fetch mermaid for such blocks.
        assert "mermaid" not in re.findall(r'class="(\w+)', path.read_text(encoding="utf-8")), path
    styles = list(site.rglob("*.css"))
    assert styles
    for style in styles:
        loads = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s]+)", style.read_text(encoding="utf-8"))
        assert not [link for link in loads if is_elsewhere(link)], style
    for picture in site.rglob("*.svg"):
        assert not re.search(r"(href|src)=\"https?:", picture.read_text(encoding="utf-8")), picture


def test_links_inside_lead_somewhere(site: Path, parsed: dict[Path, Page]) -> None:
    for path, page in parsed.items():
        if path.name == "404.html":
            continue  # its links are from the root of a server
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file() and target.is_relative_to(site), f"{path.relative_to(site)}: {link}"
            if parts.fragment and target in parsed:
                assert unquote(parts.fragment) in parsed[target].anchors, f"{path.relative_to(site)}: {link}"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_search_works_from_the_disk(site: Path, tmp_path: Path) -> None:
    """In a real browser that reaches no network, without an error in its console."""
    with browser(tmp_path / "profile") as page:
        page.driver.get((site / "index.html").as_uri())
        page.run("document.querySelector('#__search').click()")
        page.find("input[name=query]").send_keys("certificate")
        links = "return [...document.querySelectorAll('a.md-search-result__link')].map(link => link.href)"
        page.until(f"{links}.length")
        targets = page.run(links)
        assert any("read-a-certificate.html" in target for target in targets), targets
        assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
