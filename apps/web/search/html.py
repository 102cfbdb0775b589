"""The HTML of the search page: pure functions from values to strings, everything escaped.

The strings are shown by `gr.HTML` with its default template, which inserts them as they are. Its
other templates evaluate inserted values as JavaScript ("${...}" in a file name would run), so they
are not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from apps.web.html import icon, note_html
from apps.web.limits import PICTURE_BYTES

if TYPE_CHECKING:
    from retrieval.teach.reports import Lesson

__all__ = [
    "LOGO",
    "MARK_HINT",
    "THUMB_DOWN",
    "THUMB_UP",
    "Card",
    "answer_html",
    "button_html",
    "captions_html",
    "cards_html",
    "chips_html",
    "counted",
    "file_size",
    "kept_html",
    "lesson_html",
    "message_html",
    "picker_html",
    "progress_html",
    "skipped_html",
    "status_html",
    "tiles_html",
    "told",
]

BAR_MEANING = "A full bar is the best match of this search, an empty one an average picture."


@dataclass(frozen=True)
class Card:
    """What a card shows of one image.

    Args:
        token: opaque id of the image in URLs and events.
        path: path relative to the collection's folder, with forward slashes.
        width, height: pixels.
        size: bytes.
        score: similarity of the search, or None when nothing was searched.
        share: how far `score` is on the way from the collection's average to the best, 0..1.
        credit: who made the picture and under which licence, if known.
        mark: what the visitor said of it for this search: good, bad, or None for nothing.
        moved: places it went up (negative: down) since the ranking that the visitor compares with.
        new: it was not among the pictures of that ranking.
    """

    token: str
    path: str
    width: int
    height: int
    size: int
    score: float | None = None
    share: float | None = None
    credit: str = ""
    mark: bool | None = None
    moved: int = 0
    new: bool = False


def file_size(count: int) -> str:
    """1536 -> "1.5 KB"."""
    if count < 1000:
        return f"{count} bytes"
    value, unit = count / 1000, "KB"
    for larger in ("MB", "GB"):
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def picker_html(
    preview: str | None = None, *, caption: str = "", label: str = "Search with a picture"
) -> str:
    """The field for a query picture: empty with its invitation, or showing `preview` (a URL)."""
    if preview is None:
        return (
            f'<div class="enn-picker" data-state="empty" data-limit="{PICTURE_BYTES}">'
            '<label class="enn-drop">'
            '<input type="file" accept="image/*,.heic,.heif,.avif,.jp2,.ppm,.psd" '
            'class="enn-file" '
            f'aria-label="{escape(label)}">'
            f'{_PICTURE}<span class="enn-drop-text"><b>{escape(label)}</b>'
            "<small>choose, drop or paste one</small></span></label>"
            '<p class="enn-problem" role="alert"></p></div>'
        )
    return (
        f'<div class="enn-picker" data-state="full" data-limit="{PICTURE_BYTES}">'
        '<div class="enn-preview">'
        f'<img src="{escape(preview)}" alt="The picture to search with">'
        f'<span class="enn-preview-text">{escape(caption)}</span>'
        '<button type="button" class="enn-remove" data-do="remove" '
        'aria-label="Remove this picture" title="Remove this picture">✕</button></div>'
        '<p class="enn-problem" role="alert"></p></div>'
    )


def chips_html(queries: Sequence[str]) -> str:
    """Example searches as buttons."""
    chips = "".join(
        f'<button type="button" class="enn-chip" data-query="{escape(q)}">{escape(q)}</button>'
        for q in queries
    )
    return (
        f'<div class="enn-chips" role="group" aria-label="Example searches">{chips}</div>'
        '<p class="enn-tip">Tip: <b>beach - people</b> leaves something out, '
        "<b>2:red car + snow</b> makes a part count more.</p>"
    )


def status_html(
    text: str,
    *,
    clear: bool = False,
    taught: bool | None = None,
    profile: str = "",
    follows: Sequence[tuple[str, float]] = (),
) -> str:
    """The line above the results, announced by screen readers.

    Args:
        text: what is shown.
        clear: offer to start again.
        taught: which side the switch between results with and without teaching is on; None for no
            switch, since nothing was taught.
        profile: name of the profile, shown with the switch.
        follows: the taught queries that these results follow, and the share of each.
    """
    button = (
        '<button type="button" class="enn-link" data-do="clear">Clear search</button>'
        if clear
        else ""
    )
    switch = ""
    if taught is not None:
        sides = "".join(
            f'<button type="button" data-do="{name}" aria-pressed="{str(on == taught).lower()}">'
            f"{label}</button>"
            for name, label, on in (
                ("include", "With what I taught", True),
                ("exclude", "Without", False),
            )
        )
        switch = (
            f'<span class="enn-switch" role="group" aria-label="Results">{sides}</span>'
            '<button type="button" class="enn-link" data-do="profile" '
            f'title="Open what was taught">Profile: {escape(profile)}</button>'
        )
    return (
        '<div class="enn-status" role="status" aria-live="polite">'
        f"<span>{escape(text)}</span>{_follows(follows)}{button}{switch}</div>"
    )


def _follows(taught: Sequence[tuple[str, float]]) -> str:
    """Which taught queries answer now."""
    if not taught:
        return ""
    named = ", ".join(f"“{query:.60}” {share:.0%}" for query, share in taught[:_MOST_FOLLOWED])
    more = f" and {len(taught) - _MOST_FOLLOWED} more" if len(taught) > _MOST_FOLLOWED else ""
    return f'<span class="enn-follows">Follows what was taught: {escape(named)}{more}</span>'


_MOST_FOLLOWED = 3

MARK_HINT = (
    '<p class="enn-hint">Mark pictures good or bad and the search learns at once. '
    '<span class="enn-keys">On the keyboard: <kbd>G</kbd> or <kbd>+</kbd> good, '
    "<kbd>B</kbd> or <kbd>-</kbd> bad, again to take it back.</span></p>"
)


def cards_html(
    cards: Sequence[Card],
    *,
    label: str,
    query: str | None = None,
    picture: str = "",
    profile: str = "",
) -> str:
    """The grid of results. Every card carries what the larger view shows of it.

    Args:
        cards: best first.
        label: of the list, for screen readers.
        query: the words that the visitor may mark the pictures for; None for no marks.
        picture: that is searched with, as the page's script sends it back.
        profile: that marks are for.
    """
    markable = query is not None
    items = [_card(card, rank, markable) for rank, card in enumerate(cards, start=1)]
    marks = (
        f' data-query="{escape(query or "")}" data-picture="{escape(picture)}" '
        f'data-profile="{escape(profile)}"'
        if markable
        else ""
    )
    return f'<ul class="enn-grid" aria-label="{escape(label)}"{marks}>{"".join(items)}</ul>'


def kept_html(facts: Mapping[str, object]) -> str:
    """What the page's script keeps, so that the page can be loaded again; nothing is shown."""
    return f'<i hidden data-kept="{escape(json.dumps(facts))}"></i>'


def _card(card: Card, rank: int, markable: bool) -> str:
    path = PurePosixPath(card.path)
    folder = "" if str(path.parent) == "." else str(path.parent)
    name = escape(path.name)
    token = escape(card.token)
    facts = {
        "token": card.token,
        "name": path.name,
        "folder": folder,
        "pixels": f"{card.width} × {card.height} pixels",
        "bytes": file_size(card.size),
    }
    if card.credit:
        facts["credit"] = card.credit
    if card.mark is not None:
        facts["mark"] = "good" if card.mark else "bad"
    match = ""
    spoken = ""
    if card.score is not None and card.share is not None:
        score = f"{card.score:.2f}"
        percent = max(3, min(100, round(100 * card.share)))
        facts |= {"percent": str(percent), "score": score}
        match = (
            f'<span class="enn-match" title="{BAR_MEANING}">'
            f'<span class="enn-bar" aria-hidden="true"><i style="width:{percent}%"></i></span>'
            f'<span class="enn-score">{score}</span></span>'
        )
        spoken = f", similarity {score}"
    badge, change = _moved(card)
    if card.mark is not None:
        spoken += f", marked {facts['mark']}"
    data = " ".join([f'data-{key}="{escape(value)}"' for key, value in facts.items()])
    return (
        f'<li class="enn-card" {data}>'
        f'<button type="button" class="enn-open" data-do="open" '
        f'aria-label="{rank}: {name}{spoken}{change}. Show larger">'
        f'<img src="pictures/card/{token}" alt="" loading="lazy" decoding="async">{badge}</button>'
        f'<div class="enn-meta">'
        f'<span class="enn-name" title="{escape(card.path)}">{escape(path.stem)}</span>'
        f'{match}<div class="enn-actions">'
        f'<button type="button" class="enn-small" data-do="like" '
        f'aria-label="More pictures like {name}">More like this</button>'
        f"{_thumbs(card.mark, name) if markable else ''}</div></div></li>"
    )


def _thumbs(mark: bool | None, name: str) -> str:
    buttons = [
        f'<button type="button" class="enn-thumb" data-do="{what}" '
        f'aria-pressed="{str(mark is good).lower()}" aria-label="{what.capitalize()}: {name}" '
        f'title="{title}">{icon}</button>'
        for what, good, icon, title in (
            ("good", True, THUMB_UP, "This is what I meant (G)"),
            ("bad", False, THUMB_DOWN, "This is not what I meant (B)"),
        )
    ]
    return f'<span class="enn-thumbs">{"".join(buttons)}</span>'


def _moved(card: Card) -> tuple[str, str]:
    """A badge on the picture and the same in words."""
    if card.new:
        kind, text, spoken = "new", "new", ", new here"
    elif card.moved:
        up, places = card.moved > 0, abs(card.moved)
        kind, text = ("up", f"▲{places}") if up else ("down", f"▼{places}")
        spoken = f", {kind} {places} {'place' if places == 1 else 'places'}"
    else:
        return "", ""
    return f'<span class="enn-moved enn-{kind}" aria-hidden="true">{text}</span>', spoken


def lesson_html(
    text: str,
    *,
    undo: int | None = None,
    profile: str = "",
    force: bool = False,
    bad: bool = False,
) -> str:
    """The answer to a mark.

    Args:
        text: what happened; empty for no answer.
        undo: entry of the history that a button takes back.
        profile: whose history that is.
        force: offer to teach what was refused.
        bad: it is not what the visitor wanted.
    """
    if not text:
        return ""
    buttons = ""
    if undo is not None:
        buttons += button_html(
            "undo", "Undo", f' data-entry="{undo}" data-profile="{escape(profile)}"'
        )
    if force:
        buttons += button_html("force", "Teach anyway")
    kind = "enn-bad" if bad else "enn-good"
    return (
        f'<div class="enn-lesson enn-notice {kind}"><span class="enn-told">{escape(text)}</span>'
        f"{buttons}</div>"
    )


def answer_html(number: int, refused: str | None) -> str:
    """Tells the page's script that the server has answered its marks.

    Args:
        number: of what it sent.
        refused: why nothing was learned, None if it was. The script keeps it in view where what
            comes next would take its place.
    """
    said = "" if refused is None else f' data-refused="{escape(refused)}"'
    return f'<i hidden data-answer="{number}"{said}></i>'


def told(lesson: Lesson, *, new: int = 0, up: int = 0) -> str:
    """A lesson in plain words.

    Args:
        lesson: what `Teacher.teach` returned.
        new: pictures that came in among those shown.
        up: pictures that moved up among those shown.
    """
    if lesson.refused:
        return lesson.refused[:1].upper() + lesson.refused[1:] + "."
    marks = counted(lesson.good, lesson.bad)
    if lesson.kept_text and not lesson.good:
        parts = [
            f"Noted ({marks}). Bad pictures alone do not say what is wanted: mark a good one too."
        ]
    elif lesson.kept_text:
        parts = [
            f"Noted ({marks}). Checked against each other, these marks do not say what they have "
            "in common better than the search itself does, so it stays as it is for now; more "
            "marks may change that."
        ]
    elif not (lesson.good or lesson.bad):
        parts = ["Taken back: nothing is marked for this search any more."]
    else:
        changes = [
            f"{count} {name}" for count, name in ((new, "new here"), (up, "moved up")) if count
        ]
        parts = [f"Learned from {marks}: {', '.join(changes) or 'the order stays as it was'}."]
    if lesson.untouched is not None and not lesson.kept_text and (lesson.good or lesson.bad):
        parts.append(_reach(lesson))
    if lesson.ignored:
        count = len(lesson.ignored)
        reason = next(iter(lesson.ignored.values()))
        parts.append(f"{_pictures(count)} left out: {reason}.")
    for query, before, after in lesson.worse[:2]:
        parts.append(f"“{query}” now fits its marks less well ({before:.2f} → {after:.2f}).")
    return " ".join(parts)


def _reach(lesson: Lesson) -> str:
    """What a lesson does to other searches: known exactly, as each of them takes a share of it."""
    total = lesson.untouched + len(lesson.reaches) if lesson.untouched is not None else 0
    helped = " and ".join(f"“{query}” ({share:.0%})" for query, share in lesson.reaches[:2])
    if not helped:
        return f"It leaves all {total} everyday searches alone."
    more = f" and {len(lesson.reaches) - 2} more" if len(lesson.reaches) > 2 else ""
    alone = f"{lesson.untouched} of {total} everyday searches"
    return f"It also moves {helped}{more}, and leaves alone {alone}."


def counted(good: Sequence[int], bad: Sequence[int], unmarked: Sequence[int] = ()) -> str:
    """ "2 good, 1 bad"."""
    parts = ((len(good), "good"), (len(bad), "bad"), (len(unmarked), "taken back"))
    return ", ".join(f"{count:,} {name}" for count, name in parts if count) or "no marks"


def button_html(what: str, label: str, more: str = "") -> str:
    return f'<button type="button" class="enn-link" data-do="{what}"{more}>{label}</button>'


def _pictures(count: int) -> str:
    return "1 picture was" if count == 1 else f"{count:,} pictures were"


def message_html(title: str, text: str) -> str:
    """Shown in place of results: nothing searched, nothing found, something wrong."""
    return f'<div class="enn-message">{_PICTURE}<h2>{escape(title)}</h2><p>{escape(text)}</p></div>'


def captions_html(ranked: Sequence[tuple[str, float, int]]) -> str:
    """Captions best first; each is (caption, score, bar length in percent)."""
    rows = "".join(
        f'<li class="{"enn-best" if rank == 1 else ""}"><span class="enn-rank">{rank}</span>'
        f'<span class="enn-caption">{escape(caption)}</span>'
        f'<span class="enn-bar" aria-hidden="true"><i style="width:{percent}%"></i></span>'
        f'<span class="enn-score">{round(score, 2) + 0:.2f}</span></li>'
        for rank, (caption, score, percent) in enumerate(ranked, start=1)
    )
    return f'<ol class="enn-captions" aria-label="Captions, best first">{rows}</ol>'


def tiles_html(facts: Sequence[tuple[str, str]]) -> str:
    """Numbers with their meaning, side by side."""
    tiles = "".join(
        f'<div class="enn-tile"><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>'
        for name, value in facts
    )
    return f'<dl class="enn-tiles">{tiles}</dl>'


def progress_html(text: str, *, done: int | None = None, total: int | None = None) -> str:
    """A progress bar, moving without a number when `total` is unknown."""
    if done is None or not total:
        bar = '<progress class="enn-progress" aria-label="Progress"></progress>'
    else:
        bar = (
            f'<progress class="enn-progress" max="{total}" value="{min(done, total)}" '
            'aria-label="Progress"></progress>'
        )
    return f'<div class="enn-job" role="status">{bar}<p>{escape(text)}</p></div>'


def skipped_html(skipped: Sequence[tuple[str, str]], total: int) -> str:
    """Files left out and why; `skipped` may be the beginning of a list of `total`."""
    if not total:
        return note_html("No file had to be left out.")
    rows = "".join(
        f"<tr><td>{escape(path)}</td><td>{escape(reason)}</td></tr>" for path, reason in skipped
    )
    rest = total - len(skipped)
    more = note_html(f"and {rest:,} more") if rest > 0 else ""
    return (
        '<div class="enn-table" tabindex="0" role="region" aria-label="Files left out">'
        "<table><thead><tr><th>File</th><th>Why it was left out</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{more}"
    )


# A lens with two axes at right angles: the eigenbasis one looks through.
LOGO = icon(
    '<circle cx="10.5" cy="10.5" r="7.5"/><path d="m16 16 5 5"/>'
    '<path d="M7 13.2 14 7.8M8.7 8.2l3.6 4.6"/>',
    cls="enn-logo",
    width=2,
)
THUMB_UP = icon(
    '<path d="M3.5 11h3v9h-3zM6.5 11l4-7.5c1.7 0 2.7 1.3 2.3 3L12 9.5h6a2 2 0 0 1 2 '
    '2.4l-1.3 6.5a2 2 0 0 1-2 1.6H6.5"/>',
    cls="enn-thumb-icon",
)
THUMB_DOWN = THUMB_UP.replace("<path", '<path transform="rotate(180 12 12)"')
_PICTURE = icon(
    '<rect x="3" y="4.5" width="18" height="15" rx="2.5"/><circle cx="8.5" cy="9.5" r="1.6"/>'
    '<path d="m4 17 5-4.5 3.5 3 3.5-4L20.5 16"/>',
    cls="enn-icon",
)
