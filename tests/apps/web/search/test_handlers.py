"""What the page's handlers make of what a browser sends, whatever that is."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("gradio")
pytest.importorskip("faiss")

import gradio as gr
from colour_model import Colours
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_cases import TinyTestModel, photo
from starlette.requests import Request

from apps.web.limits import MARKED_PICTURES
from apps.web.search import serve
from apps.web.search.collection import Collection
from apps.web.search.handlers import Query, Screen
from apps.web.search.page import head
from apps.web.search.pictures import ImageRef, Pictures, Uploads
from apps.web.search.taught_handlers import TaughtHandlers
from apps.web.visitors import Shelf, Visitor, remember
from retrieval.index.eigen_index import EigenIndex
from retrieval.search import Searcher
from retrieval.teach import guard
from retrieval.teach.profiles import journal_of
from retrieval.teach.teacher import Teacher

TEXT, PICKER, STATUS, LESSON, RESULTS, SCREEN = range(6)


@pytest.fixture
def page(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    model = Colours()
    index = EigenIndex.create(tmp_path / "index", model, root=folder)
    index.update(folder, model)
    pictures = Pictures(lambda ref: (b"", True))
    searcher = Searcher(index, model)  # type: ignore[arg-type]
    collection = Collection("Bilder", searcher, folder, token=pictures.token)
    yield TaughtHandlers(
        [collection], pictures, Uploads(), Shelf(journal_of, Teacher.open), "Title"
    )
    index.close()


def _request(scope: str | None = "local") -> gr.Request:
    inner = Request(remember({"type": "http", "headers": [], "query_string": b""}, Visitor(scope)))
    return gr.Request(request=inner)


def _event(data: object) -> gr.EventData:
    event = gr.EventData(None, data)
    event._data = data
    return event


def _searched(page: TaughtHandlers, text: str = "red") -> Screen:
    return page.search_text(text, 0, 12, Screen(), _request())[SCREEN]


def _token(page: TaughtHandlers, id_: int) -> str:
    return page.pictures.token(page.collections[0].ref(id_))


def _mark(page, screen, marks, *, text="red", answer=1, scope="local", **more):
    data = {"marks": marks, "query": text, "answer": answer, "profile": screen.profile, **more}
    return page.mark(0, 12, screen, _request(scope), _event(data))


def test_a_mark_is_learned_and_answered(page):
    screen = _searched(page)
    last = screen.ids[-1]
    shown = _mark(page, screen, {_token(page, last): "good"}, answer=7)
    assert "Learned from 1 good" in shown[LESSON]
    assert 'data-answer="7"' in shown[RESULTS]
    assert "data-refused" not in shown[RESULTS]
    assert 'data-mark="good"' in shown[RESULTS]
    assert shown[SCREEN].ids.index(last) <= screen.ids.index(last)
    assert "enn-switch" in shown[STATUS]
    # Taken back by the same click.
    again = _mark(page, shown[SCREEN], {_token(page, last): "none"})
    assert again[SCREEN].ids == screen.ids
    assert "data-mark" not in again[RESULTS]


def test_a_mark_that_cannot_be_learned_is_not_the_end_of_the_others(page):
    index = page.collections[0].index
    screen = _searched(page)
    first, gone, other = (_token(page, id_) for id_ in screen.ids[:3])
    (index.root / index.entries_of([screen.ids[1]])[screen.ids[1]].path).unlink()
    index.update(None, Colours())
    changed = ImageRef(0, screen.ids[3], "0" * len(page.collections[0].ref(screen.ids[3]).version))
    elsewhere = Pictures(lambda ref: (b"", True)).token(changed)
    for number, odd in enumerate(({other: "none"}, {gone: "good"}, {elsewhere: "bad"})):
        text = f"red {number}"
        shown = _mark(page, screen, {first: "good", **odd}, text=text)
        assert "data-refused" not in shown[RESULTS]
        teacher = page.own_teacher(0, screen, _request())
        assert teacher.marks(text) == {screen.ids[0]: True}
    shown = _mark(page, _searched(page), {first: "good", gone: "bad"})
    assert "1 picture was left out: no longer in the collection" in shown[LESSON]


@pytest.mark.parametrize("words", ["", "red"])
@pytest.mark.parametrize("kind", ["like", "upload"])
def test_a_search_with_a_picture_is_taught(page, folder, words, kind):
    screen = _searched(page)
    if kind == "like":
        query = Query(words, like=_token(page, screen.ids[0]))
    else:
        query = Query(words, upload=page.uploads.add((folder / "5 yellow.png").read_bytes()))
    shown = page.show(Screen(query=query), 0, 12, _request())
    assert f'data-picture="{query.picture}"' in shown[RESULTS]
    last = shown[SCREEN].ids[-1]
    marks = {_token(page, last): "good"}
    learned = _mark(page, shown[SCREEN], marks, text=words, picture=query.picture)
    assert "Learned from 1 good" in learned[LESSON]
    assert learned[SCREEN].ids.index(last) <= shown[SCREEN].ids.index(last)
    assert 'data-mark="good"' in learned[RESULTS]
    assert "Follows what was taught" in learned[STATUS]
    # Nothing of it is in the search in words, or of another picture.
    other = page.show(Screen(query=Query("red")), 0, 12, _request())
    assert "data-mark" not in other[RESULTS]
    history = page.own_teacher(0, screen, _request()).history()
    assert [entry.good for entry in history] == [(last,)]


@pytest.mark.parametrize(
    "picture", ["like", "like ", "like x", "upload nosuch", "sound x", 7, None, ["like"]]
)
def test_marks_for_an_odd_picture_teach_nothing(page, picture):
    screen = _searched(page)
    shown = _mark(page, screen, {_token(page, screen.ids[1]): "good"}, text="", picture=picture)
    assert "Not learned" in shown[LESSON]
    assert page.own_teacher(0, screen, _request()).history() == []


def test_under_a_former_rule_pictures_cannot_be_marked(page):
    screen = _searched(page)
    teacher = page.own_teacher(0, screen, _request())
    teacher.teach(page.collections[0].index, "red", [screen.ids[0]], rule="adapter", force=True)
    query = Query(like=_token(page, screen.ids[1]))
    shown = page.show(Screen(query=query), 0, 12, _request())
    assert "data-query" not in shown[RESULTS]
    assert "data-query" in page.show(Screen(query=Query("red")), 0, 12, _request())[RESULTS]


def _badges(results: str) -> list[int]:
    """Places that pictures went up (negative: down), of those that have a badge, best first."""
    found = re.findall("[▲▼][0-9]+", results)
    return [int(text[1:]) * (1 if text[0] == "▲" else -1) for text in found]


def test_badges_compare_with_what_was_seen_before_the_mark(page):
    screen = _searched(page, "something")
    last = _token(page, screen.ids[-1])
    for sign in ("good", "none", "good"):
        before = screen.ids
        shown = _mark(page, screen, {last: sign}, text="something")
        screen = shown[SCREEN]
        moves = [before.index(id_) - place for place, id_ in enumerate(screen.ids)]
        assert any(moves)
        assert _badges(shown[RESULTS]) == [move for move in moves if move]
        up = sum(move > 0 for move in moves)
        assert (f"{up} moved up" in shown[LESSON]) == (sign == "good")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "good",
        {},
        {"marks": {}, "query": "red"},
        {"marks": {"x": "good"}, "query": "red"},
        {"marks": {"x" * 43: "good"}, "query": "red"},
        {"marks": {"TOKEN": "better"}, "query": "red"},
        {"marks": {"TOKEN": ["good"]}, "query": "red"},
        {"marks": {"TOKEN": None}, "query": "red"},
        {"marks": {"TOKEN": "good"}, "query": ""},
        {"marks": {"TOKEN": "good"}, "query": 5},
        {"marks": {"TOKEN": "good"}, "query": "\u0000\ud800"},
        {"marks": {"TOKEN": "none"}, "query": "red"},
        {"marks": {str(n): "good" for n in range(MARKED_PICTURES + 1)}, "query": "red"},
    ],
)
def test_odd_marks_are_answered_and_change_nothing(page, data):
    screen = _searched(page)
    if isinstance(data, dict) and "TOKEN" in data.get("marks", {}):
        data["marks"] = {_token(page, screen.ids[0]): data["marks"]["TOKEN"]}
    if isinstance(data, dict):
        data |= {"answer": 3, "profile": screen.profile}
    shown = page.mark(0, 12, screen, _request(), _event(data))
    assert "Not learned" in shown[LESSON]
    assert "data-refused" in shown[RESULTS]
    assert shown[SCREEN].ids == screen.ids
    assert "Nothing yet" in page.taught(0, screen, _request())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_whatever_a_browser_sends_is_answered(page, data):
    screen = Screen(query=Query(text="red"))
    for handler in (page.mark, page.undo_last):
        assert len(handler(0, 12, screen, _request(), _event(data))) == 6
    for handler in (page.undo_entry, page.choose_profile, page.imported, page.forget_all):
        assert len(handler(0, 12, screen, _request(), _event(data))) == 7


def test_answers_carry_numbers_only(page):
    screen = _searched(page)
    for odd in ('"><b>', -1, 2**70, True, None, 1.5):
        shown = _mark(page, screen, {_token(page, screen.ids[0]): "good"}, answer=odd)
        assert 'data-answer="0"' in shown[RESULTS]


def test_nobody_is_taught_nothing(page):
    screen = _searched(page)
    shown = _mark(page, screen, {_token(page, screen.ids[0]): "good"}, scope=None)
    assert "cookie" in shown[LESSON]
    assert "data-refused" in shown[RESULTS]
    assert "cookie" in page.taught(0, screen, _request(None))
    assert (
        "cookie"
        in page.forget_all(0, 12, screen, _request(None), _event({"profile": "default"}))[0]
    )


def test_people_and_profiles_are_apart(page):
    screen = _searched(page)
    last = _token(page, screen.ids[-1])
    _mark(page, screen, {last: "good"}, scope="user-1")
    for scope, name in (("user-2", "default"), ("user-1", "other"), ("local", "default")):
        seen = page.again(0, 12, Screen(screen.query, profile=name), _request(scope))
        assert seen[SCREEN].ids == screen.ids
        assert "enn-switch" not in seen[STATUS]
    assert "enn-switch" in page.again(0, 12, screen, _request("user-1"))[STATUS]


def test_a_refused_lesson_is_told_with_numbers_and_can_be_insisted_on(page, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "LEAST_OVERLAP", 1.01)
    screen = _searched(page)
    last = screen.ids[-1]
    shown = _mark(page, screen, {_token(page, last): "good"})
    assert "Not learned" in shown[LESSON]
    assert "%" in shown[LESSON]
    assert 'data-do="force"' in shown[LESSON]
    assert 'data-do="undo"' not in shown[LESSON]
    assert "data-refused" in shown[RESULTS]
    assert shown[SCREEN].ids == screen.ids
    assert not (tmp_path / "profiles").exists()
    shown = page.insist(0, 12, shown[SCREEN], _request())
    assert "Learned from 1 good" in shown[LESSON]
    assert shown[SCREEN].refused is None
    assert 'data-mark="good"' in shown[RESULTS]


def test_insisting_without_a_refused_lesson_searches_again(page):
    screen = _searched(page)
    assert page.insist(0, 12, screen, _request())[SCREEN].ids == screen.ids


def test_a_page_of_before_a_restart_changes_nothing(page):
    """It shows one profile while the server, having lost its screen, thinks of the default one."""
    screen = _searched(page)
    token = _token(page, screen.ids[0])
    _mark(page, screen, {token: "good"})
    stale = {"profile": "family", "entry": 1, "marks": {token: "bad"}, "query": "red"}
    for handler in (page.mark, page.undo_last):
        assert "load it again" in handler(0, 12, screen, _request(), _event(stale))[LESSON]
    for handler in (page.undo_entry, page.forget_all):
        assert "load it again" in handler(0, 12, screen, _request(), _event(stale))[0]
    assert [entry.active for entry in page.teacher(0, screen, _request()).history()] == [True]


def test_a_damaged_profile_does_not_stop_searching(page, tmp_path):
    screen = _searched(page)
    _mark(page, screen, {_token(page, screen.ids[0]): "good"})
    (file,) = (tmp_path / "profiles").rglob("*.sqlite")
    for teacher in page.teachers._open.values():
        teacher.close()
    for path in file.parent.iterdir():
        path.write_bytes(b"not a database" * 100)
    page.teachers = Shelf(journal_of, Teacher.open)
    shown = page.search_text("red", 0, 12, screen, _request())
    assert "Searching without what was taught" in shown[LESSON]
    assert shown[SCREEN].ids == screen.ids


def test_a_picture_of_an_unknown_collection_is_refused(page):
    token = page.pictures.token(ImageRef(9, 1, "0" * 14))
    shown = _mark(page, _searched(page), {token: "good"})
    assert "Not learned" in shown[LESSON]


@pytest.mark.parametrize("remembered", ["", "default", "demo", "../x"])
def test_the_demo_teaches_its_own_profile_whatever_the_browser_remembers(page, remembered):
    page.teachers = Shelf(journal_of, Teacher.open, default="demo")
    screen = page.open(0, 12, remembered, Screen(), _request())[SCREEN]
    assert screen.profile == "demo"
    chosen = page.choose_profile(0, 12, screen, _request(), _event({"profile": "default"}))
    assert chosen[1 + SCREEN].profile == "demo"
    screen = page.search_text("red", 0, 12, screen, _request())[SCREEN]
    shown = _mark(page, screen, {_token(page, screen.ids[-1]): "good"})
    assert "Learned" in shown[LESSON]
    model = page.collections[0].model
    assert Shelf(journal_of, Teacher.open).names(model, "local") == ["demo"]


def test_pages_of_one_address_remember_the_demos_profile_apart():
    assert 'name="enn-profile" content="demo"' in head("demo")
    assert 'name="enn-profile" content="default"' in head()


@pytest.mark.parametrize("folders", [[], ["mine"]])
def test_only_the_sample_gallery_is_a_demo(tmp_path, monkeypatch, folders):
    served: list[Shelf] = []
    monkeypatch.setattr(serve, "gallery", lambda: tmp_path)
    monkeypatch.setattr(serve, "_open_collections", lambda *_: iter(()))
    monkeypatch.setattr(serve, "create_app", lambda *args, **_: served.append(args[3]))
    monkeypatch.setattr(serve.server, "run", lambda *_, **__: None)
    serve.serve(folders=[tmp_path / name for name in folders], port=0)
    assert served[0].default == ("default" if folders else "demo")


@pytest.mark.parametrize("damage", [0, 1], ids=["whole", "damaged"])
def test_a_damaged_index_of_the_sample_gallery_is_made_again(tmp_path, monkeypatch, damage):
    root, model = tmp_path / "photos", TinyTestModel()
    for number in range(3):
        photo(root / f"{number}.png", number)
    (tmp_path / "index").mkdir()
    monkeypatch.setattr(serve, "gallery", lambda: root)
    monkeypatch.setattr(serve, "credits_of", lambda _: None)
    monkeypatch.setattr(serve, "_cached_index_dir", lambda *_: tmp_path / "index")
    monkeypatch.setattr("retrieval.model.loading.load", lambda *_: model)

    def found() -> list:
        (collection,) = serve._open_collections(None, [], None, Pictures(lambda ref: (b"", True)))
        return collection.index.search(np.eye(16, dtype=np.float32)[0], 3)

    good = found()
    (vectors,) = (tmp_path / "index").glob("vectors-*.faiss")
    before = vectors.read_bytes()
    vectors.write_bytes(before[:300] + bytes([before[300] ^ damage]) + before[301:])
    assert found() == good
    assert vectors.read_bytes() == before


def _sent(page, screen, uid, *, scope="local", **more):
    data = {
        "marks": {_token(page, screen.ids[-1]): "good"},
        "query": "red",
        "answer": 1,
        "profile": screen.profile,
        "id": uid,
        "place": screen.place,
        **more,
    }
    return page.mark(0, 12, screen, _request(scope), _event(data))


def test_marks_that_arrive_twice_are_learned_once_whatever_became_of_them(page):
    screen = _searched(page)
    uid = "0123456789abcdef" * 2
    assert "Learned" in _sent(page, screen, uid)[LESSON]
    again = _sent(page, screen, uid)
    assert "learned already" in again[LESSON]
    assert "data-refused" not in again[RESULTS]
    teacher = page.own_teacher(0, screen, _request())
    teacher.undo()
    assert "learned already" in _sent(page, screen, uid)[LESSON]
    assert not [entry for entry in teacher.history() if entry.active]
    assert teacher.forget() == 1
    assert teacher.history() == []
    assert "learned already" in _sent(page, screen, uid)[LESSON]
    assert teacher.history() == []
    assert "Learned" in _sent(page, screen, uid[::-1])[LESSON]


@pytest.mark.parametrize("uid", ["", "x" * 32, "0" * 31, "0" * 33, 5, ["0"], "0" * 31 + "\n"])
def test_marks_with_an_odd_id_are_refused(page, uid):
    screen = _searched(page)
    assert "no proper id" in _sent(page, screen, uid)[LESSON]


@pytest.mark.parametrize("place", ["", "0" * 16, None, 5])
def test_marks_of_another_place_are_refused(page, place):
    screen = _searched(page)
    assert "another collection" in _sent(page, screen, "0" * 32, place=place)[LESSON]
    assert page.own_teacher(0, screen, _request()).history() == []


def test_marks_of_another_visitor_are_refused(page):
    screen = _searched(page)
    assert "another collection" in _sent(page, screen, "0" * 32, scope="visitor-bob")[LESSON]


def test_marks_that_waited_are_for_the_profile_that_they_were_made_under(page):
    screen = _searched(page)
    shown = _sent(page, screen, "0" * 32, profile="elsewhere")
    assert "“elsewhere”" in shown[LESSON]
    assert page.own_teacher(0, screen, _request()).history() == []


def test_pictures_are_known_after_a_restart_by_their_content(page):
    screen = _searched(page)
    id_ = screen.ids[-1]
    token = _token(page, id_)
    page.pictures._key = bytes(32)  # as of a process that was started anew
    assert page._ref(token).id == id_
    other = page.pictures.token(ImageRef(0, id_, "0" * 14))
    page.pictures._key = bytes(range(32))
    with pytest.raises(LookupError):
        page._ref(other)
