"""Profiles: whose teaching it is, and where it lies.

A profile is a name; what it was taught is one journal for each model, apart from everything else
that a user may delete and build again. A scope keeps the people of one server apart: what is taught
on this machine is "local". Journals lie at `profiles_dir() / SCOPE / NAME / APP-<weights>.sqlite`.

>>> check_name("holidays.2024")
'holidays.2024'
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = [
    "DEFAULT",
    "LOCAL",
    "ProfileError",
    "check_name",
    "journal_name",
    "journal_path",
    "list_journals",
    "profiles_dir",
]

DEFAULT = "default"
"""The profile of who names none."""
LOCAL = "local"
"""The scope of the command line, of Python, and of a page that only this machine can reach."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)


class ProfileError(ValueError):
    """A profile's name cannot be used; one line, fit to show."""


def profiles_dir() -> Path:
    """Where profiles lie: the environment variable ENN_PROFILES, or this user's data directory."""
    given = os.environ.get("ENN_PROFILES")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("eigen-suite", appauthor=False)) / "profiles"


def check_name(name: str) -> str:
    """The name itself, if it can be a profile's (or a scope's) on every file system.

    Raises:
        ProfileError: if it cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith("."):
        shown = repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..."
        raise ProfileError(
            f"{shown} cannot be a profile's name; valid: 1 to 64 of A-Z a-z 0-9 . _ -, with no dot "
            "at either end"
        )
    return name


def journal_name(app: str, weights: str) -> str:
    """File name of a profile's journal for a model.

    Args:
        app: what is taught, "search" or "brain".
        weights: SHA-256 of the model's weights, in hex.
    """
    return f"{app}-{weights[:16]}.sqlite"


def journal_path(profile: str, file_name: str, scope: str = LOCAL) -> Path:
    """The journal of a profile, which need not exist.

    Args:
        profile: its name.
        file_name: of `journal_name`.
        scope: whose it is.

    Raises:
        ProfileError: if the name or the scope cannot be one.
    """
    return profiles_dir() / check_name(scope) / check_name(profile) / file_name


def list_journals(file_name: str, scope: str = LOCAL) -> list[str]:
    """Names of the profiles that hold a journal of this name, in alphabetical order.

    Raises:
        ProfileError: if the scope cannot be one.
    """
    folder = profiles_dir() / check_name(scope)
    try:
        found = [entry.name for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        name for name in found if _NAME.fullmatch(name) and (folder / name / file_name).is_file()
    )
