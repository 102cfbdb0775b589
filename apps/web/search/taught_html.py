"""The HTML of what was taught: the history, the profile picker.

Pure functions from values to escaped strings, like `apps.web.search.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import quote

from apps.web.html import note_html
from apps.web.search.html import button_html, counted
from retrieval.teach.knowledge import LOOKUP

if TYPE_CHECKING:
    from retrieval.teach.teacher import HistoryEntry

__all__ = ["files_html", "history_html", "profiles_html"]

SHOWN = 500  # entries of the history


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
        return note_html("Nothing yet. Search for something and mark pictures good or bad.")
    newest = sorted(entries, key=lambda entry: -entry.entry)
    rows = "".join(_entry(entry) for entry in newest[:SHOWN])
    rest = len(newest) - SHOWN
    more = note_html(f"and {rest:,} older ones") if rest > 0 else ""
    return f'<ol class="enn-history">{rows}</ol>{more}'


def _entry(entry: HistoryEntry) -> str:
    at = datetime.fromtimestamp(entry.at, UTC)
    marks = counted(entry.good, entry.bad, entry.unmarked)
    notes = []
    if entry.rule != LOOKUP:
        notes.append(f"rule {entry.rule}")
    if entry.kept_text:
        notes.append("left as it is")
    if not entry.active:
        notes.append("undone")
    note = f' <span class="enn-tag">{escape(", ".join(notes))}</span>' if notes else ""
    button = (
        button_html(
            "undo",
            "Undo",
            f' data-entry="{entry.entry}" '
            f'aria-label="Undo entry {entry.entry}: {escape(entry.shown)}"',
        )
        if entry.active
        else ""
    )
    return (
        f'<li class="{"" if entry.active else "enn-undone"}"><span class="enn-at">'
        f'<time datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%Y-%m-%d %H:%M} UTC</time></span>'
        f'<span class="enn-what"><b>{escape(entry.shown)}</b>{note}</span>'
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
