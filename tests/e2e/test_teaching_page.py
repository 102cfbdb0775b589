"""Teaching the search page in a real browser: mark, see it learn, undo, and come back later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from live_server import LiveServer
from playwright.sync_api import Browser, BrowserContext
from search_driver import SearchPage, Server

from retrieval.index.eigen_index import EigenIndex, default_index_dir
from retrieval.model.loading import load
from retrieval.teach import guard

BOX = "#enn-text :is(textarea, input)"
# Words that the model reads badly: a wrench is far down, a frying pan far up.
QUERY = "things to repair with"
WRENCH, HAMMER, PAN = (
    f"gc_{name}.webp" for name in ("adjustable_wrench", "sledgehammer", "frying_pan")
)


@pytest.fixture(scope="module")
def pupil(chrome: Browser) -> Iterator[BrowserContext]:
    """A browser that keeps the page's scripts from test to test."""
    context = chrome.new_context(locale="en-GB")
    yield context
    context.close()


@pytest.fixture
def fresh(
    pupil: BrowserContext, server: Server, request: pytest.FixtureRequest
) -> Iterator[SearchPage]:
    """The page under a profile of this test alone."""
    page = SearchPage(pupil, server)
    page.profile(request.node.originalname[:64])
    yield page
    problems = page.problems
    page.close(context=False)
    assert not problems, problems


def test_marks_change_the_ranking_at_once_and_undo_brings_it_back(fresh):
    page = fresh
    page.search(QUERY)
    before = page.names
    assert page.page.locator(".enn-switch").count() == 0  # nothing was taught yet
    page.mark(WRENCH, "good")
    page.wait_lesson("Learned from 1 good")
    after = page.names
    climbed = before.index(WRENCH) - after.index(WRENCH)
    assert climbed > 0
    badge = page.page.locator(f".enn-card[data-name='{WRENCH}'] .enn-moved")
    assert badge.inner_text() == f"▲{climbed}"
    assert page.marks == {WRENCH: "good"}

    page.mark(PAN, "bad")
    page.wait_lesson("1 good, 1 bad")
    assert page.names.index(PAN) > after.index(PAN)
    assert page.marks == {WRENCH: "good", PAN: "bad"}
    page.page.click("#enn-lesson >> text=Undo")
    page.wait_lesson("Undone: 1 bad")
    assert page.names == after
    assert page.marks == {WRENCH: "good"}
    # The same button again takes a mark back.
    page.page.click(f".enn-card[data-name='{WRENCH}'] .enn-thumb[data-do=good]")
    page.wait_lesson("Taken back")
    assert page.names == before
    assert page.marks == {}


def test_with_and_without_what_was_taught(fresh):
    page = fresh
    page.search(QUERY)
    before = page.names
    page.mark(WRENCH, "good")
    page.search("a bird")
    page.search(QUERY)
    taught = page.names
    assert taught != before
    assert page.page.locator(".enn-moved").count() > 0  # against the ranking without teaching
    page.page.click("text=Without")
    page.page.wait_for_selector(".enn-switch [data-do=exclude][aria-pressed=true]")
    assert page.names == before
    assert page.marks == {WRENCH: "good"}
    assert page.page.locator(".enn-moved").count() == 0
    # Whoever marks wants to see what it does.
    page.mark(HAMMER, "good")
    page.page.wait_for_selector(".enn-switch [data-do=include][aria-pressed=true]")
    page.page.click("#enn-lesson >> text=Undo")
    page.wait_lesson("Undone")
    assert page.names == taught
    page.page.click(".enn-status >> text=Profile:")
    page.page.wait_for_selector("#enn-taught .enn-history")


def test_keyboard_marks_and_keeps_its_place(fresh):
    page = fresh
    page.search(QUERY)
    name = page.names[5]
    keys = page.page.keyboard
    page.page.focus(f".enn-card[data-name='{name}'] .enn-open")
    keys.press("g")
    page.wait_marked(name, "good")
    here = "document.activeElement.closest('.enn-card')?.dataset.name"
    page.page.wait_for_function(f"name => {here} === name", arg=name)
    keys.press("-")
    page.wait_marked(name, "bad")
    keys.press("b")
    page.wait_marked(name, None)
    page.page.wait_for_function(f"name => {here} === name", arg=name)
    # In the large view the walk goes on among the pictures that were there when it was opened.
    names = page.names
    page.open(2)
    keys.press("+")
    page.page.wait_for_selector(".enn-dialog [data-act=good][aria-pressed=true]")
    keys.press("ArrowRight")
    assert page.page.inner_text("#enn-dialog-name") == names[3]
    page.page.wait_for_selector(".enn-dialog [data-act=good][aria-pressed=false]")
    keys.press("b")
    page.page.wait_for_selector(".enn-dialog [data-act=bad][aria-pressed=true]")
    keys.press("Escape")
    page.wait_marked(names[2], "good")
    # Letters in the search box are letters.
    page.page.fill(BOX, "")
    page.page.type(BOX, "big bag")
    assert page.page.input_value(BOX) == "big bag"
    assert page.marks[names[2]] == "good"


def test_quick_clicks_are_all_kept(fresh):
    page = fresh
    page.search(QUERY)
    names = page.names[:6]
    page.page.evaluate(
        """names => { for (const name of names) [...document.querySelectorAll('.enn-card')]
             .find(card => card.dataset.name === name)
             .querySelector('.enn-thumb[data-do=good]').click(); }""",
        names,
    )
    page.page.wait_for_function(
        "n => document.querySelectorAll('.enn-card[data-mark=good]').length === n", arg=len(names)
    )
    assert page.marks == dict.fromkeys(names, "good")


def test_a_search_with_a_picture_is_taught_like_one_in_words(fresh):
    page = fresh
    assert page.page.locator(".enn-thumb").count() == 0  # a look into the collection
    page.search(QUERY)
    first = page.names[0]
    page.page.click(".enn-card >> nth=0 >> text=More like this")
    page.wait_status("Like the picture")
    before = page.names
    assert page.page.locator(".enn-card .enn-thumb").count() == 2 * len(before)
    liked = before[9]
    page.mark(liked, "good")
    page.wait_lesson("Learned from 1 good")
    assert page.names.index(liked) < before.index(liked)
    assert page.marks == {liked: "good"}
    page.wait_status(f"Follows what was taught: “[{first}]” 100%")
    # Words and other pictures are no such search.
    page.search(QUERY)
    assert page.marks == {}
    page.taught(f"[{first}]")
    page.page.click(".enn-history li >> nth=0 >> text=Undo")
    page.page.wait_for_selector("#enn-taught .enn-undone")


def test_the_taught_tab_tells_and_undoes(fresh):
    page = fresh
    page.search(QUERY)
    page.mark(WRENCH, "good")
    page.mark(PAN, "bad")
    text = page.taught("1 good · 1 bad")
    assert "The good pictures stand higher in 1 of 1 taught searches" in text
    assert page.page.locator(".enn-effects svg circle").count() == 2
    assert page.page.locator(".enn-history li").count() == 2
    page.page.click(".enn-history li >> nth=0 >> text=Undo")
    page.page.wait_for_selector("#enn-taught .enn-undone")
    assert "Undone: 1 bad" in page.page.inner_text("#enn-taught")
    page.tab("Search")
    assert page.marks == {WRENCH: "good"}


def test_forgetting_asks_first_and_a_file_brings_it_back(fresh, tmp_path):
    page = fresh
    page.search(QUERY)
    before = page.names
    page.mark(WRENCH, "good")
    after = page.names
    page.page.once("dialog", lambda dialog: dialog.dismiss())
    page.taught("1 good")
    page.page.click("text=Forget everything")
    assert page.page.locator(".enn-history li").count() == 1
    with page.page.expect_download() as download:
        page.page.click("text=Export as a file")
    file = tmp_path / "taught.json"
    download.value.save_as(file)
    page.page.once("dialog", lambda dialog: dialog.accept())
    page.page.click("text=Forget everything")
    page.page.wait_for_selector("#enn-taught >> text=Forgotten: 1 lesson.")
    assert "Nothing yet" in page.page.inner_text("#enn-taught")
    assert page.names == before  # on the other tab
    page.page.set_input_files("#enn-taught input[type=file]", file)
    page.page.wait_for_selector("#enn-taught >> text=Imported: 1 new.")
    assert page.names == after
    page.page.set_input_files(
        "#enn-taught input[type=file]",
        {"name": "x.json", "mimeType": "application/json", "buffer": b"<script>alert(1)</script>"},
    )
    page.page.wait_for_selector("#enn-taught .enn-problem:not(:empty)")
    page.problems = [p for p in page.problems if "422" not in p]


def test_two_profiles_at_once(visit):
    ann, bob = visit(locale="de-DE"), visit(locale="en-GB")
    ann.profile("ann")
    bob.profile("bob")
    for page in (ann, bob):
        page.search(QUERY)
    before = ann.names
    assert bob.names == before
    ann.mark(WRENCH, "good")
    bob.mark(HAMMER, "good")
    assert ann.marks == {WRENCH: "good"}
    assert bob.marks == {HAMMER: "good"}
    assert ann.names.index(WRENCH) < min(before.index(WRENCH), bob.names.index(WRENCH))
    bob.search(QUERY)
    assert bob.marks == {HAMMER: "good"}
    # The browser remembers the profile.
    ann.page.reload()
    ann.page.wait_for_selector(".enn-card")
    ann.search(QUERY)
    assert ann.marks == {WRENCH: "good"}


def test_odd_profile_names_are_explained(fresh):
    page = fresh
    page.tab("Taught")
    page.page.fill("#enn-taught [data-part=name]", "../ünsinn <b>")
    page.page.click("#enn-taught >> text=Create")
    page.page.wait_for_selector("#enn-taught .enn-notice.enn-bad")
    assert "valid" in page.page.inner_text("#enn-taught .enn-notice")


def test_what_is_typed_while_the_page_loads_stays(chrome, server):
    context = chrome.new_context()
    page = context.new_page()
    page.goto(server.url, wait_until="commit")
    page.wait_for_selector(BOX)
    page.fill(BOX, "a green")
    page.wait_for_selector("#enn-results .enn-card")
    page.wait_for_timeout(200)
    assert page.input_value(BOX) == "a green"
    context.close()


def test_teaching_fits_on_a_phone(visit):
    page = visit(viewport={"width": 360, "height": 740})
    page.profile("phone")
    page.search(QUERY)
    page.mark(page.names[2], "good")
    for look in (lambda: page.taught("1 good"), lambda: page.tab("Search")):
        look()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    thumb = page.page.locator(".enn-card >> nth=0 >> .enn-thumb >> nth=1").bounding_box()
    card = page.page.locator(".enn-card >> nth=0").bounding_box()
    assert thumb is not None
    assert card is not None
    assert thumb["x"] + thumb["width"] <= card["x"] + card["width"]


# -- servers of their own --------------------------------------------------------------------------


@pytest.mark.slow
def test_what_hurts_is_refused_with_numbers_unless_one_insists(
    chrome, photos, tmp_path, monkeypatch
):
    """The guard hardly ever refuses; here it is made strict."""
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path))
    monkeypatch.setattr(guard, "LEAST_OVERLAP", 1.01)
    place = default_index_dir(photos)
    if not (place / "manifest.json").exists():  # no server has indexed the folder yet
        with EigenIndex.create(place, load(), root=photos) as index:
            index.update(photos, load())
    live = LiveServer(photos, load())
    try:
        page = SearchPage(chrome.new_context(), live)
        page.search(QUERY)
        before = page.names
        thumb = f".enn-card[data-name='{WRENCH}'] .enn-thumb[data-do=good]"
        page.page.click(thumb)
        page.wait_lesson("Not learned")
        assert "%" in page.lesson
        assert page.names == before
        assert page.marks == {}
        assert page.page.get_attribute(thumb, "aria-pressed") == "false"
        assert page.page.locator("#enn-lesson >> text=Undo").count() == 0
        assert not list(tmp_path.rglob("*.sqlite"))
        page.page.click("#enn-lesson >> text=Teach anyway")
        page.wait_lesson("Learned from 1 good")
        assert page.marks == {WRENCH: "good"}
        assert page.names.index(WRENCH) < before.index(WRENCH)
        assert not _unexpected(page)
        page.close()
    finally:
        live.stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def start(*folders: Path, **options: Any) -> Server:
        server = Server(*folders, profiles=tmp_path / "profiles", **options)
        running.append(server)
        return server

    yield start
    for server in running:
        server.kill()


def test_a_newcomer_teaches_by_five_clicks_and_it_is_remembered_in_other_words(chrome, own):
    """The sample gallery, five clicks, kill -9, another start, another way to say it."""
    sky = {f"{name}.webp" for name in ("gc_saturn", "gc_mars", "gc_jupiter", "gc_earth", "gc_sun")}
    first = own()
    page = SearchPage(chrome.new_context(), first)
    page.search("in space")
    for what, wanted in (("good", True), ("good", True), ("good", True), ("bad", False)):
        page.mark(next(n for n in page.names if (n in sky) == wanted and n not in page.marks), what)
    page.mark(next(n for n in page.names if n not in sky and n not in page.marks), "bad")
    assert sorted(page.marks.values()) == ["bad", "bad", "good", "good", "good"]

    first.kill()
    second = own(port=first.port)
    page.page.reload()
    page.page.wait_for_selector(".enn-card")
    page.problems.clear()  # the broken connection
    page.search("a planet in space")
    page.page.click("#enn-count input")
    page.page.click("role=option[name='Show 192']")
    page.wait_status("best 192 of")
    taught = page.names
    assert page.marks == {}  # other words
    page.page.click("text=Without")
    page.page.wait_for_selector(".enn-switch [data-do=exclude][aria-pressed=true]")
    assert _mean_place(taught, sky) < _mean_place(page.names, sky)
    page.taught("in space")
    assert not page.problems
    page.close()
    assert second.process.poll() is None


def _unexpected(page: SearchPage) -> list[str]:
    """Problems, but for a picture that another test took away and this server has not missed."""
    return [problem for problem in page.problems if "404" not in problem]


def _mean_place(ranking: list[str], wanted: set[str]) -> float:
    return sum(ranking.index(n) if n in ranking else len(ranking) for n in wanted) / len(wanted)


@pytest.mark.slow
def test_visitors_of_an_open_server_never_see_each_others_teaching(chrome, own, photos):
    server = own(photos, everybody=True)
    ann, bob = (SearchPage(chrome.new_context(), server) for _ in range(2))
    ann.search(QUERY)
    before = ann.names
    ann.mark(WRENCH, "good")
    bob.search(QUERY)
    assert bob.names == before
    assert bob.marks == {}
    bob.taught("Nothing yet")
    ann.taught(QUERY)
    (cookie,) = ann.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert ann.page.evaluate("document.cookie") == ""
    # Whom no cookie tells from others is taught nothing, and told why.
    bob.tab("Search")
    bob.context.clear_cookies()
    bob.page.click(f".enn-card[data-name='{WRENCH}'] .enn-thumb[data-do=good]")
    bob.wait_lesson("Not learned: this server tells visitors apart by the cookie")
    assert bob.marks == {}
    # The answer brought a cookie: now it works.
    bob.mark(WRENCH, "good")
    assert len(list(server.profiles.glob("visitor-*/*/*.sqlite"))) == 2
    for page in (ann, bob):
        assert not _unexpected(page)
        page.close()
