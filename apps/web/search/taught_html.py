"""The HTML of what was taught: the answer to a mark, the history, the profile picker.

Pure functions from values to escaped strings, like `apps.web.search.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import quote

from apps.web.html import note_html

if TYPE_CHECKING:
    from retrieval.teach.teacher import HistoryEntry, Lesson

__all__ = ["counted", "files_html", "history_html", "lesson_html", "profiles_html", "told"]

SHOWN = 500  # entries of the history


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
        buttons += _button("undo", "Undo", f' data-entry="{undo}" data-profile="{escape(profile)}"')
    if force:
        buttons += _button("force", "Teach anyway")
    kind = "enn-bad" if bad else "enn-good"
    return (
        f'<div class="enn-lesson enn-notice {kind}"><span class="enn-told">{escape(text)}</span>'
        f"{buttons}</div>"
    )


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
            "in common better than the words do, so the words alone decide for now; more marks "
            "may change that."
        ]
    elif not (lesson.good or lesson.bad):
        parts = ["Taken back: nothing is marked for this search any more."]
    else:
        changes = [
            f"{count} {name}" for count, name in ((new, "new here"), (up, "moved up")) if count
        ]
        parts = [f"Learned from {marks}: {', '.join(changes) or 'the order stays as it was'}."]
    if lesson.ignored:
        count = len(lesson.ignored)
        reason = next(iter(lesson.ignored.values()))
        parts.append(f"{_pictures(count)} left out: {reason}.")
    for query, before, after in lesson.worse[:2]:
        parts.append(f"“{query}” now fits its marks less well ({before:.2f} → {after:.2f}).")
    return " ".join(parts)


def counted(good: Sequence[int], bad: Sequence[int], unmarked: Sequence[int] = ()) -> str:
    """ "2 good, 1 bad"."""
    parts = ((len(good), "good"), (len(bad), "bad"), (len(unmarked), "taken back"))
    return ", ".join(f"{count:,} {name}" for count, name in parts if count) or "no marks"


def profiles_html(names: Sequence[str], chosen: str) -> str:
    """Choosing a profile, or beginning a new one."""
    listed = sorted({*names, chosen})
    options = "".join(
        f'<option value="{escape(name)}"{" selected" if name == chosen else ""}>{escape(name)}'
        "</option>"
        for name in listed
    )
    return (
        f'<form class="enn-profiles" data-profile="{escape(chosen)}">'
        f'<label>Profile <select data-do="choose">{options}</select></label>'
        '<label>New profile <input type="text" data-part="name" maxlength="64" '
        'autocomplete="off" spellcheck="false" placeholder="name"></label>'
        '<button type="submit" class="enn-button">Create</button></form>'
        '<p class="enn-note">Each profile learns separately. What you teach changes searches in '
        "this profile only, is kept when the server restarts, and works for every collection "
        "of the same model.</p>"
    )


def history_html(entries: Sequence[HistoryEntry]) -> str:
    """What was taught, newest first, each with its undo."""
    if not entries:
        return note_html(
            "Nothing yet. Search for something in words and mark pictures good or bad."
        )
    newest = sorted(entries, key=lambda entry: -entry.entry)
    rows = "".join(_entry(entry) for entry in newest[:SHOWN])
    rest = len(newest) - SHOWN
    more = note_html(f"and {rest:,} older ones") if rest > 0 else ""
    return f'<ol class="enn-history">{rows}</ol>{more}'


def _entry(entry: HistoryEntry) -> str:
    at = datetime.fromtimestamp(entry.at, UTC)
    marks = counted(entry.good, entry.bad, entry.unmarked)
    notes = []
    if entry.rule != "adapter":
        notes.append(f"rule {entry.rule}")
    if entry.kept_text:
        notes.append("the words alone decide")
    if not entry.active:
        notes.append("undone")
    note = f' <span class="enn-tag">{escape(", ".join(notes))}</span>' if notes else ""
    button = (
        _button(
            "undo",
            "Undo",
            f' data-entry="{entry.entry}" '
            f'aria-label="Undo entry {entry.entry}: {escape(entry.query)}"',
        )
        if entry.active
        else ""
    )
    return (
        f'<li class="{"" if entry.active else "enn-undone"}"><span class="enn-at">'
        f'<time datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%Y-%m-%d %H:%M} UTC</time></span>'
        f'<span class="enn-what"><b>{escape(entry.query)}</b>{note}</span>'
        f'<span class="enn-marks">{marks}</span>{button}</li>'
    )


def files_html(collection: int, profile: str, *, any_taught: bool) -> str:
    """Taking what was taught along, and forgetting it."""
    address = f"teaching/{collection}/{quote(profile)}"
    export = (
        f'<a class="enn-button" href="{address}" download data-do="export">Export as a file</a>'
        if any_taught
        else ""
    )
    forget = (
        '<button type="button" class="enn-button enn-danger" data-do="forget">'
        "Forget everything</button>"
        if any_taught
        else ""
    )
    return (
        f'<div class="enn-files">{export}'
        f'<label class="enn-button enn-import">Import a file<input type="file" '
        f'accept=".json,application/json" data-address="{address}"></label>{forget}</div>'
        '<p class="enn-problem" role="alert"></p>'
    )


def _button(what: str, label: str, more: str = "") -> str:
    return f'<button type="button" class="enn-link" data-do="{what}"{more}>{label}</button>'


def _pictures(count: int) -> str:
    return "1 picture was" if count == 1 else f"{count:,} pictures were"
