"""What can be wrong with a journal or a lesson file."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AlreadyTaught",
    "JournalBusy",
    "JournalCorrupt",
    "JournalError",
    "JournalMismatch",
    "JournalMissing",
    "check_identity",
]


class JournalError(RuntimeError):
    """A journal that cannot be used; one line, fit to show."""


class AlreadyTaught(ValueError):
    """A lesson that arrived a second time; one line, fit to show."""


class JournalMissing(JournalError, FileNotFoundError):
    """There is no journal yet."""


class JournalMismatch(JournalError, ValueError):
    """A journal or export that belongs to something else, for example to another model."""


class JournalBusy(JournalError):
    """Another process has been writing for too long."""


class JournalCorrupt(JournalError):
    """A file that is damaged, or no journal at all."""


def check_identity(name: str, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise JournalMismatch with the first difference."""
    for key in sorted(stored.keys() | given.keys()):
        there, here = (repr(each.get(key))[:60] for each in (stored, given))
        if stored.get(key) != given.get(key):
            raise JournalMismatch(
                f"{name!r} belongs to something else: its {key} is {there}, here it is {here}; use "
                "another profile, or what it was made with"
            )
