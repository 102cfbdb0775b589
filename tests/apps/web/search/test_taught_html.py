"""What the page tells of teaching: complete, escaped, and in plain words."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("numpy")
from hypothesis import given
from hypothesis import strategies as st
from page_structure import Structure

from apps.web.search import html, taught_html
from apps.web.search.effects_chart import SHOWN, _Axis, effects_html
from retrieval.teach.teacher import Effect, HistoryEntry, Lesson


def _lesson(**changes) -> Lesson:
    values = {
        "entry": 3,
        "query": "a dog",
        "shown": "a dog",
        "rule": "lookup",
        "good": (1, 2),
        "bad": (3,),
        "ignored": {},
        "kept_text": False,
        "marks_before": 0.6,
        "marks_after": 0.8,
        "overlap": 0.97,
        "overlap_total": 0.95,
        "worse": (),
        "reaches": (),
        "untouched": None,
        "refused": None,
        "seconds": 0.01,
    }
    return Lesson(**{**values, **changes})


def _entry(number: int, **changes) -> HistoryEntry:
    values = {
        "entry": number,
        "at": 1.7e9 + number,
        "query": "a dog",
        "shown": "a dog",
        "good": (1,),
        "bad": (),
        "unmarked": (),
        "rule": "lookup",
        "active": True,
        "kept_text": False,
    }
    return HistoryEntry(**{**values, **changes})


def _effect(query: str = "a dog", before: float = 30.0, after: float = 4.5, **changes) -> Effect:
    values = {
        "query": query,
        "good": 2,
        "bad": 1,
        "good_before": before,
        "good_after": after,
        "bad_before": 2.0,
        "bad_after": 40.0,
    }
    return Effect(**{**values, **changes})


def _all(text: str) -> list[str]:
    return [
        html.lesson_html(text, undo=1, force=True, bad=True),
        html.lesson_html(html.told(_lesson(refused=text))),
        html.lesson_html(html.told(_lesson(worse=((text, 0.9, 0.8),), ignored={1: text}))),
        html.lesson_html(html.told(_lesson(reaches=((text, 0.4),), untouched=200))),
        html.status_html("", taught=True, follows=[(text, 0.4)]),
        html.cards_html([], label="", query=text, picture=text, profile=text),
        taught_html.profiles_html([text], text),
        taught_html.history_html([_entry(1, shown=text, rule=text)]),
        taught_html.files_html(0, text, any_taught=True),
        effects_html([_effect(text)], 100),
    ]


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=40))
def test_text_never_becomes_markup(text):
    plain = [Structure(part).tags for part in _all("x")]
    assert [Structure(part).tags for part in _all(text)] == plain


def test_a_lesson_tells_what_it_did():
    told = html.told(_lesson(), new=2, up=5)
    assert told == "Learned from 2 good, 1 bad: 2 new here, 5 moved up."
    assert "stays as it was" in html.told(_lesson())
    assert "stays as it is" in html.told(_lesson(kept_text=True))
    assert "mark a good one too" in html.told(_lesson(good=(), kept_text=True))
    assert "Taken back" in html.told(_lesson(good=(), bad=()))


def test_a_refused_lesson_tells_its_numbers_and_offers_to_insist():
    lesson = _lesson(entry=None, refused="not learned: 31% of 200 queries would change")
    assert html.told(lesson) == "Not learned: 31% of 200 queries would change."
    shown = html.lesson_html(html.told(lesson), force=True, bad=True)
    assert 'data-do="force"' in shown
    assert "Undo" not in shown


def test_what_suffers_and_what_is_left_out_is_told():
    told = html.told(_lesson(worse=(("a cat", 0.95, 0.9),), ignored={7: "it was deleted"}))
    assert "“a cat” now fits its marks less well (0.95 → 0.90)." in told
    assert "1 picture was left out: it was deleted." in told


def test_what_a_lesson_does_to_other_searches_is_told_with_numbers():
    told = html.told(
        _lesson(reaches=(("a puppy", 0.63), ("a cat", 0.2), ("a fox", 0.1)), untouched=198)
    )
    assert told.endswith(
        "It also moves “a puppy” (63%) and “a cat” (20%) and 1 more, and leaves alone 198 of 201 "
        "everyday searches."
    )
    assert "leaves all 201 everyday searches alone" in html.told(_lesson(untouched=201))
    assert "moves" not in html.told(_lesson(untouched=201, kept_text=True))


def test_the_taught_queries_that_answer_are_named_beside_the_results():
    four = [(f"dog {i}", 0.25) for i in range(4)]
    shown = html.status_html("best 3", taught=True, follows=four)
    assert "Follows what was taught: “dog 0” 25%, “dog 1” 25%, “dog 2” 25% and 1 more" in shown
    assert "Follows" not in html.status_html("best 3", taught=True)


def test_no_answer_takes_no_room():
    assert html.lesson_html("") == ""


def test_the_history_is_newest_first_and_only_active_entries_can_be_undone():
    shown = taught_html.history_html([_entry(1, active=False), _entry(2, bad=(5,)), _entry(3)])
    assert shown.index('data-entry="3"') < shown.index('data-entry="2"')
    assert 'data-entry="1"' not in shown
    assert "undone" in shown
    assert "1 good, 1 bad" in shown
    assert 'datetime="2023-11-14T22:13:23Z"' in shown
    assert "Nothing yet" in taught_html.history_html([])


def test_the_chosen_profile_is_listed_even_before_it_was_taught():
    shown = Structure(taught_html.profiles_html(["work"], "home"))
    assert shown.tags.count("option") == 2
    assert ("data-profile", "home") in shown.attributes


def test_an_empty_profile_has_nothing_to_export_or_forget():
    shown = taught_html.files_html(0, "me", any_taught=False)
    assert "Import" in shown
    assert "Export" not in shown
    assert "Forget" not in shown


def test_the_chart_is_a_table_with_drawings_that_are_silent():
    shown = effects_html([_effect(), _effect("a cat", 3.0, 12.0)], 1000)
    page = Structure(shown)
    assert page.tags.count("tr") == 3
    assert "30 → 4.5" in page.text
    assert "stand higher in 1 of 2 taught searches, lower in 1." in page.text
    assert page.tags.count("svg") == 3
    assert shown.count('class="enn-plot" aria-hidden="true"') == 3
    assert "enn-worse" in shown
    assert effects_html([], 10) == ""


def test_searches_without_good_pictures_have_no_drawing():
    nan = math.nan
    bad = _effect(before=nan, after=nan, good=0)
    gone = _effect(before=nan, after=nan, good=0, bad=0, bad_before=nan, bad_after=nan)
    text = Structure(effects_html([bad, gone], 50)).text
    assert "bad ones: 2 → 40" in text
    assert "not in this collection" in text
    assert "No picture has been marked good yet." in text


def test_a_long_chart_is_cut():
    shown = effects_html([_effect(str(n)) for n in range(SHOWN + 7)], 10)
    assert "and 7 more" in shown
    assert shown.count("<tr>") == SHOWN + 1


@given(st.integers(0, 10**7), st.floats(0, 10**8), st.floats(0, 10**8))
def test_places_are_drawn_inside_and_in_order(last, first, second):
    axis = _Axis(last)
    a, b = axis.x(min(first, second)), axis.x(max(first, second))
    assert 4 <= a <= b <= 96
    axis.ticks()


def test_anything_shaped_like_an_effect_will_do():
    effect = SimpleNamespace(**vars(_effect()))
    assert effects_html([effect], 10)  # type: ignore[list-item]
