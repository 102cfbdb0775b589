"""What the search page shows is escaped and complete."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_structure import Structure

from apps.web.html import header_html, note_html, notice_html
from apps.web.search import html
from apps.web.search.html import Card, file_size


def _all(text: str) -> list[str]:
    card = Card("token", f"{text}/{text or 'x'}", 1, 2, 3, 0.5, 0.5, credit=text)
    return [
        header_html(text, text, html.LOGO),
        html.picker_html(text, caption=text, label=text),
        html.picker_html(label=text),
        html.chips_html([text]),
        html.status_html(text, clear=True),
        html.status_html(text, taught=True, profile=text),
        html.cards_html([card], label=text),
        html.cards_html([replace(card, mark=True, moved=2)], label=text, query=text),
        html.message_html(text, text),
        html.captions_html([(text, 0.5, 50)]),
        html.tiles_html([(text, text)]),
        html.progress_html(text, done=1, total=2),
        notice_html(text, bad=True),
        note_html(text),
        html.skipped_html([(text, text)], 9),
    ]


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=40))
def test_text_never_becomes_markup(text):
    plain = [Structure(part).tags for part in _all("x")]
    assert [Structure(part).tags for part in _all(text)] == plain


@pytest.mark.parametrize("text", ["<b>&'\"`</b>", "${alert(1)}", "{{value}}", "'><script>x"])
def test_hostile_names_come_out_as_they_are(text):
    shown = Structure(html.cards_html([Card("t", text, 1, 2, 3)], label="r"))
    assert ("data-name", text.rpartition("/")[2]) in shown.attributes
    assert text.rpartition("/")[2] in shown.text


def test_a_card_says_what_it_shows():
    card = Card("tok", "Zoo & Park/cat.jpg", 640, 480, 123_456, 0.4217, 0.5, credit="Ann, CC0")
    shown = dict(Structure(html.cards_html([card], label="r")).attributes)
    assert shown["data-folder"] == "Zoo & Park"
    assert shown["data-name"] == "cat.jpg"
    assert shown["data-pixels"] == "640 × 480 pixels"
    assert shown["data-bytes"] == "123 KB"
    assert shown["data-score"] == "0.42"
    assert shown["data-percent"] == "50"
    assert shown["data-credit"] == "Ann, CC0"
    assert shown["src"] == "pictures/card/tok"


def test_cards_without_a_search_have_no_score():
    text = html.cards_html([Card("t", "a.jpg", 1, 1, 1)], label="r")
    assert "enn-bar" not in text
    assert "similarity" not in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (9_949, "9.9 KB"),
        (9_950, "10 KB"),
        (999_499, "999 KB"),
        (999_500, "1.0 MB"),
        (2_500_000_000, "2.5 GB"),
        (7_000_000_000_000, "7000 GB"),
    ],
)
def test_file_sizes(count, text):
    assert file_size(count) == text


def test_a_long_list_of_skipped_files_is_cut():
    text = html.skipped_html([("a", "b")], 1234)
    assert "1,233 more" in text
    assert "No file" in html.skipped_html([], 0)


def test_only_searches_in_words_have_thumbs():
    card = Card("t", "a.jpg", 1, 1, 1, 0.5, 0.5)
    assert "enn-thumb" not in html.cards_html([card], label="r")
    shown = html.cards_html([card], label="r", query="a <dog>")
    assert 'data-query="a &lt;dog&gt;"' in shown
    assert shown.count('aria-pressed="false"') == 2


@pytest.mark.parametrize(("mark", "pressed"), [(True, "good"), (False, "bad")])
def test_a_mark_is_a_pressed_button(mark, pressed):
    card = Card("t", "a.jpg", 1, 1, 1, 0.5, 0.5, mark=mark)
    shown = html.cards_html([card], label="r", query="q")
    assert f'data-mark="{pressed}"' in shown
    assert f'data-do="{pressed}" aria-pressed="true"' in shown
    assert shown.count('aria-pressed="true"') == 1
    assert f", marked {pressed}" in shown


@pytest.mark.parametrize(
    ("change", "seen", "heard"),
    [
        ({"moved": 3}, "▲3", "up 3 places"),
        ({"moved": 1}, "▲1", "up 1 place"),
        ({"moved": -2}, "▼2", "down 2 places"),
        ({"new": True}, ">new<", "new here"),
    ],
)
def test_what_moved_is_seen_and_heard(change, seen, heard):
    shown = html.cards_html([Card("t", "a.jpg", 1, 1, 1, 0.5, 0.5, **change)], label="r")
    assert seen in shown
    assert f", {heard}. Show larger" in shown
    still = html.cards_html([Card("t", "a.jpg", 1, 1, 1, 0.5, 0.5)], label="r")
    assert "enn-moved" not in still


def test_the_switch_tells_which_side_it_is_on():
    with_, without = (html.status_html("x", taught=on, profile="me") for on in (True, False))
    assert 'data-do="include" aria-pressed="true"' in with_
    assert 'data-do="exclude" aria-pressed="true"' in without
    assert "Profile: me" in with_
    assert "enn-switch" not in html.status_html("x")
