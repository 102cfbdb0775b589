"""The HTML of teaching on the brain page: the form, what a lesson would do, profiles, history.

Pure functions from values to escaped strings, like `apps.web.brain.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from apps.web.brain.html import table_html
from apps.web.html import note_html

if TYPE_CHECKING:
    from apps.web.brain.session import Scan
    from neuro.teach import Lesson, SiteEntry

__all__ = [
    "form_html",
    "history_html",
    "kept_text",
    "lesson_html",
    "preview_html",
    "profiles_html",
    "taught_files_html",
]

SHOWN = 500  # entries of the history


def form_html(scan: Scan, profile: str, lessons: int, *, problem: str = "") -> str:
    """ "I know the true age" of one scan.

    Args:
        scan: ready, with an age predicted.
        profile: that would learn.
        lessons: labelled scans that it knows.
        problem: why it cannot learn; empty if it can.
    """
    known = "" if scan.age is None else f"{scan.age:g}"
    count = "1 scan" if lessons == 1 else f"{lessons:,} scans"
    disabled = " disabled" if problem else ""
    note = (
        escape(_sentence(problem))
        if problem
        else (
            f"Profile <b>{escape(profile)}</b> has learned from {count}. A preview changes nothing."
        )
    )
    return (
        f'<form class="enn-teach" data-scan="{scan.number}" novalidate>'
        "<h2>I know the true age</h2>"
        '<div class="enn-fields"><label>True age, years '
        f'<input type="number" data-part="age" min="0" max="120" step="any" inputmode="decimal" '
        f'value="{known}" placeholder="e.g. 63.4"></label>'
        '<label>Name in the profile <input type="text" data-part="name" maxlength="60" '
        f'autocomplete="off" spellcheck="false" value="{escape(scan.label)}"></label></div>'
        '<div class="enn-buttons"><button type="button" class="enn-button" data-do="gap">Show the '
        f'gap</button><button type="submit" class="enn-button enn-main"{disabled}>Preview teaching'
        f'</button></div><p class="enn-note">{note}</p>'
        '<p class="enn-problem" role="alert"></p></form>'
    )


def preview_html(lesson: Lesson, scan: Scan, others: Sequence[Scan], profile: str) -> str:
    """What teaching would do, and the buttons that do it.

    Args:
        lesson: of `Site.preview`, not taught.
        scan: that would be taught.
        others: the session's other scans, in the lesson's order.
        profile: that would learn.
    """
    rows = [_effect(scan.label, lesson.age, lesson.before, lesson.after)]
    rows += [
        _effect(other.label, other.age, float(before), float(after))
        for other, before, after in zip(
            others, lesson.earlier_before, lesson.earlier_after, strict=True
        )
    ]
    heads = ("Scan", "True age", "Now", "After", "Change")
    refused = (
        f'<p class="enn-notice enn-bad">{escape(_sentence(lesson.refused))}</p>'
        if (lesson.refused)
        else ""
    )
    accept = "Teach anyway" if lesson.refused else "Accept"
    kind = "enn-button" if lesson.refused else "enn-button enn-main"
    return (
        f'<section class="enn-preview-lesson" data-scan="{scan.number}" data-age="{lesson.age:g}" '
        f'data-name="{escape(scan.label)}" '
        f'data-profile="{escape(profile)}" data-force="{"true" if lesson.refused else "false"}" '
        'aria-label="Preview"><h2>What it would change</h2>'
        f"{table_html(rows, heads, 'Predictions before and after')}"
        f"{_together(lesson, others)}"
        f'<p class="enn-protects">{protected_text(lesson.protected)}</p>{refused}'
        f'<p class="enn-note">{kept_text(lesson.stored_bytes, profile)}</p>'
        f'<div class="enn-buttons"><button type="button" class="{kind}" data-do="accept">{accept}'
        '</button><button type="button" class="enn-button" data-do="dismiss">Not now</button>'
        "</div></section>"
    )


def _effect(name: str, age: float | None, before: float, after: float) -> tuple[str, ...]:
    known = "–" if age is None else f"{age:.1f}"
    change = "0.0" if abs(after - before) < 0.05 else f"{after - before:+.1f}"
    return name, known, f"{before:.1f}", f"{after:.1f}", change


def _together(lesson: Lesson, others: Sequence[Scan]) -> str:
    """The effect on the other scans in one sentence."""
    if not others:
        return ""
    before, after = np.asarray(lesson.earlier_before), np.asarray(lesson.earlier_after)
    change = after - before
    text = (
        f"The other {len(others)} scans change by {np.mean(change):+.1f} years on average, at most "
        f"by {np.abs(change).max():.1f}."
        if len(others) > 1
        else f"The other scan changes by {change[0]:+.1f} years."
    )
    known = np.array([np.nan if other.age is None else other.age for other in others])
    labelled = ~np.isnan(known)
    if labelled.any():
        old = np.abs(before - known)[labelled].mean()
        new = np.abs(after - known)[labelled].mean()
        text += (
            f" Where their age is known ({labelled.sum()}), the mean error goes from {old:.1f} to "
            f"{new:.1f} years."
        )
    return note_html(text)


def protected_text(protected: float) -> str:
    """What it does to the people that the model was trained on."""
    return (
        "With all that this profile would know, the ages predicted for the people that the model "
        f"was trained on change by <b>{protected:.2f} years</b> (root mean square)."
    )


def kept_text(stored: int, profile: str) -> str:
    """What is stored, before anything is."""
    return (
        f"Accepting stores {stored / 1e6:.1f} MB in profile {escape(profile)} on this server: what "
        "the last block of each network reads of this brain, the age and the name above. The scan "
        "itself is not stored. Undo takes the lesson back; forgetting erases it."
    )


def lesson_html(text: str, *, undo: int | None = None, profile: str = "", bad: bool = False) -> str:
    """What has just happened, with its undo."""
    if not text:
        return ""
    button = (
        f'<button type="button" class="enn-link" data-do="undo" data-entry="{undo}" '
        f'data-profile="{escape(profile)}">Undo</button>'
        if undo is not None
        else ""
    )
    kind, role = ("enn-bad", "alert") if bad else ("enn-good", "status")
    return (
        f'<div class="enn-lesson enn-notice {kind}" role="{role}"><span class="enn-told">'
        f"{escape(text)}</span>{button}</div>"
    )


def profiles_html(names: Sequence[str], chosen: str) -> str:
    """Choosing a site profile, or beginning a new one."""
    options = "".join(
        f'<option value="{escape(name)}"{" selected" if name == chosen else ""}>{escape(name)}'
        "</option>"
        for name in sorted({*names, chosen})
    )
    return (
        f'<form class="enn-profiles" data-profile="{escape(chosen)}">'
        f'<label>Site profile <select data-do="choose">{options}</select></label>'
        '<label>New profile <input type="text" data-part="name" maxlength="64" '
        'autocomplete="off" spellcheck="false" placeholder="scanner-b"></label>'
        '<button type="submit" class="enn-button">Create</button></form>'
        '<p class="enn-note">A profile is what one scanner or site has taught. It changes '
        "predictions under that profile only, and it is kept when this session ends.</p>"
        '<p class="enn-problem" role="alert"></p>'
    )


def history_html(entries: Sequence[SiteEntry], profile: str) -> str:
    """What was taught, newest first, each with its undo."""
    if not entries:
        return note_html("Nothing yet. Tell the page the true age of a scan.")
    newest = sorted(entries, key=lambda entry: -entry.entry)
    rows = "".join(_entry(entry, profile) for entry in newest[:SHOWN])
    rest = len(newest) - SHOWN
    more = note_html(f"and {rest:,} older ones") if rest > 0 else ""
    return f'<ol class="enn-history">{rows}</ol>{more}'


def _entry(entry: SiteEntry, profile: str) -> str:
    at = datetime.fromtimestamp(entry.at, UTC)
    note = "" if entry.active else ' <span class="enn-tag">undone</span>'
    button = (
        f'<button type="button" class="enn-link" data-do="undo" data-entry="{entry.entry}" '
        f'data-profile="{escape(profile)}" aria-label="Undo {escape(entry.name)}">Undo</button>'
        if entry.active
        else ""
    )
    return (
        f'<li class="{"" if entry.active else "enn-undone"}"><span class="enn-at">'
        f'<time datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%Y-%m-%d %H:%M} UTC</time></span>'
        f'<span class="enn-what"><b>{escape(entry.name)}</b>{note}</span>'
        f'<span class="enn-marks">age {entry.age:.1f}, predicted {entry.predicted:.1f}</span>'
        f"{button}</li>"
    )


def taught_files_html(profile: str, *, any_taught: bool) -> str:
    """Taking what was taught along, and forgetting it."""
    address = f"brain/profiles/{quote(profile)}"
    export = forget = ""
    if any_taught:
        export = (
            f'<a class="enn-button" href="{address}" download data-do="export">Export as a file</a>'
        )
        forget = (
            '<button type="button" class="enn-button enn-danger" data-do="forget">'
            "Forget everything</button>"
        )
    return (
        f'<div class="enn-files">{export}<label class="enn-button enn-import">Import a file'
        f'<input type="file" data-address="{address}"></label>{forget}</div>'
    )


def _sentence(text: str | None) -> str:
    text = text or ""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
