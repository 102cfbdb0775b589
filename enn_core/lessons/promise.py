"""What a journal holds, said outside of it: so that it is told if its newest changes are lost.

Changes go to SQLite's log, which is emptied into the file after each. Where that has to wait, as
another process is just reading, a small file beside the journal says how many changes there are
until the next time it can be done. A journal that knows of fewer has lost some with its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enn_core.files.atomic import replacing, sync_folder
from enn_core.files.digests import check_seal, sealed
from enn_core.lessons.errors import JournalCorrupt
from enn_core.lessons.events import Entries
from enn_core.lessons.journal_file import meta

__all__ = ["Promise", "held", "keep", "lost", "promise_file", "read", "redeem"]


@dataclass(frozen=True)
class Promise:
    """How far a journal is.

    Attributes:
        generation: counts its changes.
        last: highest number of an entry.
    """

    generation: int
    last: int


def promise_file(file: Path) -> Path:
    """Where the promise of a journal lies, if there is one."""
    return file.with_name(f"{file.name}.promise")


def read(file: Path) -> Promise | None:
    """What was promised of a journal.

    Raises:
        ValueError: the promise is damaged.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(promise_file(file).read_bytes())
        check_seal(content)
        return Promise(int(content["generation"]), int(content["last"]))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise ValueError(f"is damaged: {error}") from None


def held(db: sqlite3.Connection) -> Promise:
    """How far a journal is.

    Raises:
        JournalCorrupt: if that is damaged.
    """
    generation, line = meta(db, "generation"), meta(db, "entries")
    if type(generation) is not int:
        raise JournalCorrupt("the journal is damaged: its changes cannot be counted")
    return Promise(generation, Entries.read(line).last)


def keep(file: Path, db: sqlite3.Connection, generation: int) -> None:
    """Promise what a journal holds now; nothing where there is no room for that either.

    Args:
        file: of the journal.
        db: connection to it.
        generation: up to which there must be a promise.
    """
    with contextlib.suppress(OSError, ValueError):
        promised = read(file)
        if promised is not None and promised.generation >= generation:
            return  # by who wrote later
    with _writing_alone(db), replacing(promise_file(file)) as temporary:
        rights = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(os.open(temporary, rights, 0o600), "w", encoding="utf-8") as out:
            json.dump(sealed(vars(held(db))), out)


def redeem(file: Path, db: sqlite3.Connection, generation: int, loss: str | None) -> None:
    """Drop the promise of changes that are in the file itself; note what is lost for good.

    Args:
        file: of the journal.
        db: connection to it.
        generation: up to which changes have left the log.
        loss: what `lost` said when it was opened.
    """
    with _writing_alone(db):
        if loss is not None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('lost', ?)", (loss,))
        try:
            promised = read(file)
        except ValueError:  # damaged: it promises nothing
            promised = None
        if promised is None or loss is not None or promised.generation <= generation:
            promise_file(file).unlink(missing_ok=True)
            sync_folder(file.parent)


def lost(promised: Promise | None, db: sqlite3.Connection) -> str | None:
    """What a journal should hold and does not, as the end of a sentence; None if all is there.

    Raises:
        JournalCorrupt: if it does not know what it should hold.
    """
    if promised is None:
        return None
    there = held(db)
    if promised.generation <= there.generation:
        return None
    first, last = there.last + 1, promised.last
    if first > last:
        return "its newest changes (of what is undone or forgotten)"
    return (
        f"its newest entry, {last}" if first == last else f"its newest entries, {first} to {last}"
    )


@contextlib.contextmanager
def _writing_alone(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction, so that nobody changes the journal meanwhile; what fails is left for later."""
    with contextlib.suppress(sqlite3.Error, OSError, ValueError):
        db.execute("BEGIN IMMEDIATE")
        with db:
            yield
