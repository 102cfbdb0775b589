"""Formats of files, and the steps that make today's of older ones.

The number of a format is that of its steps plus one, so a change of format is one function more:
the first step makes format 2 of format 1. Files that are read whole are brought up to date in
memory, and stay as they are on the disk; SQLite files are changed in place, once.

>>> def in_millimetres(content):
...     return {"mm": 10 * content["cm"]}
>>> ruler = Format(in_millimetres)
>>> upgraded({"cm": 3}, 1, ruler), upgraded({"mm": 30}, 2, ruler)
({'mm': 30}, {'mm': 30})
>>> upgraded({"um": 30_000}, 3, ruler)
Traceback (most recent call last):
    ...
enn_core.files.migrations.FormatError: has format 3, this version reads 1 to 2; update the software
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from enn_core.files.atomic import replacing, sync_folder
from enn_core.files.sqlite import connect

__all__ = [
    "Content",
    "Format",
    "FormatError",
    "Tables",
    "check_format",
    "forget_copies",
    "migrate",
    "upgraded",
]

S = TypeVar("S")


class FormatError(ValueError):
    """A file of a format that this version does not know; says what follows the file's name."""


class Format(Generic[S]):
    """What one kind of file looks like today, and how older ones become so."""

    def __init__(self, *steps: S) -> None:
        """Each step makes the next format of the one before it, starting with 1."""
        self.steps = steps
        self.number = len(steps) + 1
        """Of today's format."""

    def after(self, found: object) -> tuple[S, ...]:
        """The steps that a file still needs.

        Raises:
            FormatError: there is no such format, or not yet.
        """
        if type(found) is not int or not 1 <= found <= self.number:
            known = "1" if self.number == 1 else f"1 to {self.number}"
            raise FormatError(
                f"has format {found!r:.20}, this version reads {known}; update the software"
            )
        return self.steps[found - 1 :]


Content = Format[Callable[[dict[str, Any]], dict[str, Any]]]
"""Of files that are read whole: a step makes new content and leaves the old one alone."""

Tables = Format[Callable[[sqlite3.Connection], None]]
"""Of SQLite files with a table `meta (key, value)`: a step runs statements, one by one.

Its keys are unique, so a step that is recorded there cannot be taken twice. `executescript` would
end the transaction."""


def upgraded(content: dict[str, Any], found: object, kind: Content) -> dict[str, Any]:
    """The content of a file in today's format.

    Args:
        content: as it was read.
        found: its format; 1 where files had no number yet.
        kind: of file.

    Raises:
        FormatError: it is of a newer version.
    """
    for step in kind.after(found):
        content = step(content)
    return content


def check_format(db: sqlite3.Connection, kind: Tables) -> bool:
    """Whether a SQLite file is of today's format.

    Raises:
        FormatError: it is of a newer version.
    """
    return not kind.after(_found(db))


def migrate(db: sqlite3.Connection, kind: Tables, file: Path | None) -> None:
    """Bring a SQLite file to today's format, if it is of an older one.

    Killed at any instant, it is of one format or the other; of several processes the first one does
    it. The steps are recorded in `meta`, with the day and the version of the software.

    Args:
        db: of the file, with the right to write.
        kind: of file.
        file: gets a copy of its old content beside it, NAME.format-N; None for a database in
            memory, which needs none.

    Raises:
        FormatError: it is of a newer version.
        sqlite3.Error, OSError: it cannot be changed or copied, and is as it was.
    """
    if check_format(db, kind):
        return
    db.execute("BEGIN IMMEDIATE")  # others wait here, and then find it done
    with db:
        found = _found(db)
        steps = kind.after(found)
        if steps and file is not None:
            _copy(file, found)
        for number, step in enumerate(steps, found + 1):
            step(db)
            record = f"{time.strftime('%Y-%m-%d', time.gmtime())} by eigen-suite {_software()}"
            db.execute("INSERT INTO meta VALUES (?, ?)", (f"format {number}", record))
        db.execute(f"PRAGMA user_version = {kind.number}")


def forget_copies(file: Path, *others: str) -> None:
    """Delete the copies that `migrate` left: for what must not stay readable.

    Args:
        file: that was copied.
        others: what the names of other copies have behind its name, such as ".damaged-".
    """
    file = file.resolve()
    names = tuple(f"{file.name}{end}" for end in (".format-", *others))
    with os.scandir(file.parent) as entries:
        copies = [each.path for each in entries if each.name.startswith(names)]
    for copy in copies:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(copy)
    if copies:
        sync_folder(file.parent)


def _found(db: sqlite3.Connection) -> int:
    # 0 where files had no number yet.
    return db.execute("PRAGMA user_version").fetchone()[0] or 1


def _copy(file: Path, number: int) -> None:
    """Write a copy that nobody may read who may not read the file; nobody else may be writing."""
    file = file.resolve()  # beside the file itself, whatever links were opened
    with replacing(file.with_name(f"{file.name}.format-{number}")) as temporary:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        rights = stat.S_IMODE(os.stat(file).st_mode)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, rights))
        # Another connection, which sees what is committed: one that is writing cannot be copied.
        with (
            contextlib.closing(connect(file, "ro", patience=0)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as copy,
        ):
            copy.execute("PRAGMA journal_mode = OFF")  # it is complete, or never gets its name
            source.backup(copy)


def _software() -> str:
    try:
        return version("eigen-suite")
    except PackageNotFoundError:  # run from its sources
        return "?"
