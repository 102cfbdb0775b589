"""Many tabs at once, outages, and servers that are killed and started again under an open page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from places import GALLERY
from playwright.sync_api import Browser, BrowserContext
from search_driver import SearchPage, Server

from retrieval.model.loading import load
from retrieval.teach.teacher import Teacher

QUERY = "things to repair with"
WRENCH = "gc_adjustable_wrench.webp"
THUMB = f".enn-card[data-name='{WRENCH}'] .enn-thumb[data-do=good]"
KEPT = "() => Object.keys(localStorage).filter(key => key.startsWith('enn-mark-')).length"
TABS = 10


@pytest.fixture
def someone(chrome: Browser) -> Iterator[BrowserContext]:
    context = chrome.new_context()
    yield context
    context.set_offline(False)
    context.close()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for path in [GALLERY / WRENCH, *sorted(GALLERY.glob("*.webp"))[::20]]:
        shutil.copy(path, folder / path.name)
    return folder


def _lessons(profiles: Path, monkeypatch: pytest.MonkeyPatch, name: str = "default") -> int:
    monkeypatch.setenv("ENN_PROFILES", str(profiles))
    with Teacher.open(load(), name) as teacher:
        return len(teacher.history())


def test_ten_tabs_of_one_browser_load_and_search(someone, server):
    pages = [SearchPage(someone, server) for _ in range(TABS)]
    for number, page in enumerate(pages):
        page.search(f"a bird number {number}")
    assert not [problem for page in pages for problem in page.problems]


def test_a_search_during_an_outage_is_answered_after_it(someone, server):
    page = SearchPage(someone, server)
    page.search("a bird")
    someone.set_offline(True)
    page.page.fill("#enn-text :is(textarea, input)", "a red car")
    with page.page.expect_event("requestfailed"):
        page.page.press("#enn-text :is(textarea, input)", "Enter")
    someone.set_offline(False)
    page.wait_status("“a red car”")
    page.search("a bird")


def test_marks_of_an_outage_wait_and_are_learned_once(someone, server, monkeypatch):
    page = SearchPage(someone, server)
    page.profile("outage")
    page.search(QUERY)
    someone.set_offline(True)
    page.page.click(THUMB)
    page.page.wait_for_selector(".enn-waiting:has-text('1 mark is kept')")
    assert page.page.evaluate(KEPT) == 1
    someone.set_offline(False)
    page.wait_marked(WRENCH, "good")
    page.page.wait_for_function(f"({KEPT})() === 0")
    page.page.wait_for_selector(".enn-waiting", state="hidden")
    assert _lessons(server.profiles, monkeypatch, "outage") == 1


def test_a_mark_taken_back_before_it_was_sent_is_not_the_end_of_others(
    someone, server, monkeypatch
):
    page = SearchPage(someone, server)
    page.profile("hasty")
    page.search(QUERY)
    names = page.names
    someone.set_offline(True)
    for place in (0, 1, 2, 2):  # the first is on its way, and the others wait together
        page.page.click(f".enn-card[data-name='{names[place]}'] .enn-thumb[data-do=good]")
    page.page.wait_for_selector(".enn-waiting:has-text('2 marks are kept')")
    someone.set_offline(False)
    page.page.wait_for_function(f"({KEPT})() === 0")
    page.wait_marked(names[1], "good")
    assert page.marks == {names[0]: "good", names[1]: "good"}
    assert _lessons(server.profiles, monkeypatch, "hasty") == 2
    page.page.evaluate(  # one click after the other, before any answer
        """(name) => { const thumb = document.querySelector(
             `.enn-card[data-name='${name[0]}'] .enn-thumb[data-do=bad]`); thumb.click();
           const other = document.querySelector(
             `.enn-card[data-name='${name[1]}'] .enn-thumb[data-do=good]`);
           other.click(); other.click(); }""",
        [names[0], names[3]],
    )
    page.wait_marked(names[0], "bad")
    page.page.wait_for_function(f"({KEPT})() === 0")
    assert not page.page.query_selector(".enn-pending")
    assert "Not learned" not in page.lesson


def test_of_marks_that_waited_the_one_that_is_not_learned_stays_told(someone, server):
    """The next one's answer takes the place of its own at once."""
    page = SearchPage(someone, server)
    page.profile("told")
    page.search(QUERY)
    names = page.names
    page.page.evaluate(
        """(names) => {
             const place = JSON.parse(document.querySelector('[data-kept]').dataset.kept).place;
             const { query, profile } = document.querySelector('.enn-grid').dataset;
             for (const [at, what] of ['none', 'good'].entries()) {
               const card = document.querySelector(`.enn-card[data-name='${names[at]}']`);
               const id = String(at).repeat(32), marks = { [card.dataset.token]: what };
               localStorage.setItem(`enn-mark-${id}`,
                 JSON.stringify({ id, place, query, profile, marks, at }));
             } }""",
        names[:2],
    )
    page.page.reload()
    page.wait_marked(names[1], "good")
    page.page.wait_for_function(f"({KEPT})() === 0")
    page.page.wait_for_selector(".enn-waiting:has-text('Not learned')")
    page.page.click(".enn-waiting button")
    page.page.wait_for_selector(".enn-waiting", state="hidden")


def test_an_open_page_goes_on_after_a_kill_and_a_restart(someone, few, tmp_path, monkeypatch):
    server = Server(few, profiles=tmp_path)
    try:
        page = SearchPage(someone, server)
        page.profile("mine")
        page.search(QUERY)
        server.kill()
        page.page.click(THUMB)
        page.page.wait_for_selector(".enn-waiting:has-text('1 mark is kept')")
        server = Server(few, profiles=tmp_path, port=server.port)
        page.wait_marked(WRENCH, "good")
        assert page.status.startswith(f"“{QUERY}”")
        # Nobody noticed this one: the page was not loaded again, and knows what it shows.
        server.kill()
        server = Server(few, profiles=tmp_path, port=server.port)
        page.page.click(THUMB)
        page.wait_marked(WRENCH, None)
        page.search("a bird")
    finally:
        server.kill()
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path))
    with Teacher.open(load(), "mine") as teacher:
        assert [(len(e.good), len(e.unmarked)) for e in teacher.history()] == [(1, 0), (0, 1)]
    assert _lessons(tmp_path, monkeypatch) == 0  # of the usual profile


def test_an_answer_that_is_lost_is_asked_for_again(someone, server, monkeypatch):
    page = SearchPage(someone, server)
    page.profile("lost")
    page.search(QUERY)
    page.page.evaluate(
        "document.addEventListener('click', () => setTimeout(() => {"
        " const key = Object.keys(localStorage).find((name) => name.startsWith('enn-mark-'));"
        " window.again = [key, localStorage.getItem(key)]; }))"
    )
    page.mark(WRENCH, "good")
    page.page.evaluate("localStorage.setItem(...window.again)")
    assert page.page.evaluate(KEPT) == 1
    page.page.reload()
    page.wait_lesson("learned already")
    assert page.page.evaluate(KEPT) == 0
    assert _lessons(server.profiles, monkeypatch, "lost") == 1


def test_marks_wait_in_the_tab_where_nothing_can_be_stored(someone, server, monkeypatch):
    page = SearchPage(someone, server)
    page.profile("full")
    page.search(QUERY)
    page.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('', 'Full'); }; }"
    )
    someone.set_offline(True)
    page.page.click(THUMB)
    page.page.wait_for_selector(".enn-waiting:has-text('1 mark is kept in this tab')")
    assert page.page.evaluate(KEPT) == 0


def test_marks_are_not_taught_to_another_collection(someone, few, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(few, other, ignore=shutil.ignore_patterns(".*"))
    profiles = tmp_path / "profiles"
    server = Server(few, profiles=profiles)
    try:
        page = SearchPage(someone, server)
        page.search(QUERY)
        server.kill()
        page.page.click(THUMB)
        page.page.wait_for_selector(".enn-waiting:has-text('1 mark is kept')")
        server = Server(other, profiles=profiles, port=server.port)
        page.page.wait_for_selector(".enn-waiting:has-text('another collection')")
        page.search("a bird")
        assert page.page.evaluate(KEPT) == 1
        page.page.click("text=Discard them")
        assert page.page.evaluate(KEPT) == 0
    finally:
        server.kill()
    assert _lessons(profiles, monkeypatch) == 0
