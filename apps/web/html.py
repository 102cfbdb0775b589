"""Pieces of HTML of which both pages are made: pure functions to strings, everything escaped."""

from __future__ import annotations

from html import escape

__all__ = ["header_html", "icon", "note_html", "notice_html"]


def header_html(title: str, subtitle: str, logo: str) -> str:
    """The top of a page with its light/dark switch; `logo` is an `icon`."""
    return (
        f'<header class="enn-header"><div class="enn-brand">{logo}<div>'
        f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p></div></div>"
        '<button type="button" class="enn-theme" data-do="theme" '
        'aria-label="Switch between light and dark" title="Light or dark">'
        f"{_MOON}{_SUN}</button></header>"
    )


def note_html(text: str) -> str:
    """A quiet explanation."""
    return f'<p class="enn-note">{escape(text)}</p>'


def notice_html(text: str, *, bad: bool = False) -> str:
    """One line about something that has ended, well or badly."""
    kind, role = ("enn-bad", "alert") if bad else ("enn-good", "status")
    return f'<p class="enn-notice {kind}" role="{role}">{escape(text)}</p>'


def icon(body: str, *, cls: str, width: float = 1.8) -> str:
    """A drawing of lines in the colour of the text, 24 units wide and high."""
    return (
        f'<svg class="{cls}" viewBox="0 0 24 24" fill="none" stroke="currentColor" '
        f'stroke-width="{width}" stroke-linecap="round" stroke-linejoin="round" '
        f'aria-hidden="true">{body}</svg>'
    )


_MOON = icon('<path d="M20 14.5A8 8 0 0 1 9.5 4a8 8 0 1 0 10.5 10.5z"/>', cls="enn-moon")
_SUN = icon(
    '<circle cx="12" cy="12" r="4"/><path d="M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2'
    "M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4"
    'M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4"/>',
    cls="enn-sun",
)
