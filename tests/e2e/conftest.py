from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from driver import browser, chromium
from places import GALLERY
from playwright.sync_api import Browser, BrowserContext
from search_driver import SearchPage, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.e2e)
        if chromium() is None:
            item.add_marker(pytest.mark.skip(reason="no Chromium: apt-get install chromium"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have them: spaces, umlauts, sub-folders, broken and oddly named files."""
    folder = tmp_path_factory.mktemp("Meine Fotos – été & übrige")
    (folder / "Zoo & Park").mkdir()
    shipped = sorted(GALLERY.glob("*.webp"))
    for number, path in enumerate(shipped[::6]):
        shutil.copy(path, folder / ("Zoo & Park" if number % 3 == 0 else "") / path.name)
    shutil.copy(shipped[1], folder / "<img src=x onerror=document.title='hacked'>.webp")
    shutil.copy(shipped[2], folder / "${document.title='hacked'} {{value}} `x`.webp")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"nothing of use" * 20)
    (folder / "empty.png").touch()
    return folder


# One browser and one server for each file: Playwright drives only one at a time in a process.
@pytest.fixture(scope="module")
def server(photos: Path) -> Iterator[Server]:
    running = Server(photos)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def regular(chrome: Browser) -> Iterator[BrowserContext]:
    """A visitor who has been here before: the browser keeps the page's scripts."""
    context = chrome.new_context()
    yield context
    context.close()


@pytest.fixture
def visit(
    chrome: Browser, regular: BrowserContext, server: Server
) -> Iterator[Callable[..., SearchPage]]:
    """Opens the page, with options as a new visitor; fails if anything unexpected happens there."""
    pages: list[SearchPage] = []

    def open_page(query: str = "", **options: Any) -> SearchPage:
        page = SearchPage(chrome.new_context(**options) if options else regular, server, query)
        pages.append(page)
        return page

    yield open_page
    problems = [problem for page in pages for problem in page.problems]
    for page in pages:
        page.close(context=page.context is not regular)
    assert not problems, problems
