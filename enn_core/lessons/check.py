"""What of a journal is damaged, and a whole one made of the rest.

>>> import tempfile
>>> from enn_core.feedback import Journal
>>> folder = tempfile.TemporaryDirectory()
>>> file = Path(folder.name) / "me.sqlite"
>>> with Journal.open(file, identity={}) as journal, journal.writing() as writing:
...     event = writing.append("teach", "a dog", {})
>>> check_journal(file)
[]
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sqlite3
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from enn_core.files.atomic import replacing
from enn_core.files.digests import Damage
from enn_core.files.sqlite import connect
from enn_core.lessons import journal_file as on_disk
from enn_core.lessons import promise
from enn_core.lessons.errors import JournalBusy, JournalCorrupt, JournalError, JournalMissing
from enn_core.lessons.events import COLUMNS, DamagedEntry, Entries, intact, is_whole, unpack_arrays
from enn_core.lessons.journal_file import HEADER_LOST, Reading
from enn_core.lessons.reserve import reserve_file
from enn_core.lessons.salvage import salvage

__all__ = ["check_journal", "repair_journal"]

_PATIENCE = 10.0
_TOLD = 20  # sentences of SQLite on one file
_RESTORE = "restore it from a backup, or import an export into a new profile"
_REPAIR = "repair the file"
_TEACH = "forget it or repair the file; then teach it again, or import it from an export"


@dataclass
class _Found:
    """What could be read of a journal.

    Attributes:
        rows: that are whole, by number.
        broken: entries that are not, by number.
        line: that says which entries there are.
        last: highest number of an entry, as far as is known.
        sealed: values of `meta` that are whole.
        generation: counts its changes, 0 if that is damaged.
        damage: all that is wrong.
        key: of the files as they were then.
    """

    rows: dict[int, tuple] = field(default_factory=dict)
    broken: dict[int, DamagedEntry] = field(default_factory=dict)
    line: Any = None
    last: int = 0
    sealed: dict[str, Any] = field(default_factory=dict)
    generation: int = 0
    damage: list[Damage] = field(default_factory=list)
    key: tuple = ()


def check_journal(path: Path) -> list[Damage]:
    """What is damaged or lost, [] if nothing is. Nothing is changed.

    Every page is looked at by SQLite, every entry against its checksum, the entries against the
    list of them, and the file against what was promised outside of it.
    """
    return _look(Path(os.path.abspath(path))).damage


def repair_journal(path: Path) -> list[Damage]:
    """Put a whole journal in the place of a damaged one, made of all that is whole in it.

    The damaged files stay beside it as NAME.damaged-N, until something is forgotten. No other
    program may be using the journal, and this one must have closed it.

    Returns:
        What was damaged, and whether it was repaired: an entry that is lost counts as repaired, as
        the others can be used again.

    Raises:
        JournalError: it cannot be written, and is as it was.
    """
    file = Path(os.path.abspath(path))
    found = _look(file)
    if not found.damage:
        return []
    if "identity" not in found.sealed:
        return found.damage  # nobody knows what the numbers are of
    with on_disk.making(file):
        copy = _set_aside(file)
        with replacing(file) as temporary:
            _write(temporary, found)
            if on_disk.files_key(file) != found.key:
                raise JournalBusy(f"another process is writing {str(file)!r}; end it, and repair")
            for each in on_disk.own_files(file)[1:]:
                if each != reserve_file(file):
                    each.unlink(missing_ok=True)  # the old log must not get into the new file
    kept = f"; the damaged file is kept as {copy.name!r}"
    return [replace(each, lost=each.lost + kept, remedy="", repaired=True) for each in found.damage]


# --- looking -------------------------------------------------------------------------------------


def _look(file: Path) -> _Found:
    found = _Found(key=on_disk.files_key(file))
    said = _Says(file, found.damage)
    try:
        reading = Reading.open(file, _PATIENCE)
    except JournalMissing:
        said("", "it is empty", _RESTORE)
    except JournalCorrupt as error:
        _rescue(file, found)
        remedy = _REPAIR if "identity" in found.sealed else _RESTORE
        said("", f"nothing of it can be read as it lies: {error}", remedy)
        if "identity" in found.sealed:
            _sort(found, said)
    except JournalError as error:
        said("", f"nothing of it can be read: {error}", _RESTORE)
    else:
        with contextlib.closing(reading) as opened:
            _look_inside(file, opened.db, found, said)
    return found


@dataclass
class _Says:
    """Notes what is wrong with a file."""

    file: Path
    damage: list[Damage]

    def __call__(self, part: str, lost: str, remedy: str) -> None:
        self.damage.append(Damage(str(self.file), part, lost, remedy))


def _look_inside(file: Path, db: sqlite3.Connection, found: _Found, said: _Says) -> None:
    with contextlib.suppress(sqlite3.DatabaseError):
        db.execute("BEGIN")
    for sentence in _unsound(db):
        said("", f"its pages are damaged: {sentence}", _REPAIR)
    told = _look_at_meta(db, found)
    found.line = _meta(db, "entries")
    _look_at_rows(db, found)
    if told or _missing(found):
        _rescue(file, found)
    for key, what in told.items():
        whole = key != "identity" or key in found.sealed
        said(key.replace("_", " "), what, _REPAIR if whole else _RESTORE)
    _sort(found, said)
    _look_at_promise(file, db, said)


def _look_at_meta(db: sqlite3.Connection, found: _Found) -> dict[str, str]:
    """What is wrong with what the journal says of itself, by key."""
    told = {}
    for key in on_disk.SEALED:
        try:
            found.sealed[key] = on_disk.sealed_meta(db, key)
        except (ValueError, TypeError, KeyError, sqlite3.DatabaseError) as error:
            told[key] = f"what the journal says of itself: {error}"
    generation = _meta(db, "generation")
    if type(generation) is int:
        found.generation = generation
    else:
        told["generation"] = "the count of its changes"
    return told


def _missing(found: _Found) -> set[int]:
    """Entries that there should be; if nothing tells which, one that cannot be."""
    try:
        return set(Entries.read(found.line)) - found.rows.keys()
    except JournalCorrupt:
        return {0}


def _rescue(file: Path, found: _Found) -> None:
    """Take from the pages alone what could not be read of them together."""
    try:
        rows, described = salvage(file.read_bytes())
    except OSError:
        return
    with contextlib.suppress(JournalCorrupt):
        found.line = Entries.read(found.line or described.get("entries")).line()
    missing = _missing(found)
    for seq, row in rows.items():
        if seq in missing or (missing == {0} and seq not in found.rows):
            found.rows[seq] = row
            found.broken.pop(seq, None)
    found.generation = max(found.generation, described.get("generation", 0))
    for key in on_disk.SEALED:
        if key in described:
            found.sealed.setdefault(key, described[key])


def _sort(found: _Found, said: _Says) -> None:
    """Tell the entries that are whole from those that are not."""
    found.last = max(found.last, 0, *found.rows)
    try:
        listed = Entries.read(found.line)
        found.last = max(found.last, listed.last)
    except JournalCorrupt:
        said("entries", "the list of entries: whether one is missing is not known", _REPAIR)
        listed = Entries()
        for seq in sorted(found.rows):
            listed.add(seq)
    ordered = [found.rows[seq] for seq in sorted(found.rows)]
    events, damaged = intact(ordered, listed.line(), None)
    unread = {each.seq: each for each in damaged} | found.broken
    for seq in sorted(unread):
        on = f" on {unread[seq].subject!r:.80}" if unread[seq].subject else ""
        said(f"entry {seq}", f"the entry{on}: {unread[seq].why}", _TEACH)
    for event in events:
        if any(seq > found.last for seq in event.covers):
            said(f"entry {event.seq}", "it covers entries that never were", _TEACH)
    whole = {event.seq for event in events}
    found.rows = {seq: row for seq, row in found.rows.items() if seq in whole}


def _look_at_promise(file: Path, db: sqlite3.Connection, said: _Says) -> None:
    loss = _meta(db, "lost")
    try:
        loss = loss or promise.lost(promise.read(file), db)
    except (ValueError, OSError) as error:
        said("promise", f"what was promised outside of it: {error}", _REPAIR)
    except (JournalCorrupt, sqlite3.DatabaseError):  # told already
        pass
    if loss:
        said("log", f"{loss}, with the log in which they lay", f"{_REPAIR}, and {_RESTORE}")


def _unsound(db: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong with the pages."""
    try:
        found = [str(row[0]) for row in db.execute(f"PRAGMA integrity_check({_TOLD})")]
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        found = [str(error)]
    return [" ".join(each.split())[:200] for each in found if each != "ok"]


def _look_at_rows(db: sqlite3.Connection, found: _Found) -> None:
    """All rows that can be read: from both ends, and by number between damaged pages."""
    broken: dict[int, tuple] = {}

    def see(condition: str) -> None:
        statement = f"SELECT {COLUMNS} FROM events {condition}"
        with contextlib.suppress(sqlite3.DatabaseError):
            for row in db.execute(statement):
                found.last = max(found.last, row[0])
                (found.rows if is_whole(row) else broken)[row[0]] = row

    see("ORDER BY seq")
    see("ORDER BY seq DESC")
    for seq in _missing(found) - broken.keys():
        see(f"WHERE seq = {seq}")
    for seq, row in broken.items():
        if seq not in found.rows:
            subject = row[4] if isinstance(row[4], str) else ""
            found.broken[seq] = DamagedEntry(seq, subject, "its checksum does not fit")


def _meta(db: sqlite3.Connection, key: str) -> Any:
    with contextlib.suppress(sqlite3.DatabaseError):
        return on_disk.meta(db, key)
    return None


# --- repairing -----------------------------------------------------------------------------------


def _set_aside(file: Path) -> Path:
    """Copy a journal and its log beside it, for the owner only; returns the copy's path."""
    numbers = itertools.count(1)
    copy = next(
        path for n in numbers if not (path := file.with_name(f"{file.name}.damaged-{n}")).exists()
    )
    for end in ("-wal", ""):  # the file itself last: then all of it is there
        source = file.with_name(f"{file.name}{end}")
        if source.exists():
            with replacing(copy.with_name(f"{copy.name}{end}")) as temporary:
                rights = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                with (
                    open(source, "rb") as old,
                    open(os.open(temporary, rights, 0o600), "wb") as new,
                ):
                    shutil.copyfileobj(old, new)
    return copy


def _write(target: Path, found: _Found) -> None:
    """Write a journal of what is whole."""
    header = json.loads(found.sealed.get("header", "{}"))
    arrays: dict[str, Any] = {}
    try:
        arrays = unpack_arrays(found.sealed["header_layout"], found.sealed["header_data"])
    except KeyError:
        header[HEADER_LOST] = True
    entries = Entries()
    for seq in sorted(found.rows):
        entries.add(seq)
    entries.last = max(entries.last, found.last)
    target.unlink(missing_ok=True)  # of a process that was killed
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with contextlib.closing(connect(target, "rw", patience=_PATIENCE)) as db:
        on_disk.make_tables(db, found.sealed["identity"], (header, arrays))
        db.execute("BEGIN IMMEDIATE")
        with db:
            on_disk.insert_rows(db, [found.rows[seq] for seq in sorted(found.rows)])
            values = {"generation": found.generation + 1, "entries": entries.line()}
            for key, value in values.items():
                db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
