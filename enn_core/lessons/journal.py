"""The journal: every act of feedback, on disk before it is acknowledged.

One SQLite file per profile. Events are appended and switched off or on again, and what a user
taught is recomputed from the active ones, so an undo restores the earlier bits. Several processes
and threads may use one file: readers never wait, writers wait for each other.

>>> import tempfile
>>> import numpy as np
>>> from enn_core.feedback import Journal
>>> folder = tempfile.TemporaryDirectory()
>>> journal = Journal.open(f"{folder.name}/me.sqlite", identity={"model": "tiny", "dim": 2})
>>> with journal.writing() as w:
...     event = w.append("teach", "a dog", {"good": [3]}, {"c": np.float16([1, 0])})
>>> [(event.seq, event.subject) for event in journal.events()]
[(1, 'a dog')]
>>> with journal.writing() as w:
...     w.deactivate([1])
1
>>> journal.events(), journal.forget()
([], 1)
>>> journal.close()
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.files.atomic import sync_folder
from enn_core.files.closing import Closing
from enn_core.files.migrations import FormatError, Tables, check_format, forget_copies, migrate
from enn_core.files.sqlite import connect, keep_log, trouble
from enn_core.lessons.errors import (
    JournalBusy,
    JournalCorrupt,
    JournalError,
    JournalMissing,
    check_identity,
)
from enn_core.lessons.events import (
    ERASED,
    TEACH,
    Event,
    check_texts,
    pack_arrays,
    pack_json,
    unpack_arrays,
)
from enn_core.lessons.lesson_file import read_lessons, write_lessons

__all__ = ["Journal", "Writing"]

_BUSY_SECONDS = 10.0
_APPLICATION = 0x454E4E46  # "ENNF", in the file's header
FORMAT: Tables = Tables()
"""Steps from older journals to those of `_SCHEMA`; the app is in the identity, in `meta`."""

_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value);
CREATE TABLE events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, even after erasing
  uid TEXT NOT NULL UNIQUE,
  at REAL NOT NULL,
  kind TEXT NOT NULL,
  subject TEXT NOT NULL,
  active INTEGER NOT NULL,
  covers TEXT NOT NULL,                   -- JSON list of seq
  details TEXT NOT NULL,                  -- JSON object
  layout TEXT NOT NULL,                   -- JSON list of [name, dtype, shape]
  data BLOB NOT NULL                      -- the arrays' values, little endian
);
PRAGMA application_id = {_APPLICATION};
"""

_COLUMNS = "seq, uid, at, kind, subject, active, covers, details, layout, data"
_STRIP = f"""UPDATE events SET kind = '{ERASED}', at = 0, subject = '', active = 0, covers = '[]',
details = '{{}}', layout = '[]', data = x'' WHERE seq = ?"""

Header = tuple[dict[str, Any], dict[str, np.ndarray]]


class Journal(Closing):
    """An open journal; may be used from several threads, but not across a fork.

    While it is open, this process must not read its files by other means: on POSIX systems closing
    a file drops the process's locks on it, SQLite's among them.
    """

    def __init__(
        self, path: Path, reader: sqlite3.Connection, writer: sqlite3.Connection, identity: dict
    ) -> None:
        """Use `open`."""
        self.path = path
        # Two connections: a search never waits for a teaching that waits for the disk.
        self._reader, self._read_lock = reader, threading.Lock()
        self._writer, self._write_lock = writer, threading.Lock()
        self._file = _file_key(path)
        self.identity: dict[str, Any] = identity
        """What the journal belongs to, as given at its creation."""
        dim = identity.get("dim")
        self.dim: int | None = dim if type(dim) is int else None
        """Last axis of every array, if the identity says so."""

    # --- opening -------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        identity: Mapping[str, Any],
        create: bool = True,
        header: Callable[[], Header] | None = None,
    ) -> Journal:
        """Open a journal, or make it.

        Args:
            path: the file; missing folders are made, for their owner only.
            identity: JSON object that says what the numbers belong to, stored at creation and
                compared ever after. A whole number under "dim" is the last axis of every array.
            create: whether to make one that is missing.
            header: gives what is stored beside the events at creation: a JSON object and arrays.

        Raises:
            JournalMissing: if there is none and `create` is False.
            JournalMismatch: if it was made with another identity.
            JournalCorrupt: if the file is damaged, or no journal.
            JournalBusy: if another process holds it.
            JournalError: if it cannot be read or written.
        """
        file = Path(os.path.abspath(path))
        wanted = pack_json(identity, "identity")
        connections: list[sqlite3.Connection] = []
        try:
            with _making(file):
                if not file.exists():
                    if not create:
                        raise JournalMissing(
                            f"nothing has been taught yet: {str(file)!r} is not there"
                        )
                    _make_folder(file.parent)
                writer = _connect(file, "rwc" if create else "rw")
                connections.append(writer)
                unmade = not _has_tables(writer)
            if unmade and not create:
                raise JournalMissing(f"nothing has been taught yet: {str(file)!r} is empty")
            content = header() if unmade and header is not None else ({}, {})
            with _making(file):
                _prepare(file, writer, wanted, content)
                reader = _connect(file, "rw")
                connections.append(reader)
                reader.execute("PRAGMA query_only = ON")
                stored = _meta(reader, "identity")
            check_identity(str(file), _json(stored), json.loads(wanted))
            journal = cls(file, reader, writer, json.loads(wanted))
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        with contextlib.suppress(JournalError):  # then whoever opens it next does it
            journal._finish_erasing()
        return journal

    def close(self) -> None:
        """Close the file; twice is fine."""
        with self._read_lock:
            self._reader.close()
        with self._write_lock:
            self._writer.close()

    # --- reading -------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Grows whenever the journal is changed, by any process; costs some microseconds."""
        with self._reading() as db:
            return int(_meta(db, "generation") or 0)

    @property
    def header(self) -> Header:
        """The JSON object and the arrays that are kept beside the events."""
        with self._reading() as db:
            return _read_header(db)

    def events(self, *, active: bool | None = True) -> list[Event]:
        """Events by seq: the active ones, the inactive ones (False), or all (None)."""
        with self._reading() as db:
            return _read_events(db, active)

    def snapshot(self) -> tuple[Header, list[Event]]:
        """The header and all events, of one moment."""
        with self._reading() as db:
            db.execute("BEGIN")
            try:
                return _read_header(db), _read_events(db, None)
            finally:
                db.execute("COMMIT")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock, _errors(self.path):
            _is_todays(self.path, self._reader)
            yield self._reader

    # --- writing -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writing]:
        """All changes inside are on disk together when this returns, or none of them is.

        Writers of all processes and threads take turns; what `Writing.events` shows stays true
        until the end.

        Raises:
            JournalBusy: after 10 s of waiting for another writer.
            JournalError: if the disk is full, or the file cannot be written or was replaced.
        """
        if not self._write_lock.acquire(timeout=_BUSY_SECONDS):
            raise JournalBusy(_BUSY.format(str(self.path)))
        try:
            with self._transaction() as writing:
                yield writing
            if writing.erased:
                self._erase_bytes()
        finally:
            self._write_lock.release()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Writing]:
        db = self._writer
        if _file_key(self.path) != self._file:
            raise JournalError(
                f"{str(self.path)!r} was deleted or replaced while open; open it again"
            )
        writing = Writing(self.path, db, self.dim)
        try:
            with writing.using():
                db.execute("BEGIN IMMEDIATE")
            with db:
                with writing.using():
                    _is_todays(self.path, db)
                yield writing
                with writing.using():
                    if writing.changed:
                        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'generation'")
                    db.execute("COMMIT")
        finally:
            writing.over = True

    def forget(self, seqs: Iterable[int] | None = None) -> int:
        """Erase events, all of them if None; nothing of them stays readable in the files.

        Returns:
            How many there were.

        Raises:
            JournalBusy: if they are erased, but another process still reads their bytes.
        """
        with self.writing() as writing:
            return writing.erase(seqs)

    # --- one file, to take elsewhere -----------------------------------------------------------

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write everything to one JSON file (`enn_core.lessons.lesson_file`).

        A file that is there is replaced once the new one is complete on the disk. Only its owner
        may read it.

        Returns:
            How many events it holds, undone ones included.

        Raises:
            JournalError: if it cannot be written, or would be larger than `import_` reads.
        """
        (header, _), events = self.snapshot()
        return write_lessons(path, self.path, self.identity, header, events)

    def import_(
        self,
        path: str | os.PathLike[str],
        *,
        accept: Callable[[dict[str, Any], list[Event]], None] | None = None,
    ) -> int:
        """Append the events of an export, all or none; those that are here stay as they are.

        Args:
            path: a file that `export` wrote, or that someone says it did.
            accept: called with its header and events, numbered as in the file, before anything is
                written and while nobody else writes; what it raises refuses them.

        Returns:
            How many events were new.

        Raises:
            JournalMismatch: if it belongs to something else.
            JournalCorrupt: if the file is no export, damaged, or beyond the limits.
            JournalError: as `writing`.
        """
        header, events = read_lessons(path, self.path, self.identity, self.dim)
        with self.writing() as writing:
            if accept is not None:
                accept(header, events)
            with writing.using() as db:
                known = dict(db.execute("SELECT uid, seq FROM events WHERE kind != ?", (ERASED,)))
            numbers: dict[int, int] = {}  # of the file's events in this journal
            new = 0
            for event in events:
                if event.uid in known:
                    numbers[event.seq] = known[event.uid]
                    continue
                added = writing.append(
                    event.kind,
                    event.subject,
                    event.details,
                    event.arrays,
                    # 0 is an event that is in neither: what was computed from it stays unused.
                    [numbers.get(seq, 0) for seq in event.covers if seq != event.seq],
                    uid=event.uid,
                    at=event.at,
                    active=event.active,
                )
                numbers[event.seq] = added.seq
                new += 1
        return new

    # --- erased bytes --------------------------------------------------------------------------

    def _finish_erasing(self) -> None:
        """Do what a process that was killed in `forget` left undone."""
        with self._write_lock:
            with _errors(self.path):
                unfinished = _meta(self._writer, "erasing") is not None
            if unfinished:
                self._erase_bytes()

    def _erase_bytes(self) -> None:
        """Take erased bytes out of the file and its log.

        SQLite zeroes what it frees, but not the copies left behind when rows move between pages.
        """
        try:
            with _making(self.path):
                forget_copies(self.path)
                self._writer.execute("VACUUM")
                if self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    raise JournalBusy("another process is reading them")
        except JournalError as error:
            raise type(error)(
                f"the entries are erased, but their bytes may still lie in {str(self.path)!r}: "
                f"{error}; forget again later"
            ) from None
        with self._transaction() as writing, writing.using() as db:
            db.execute("DELETE FROM meta WHERE key = 'erasing'")


class Writing:
    """What can be done inside `Journal.writing`."""

    def __init__(self, path: Path, db: sqlite3.Connection, dim: int | None) -> None:
        """Use `Journal.writing`."""
        self._path = path
        self._db = db
        self._dim = dim
        self.changed = False
        self.erased = False
        self.over = False

    @contextlib.contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """The connection, with its errors as ours."""
        if self.over:
            raise JournalError("this writing is over; start another one")
        with _errors(self._path):
            yield self._db

    def events(self, *, active: bool | None = True) -> list[Event]:
        """As `Journal.events`, with the changes made so far."""
        with self.using() as db:
            return _read_events(db, active)

    def has(self, uid: str) -> bool:
        """Whether an event is here, active or not, or was until it was erased."""
        with self.using() as db:
            return bool(db.execute("SELECT 1 FROM events WHERE uid = ?", (uid,)).fetchone())

    def append(
        self,
        kind: str,
        subject: str,
        details: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        covers: Iterable[int] = (),
        *,
        uid: str | None = None,
        at: float | None = None,
        active: bool = True,
    ) -> Event:
        """Append an event; see `Event`.

        Args:
            kind: a lower-case word.
            subject: up to 20,000 characters.
            details: JSON object, up to 2,000,000 characters.
            arrays: up to 8 and 32 MiB, float16 or float32, 1 to 4 axes, finite.
            covers: seq of the "teach" events it was computed from; such an event covers itself.
            uid, at: a new one, and now, by default.
            active: False for one that is undone already.

        Returns:
            The event as it will be read.

        Raises:
            ValueError: if a value is outside of its limits.
        """
        uid = uuid.uuid4().hex if uid is None else uid
        at = time.time() if at is None else at
        check_texts(uid, at, kind, subject)
        text, packed = pack_json(details, "details"), pack_arrays(arrays, self._dim)
        with self.using() as db:
            last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        seq = (last[0] if last else 0) + 1
        covered = {int(each) for each in covers} | ({seq} if kind == TEACH else set())
        of = json.dumps(sorted(covered), separators=(",", ":"))
        row = (seq, uid, float(at), kind, subject, int(active), of, text, *packed)
        with self.using() as db:
            db.execute("DELETE FROM events WHERE uid = ? AND kind = ?", (uid, ERASED))
            db.execute(f"INSERT INTO events ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", row)
        self.changed = True
        return _event(row)

    def deactivate(self, seqs: Iterable[int]) -> int:
        """Undo events; returns how many were active."""
        return self._switch(seqs, False)

    def activate(self, seqs: Iterable[int]) -> int:
        """Take events back that were undone; returns how many were inactive."""
        return self._switch(seqs, True)

    def erase(self, seqs: Iterable[int] | None, *, keep_uid: bool = False) -> int:
        """Delete events, all if None; returns how many there were. See `Journal.forget`.

        With `keep_uid` the number and the uid of each stay, as an event of the kind ERASED.
        """
        with self.using() as db:
            if seqs is None:
                count = db.execute("DELETE FROM events").rowcount
            else:
                statement = _STRIP if keep_uid else "DELETE FROM events WHERE seq = ?"
                count = db.executemany(statement, [(int(seq),) for seq in seqs]).rowcount
            # Also when there were none: the bytes of an earlier erasure may still be held.
            db.execute("INSERT OR REPLACE INTO meta VALUES ('erasing', 1)")
        self.erased = True
        self.changed |= count > 0
        return max(count, 0)

    def set_header(self, details: Mapping[str, Any]) -> None:
        """Replace the header's JSON object; its arrays stay."""
        text = pack_json(details, "header")
        with self.using() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('header', ?)", (text,))
        self.changed = True

    def _switch(self, seqs: Iterable[int], active: bool) -> int:
        rows = [(active, int(seq), not active) for seq in seqs]
        with self.using() as db:
            count = db.executemany(
                "UPDATE events SET active = ? WHERE seq = ? AND active = ?", rows
            ).rowcount
        self.changed |= count > 0
        return max(count, 0)


# --- rows ----------------------------------------------------------------------------------------


def _meta(db: sqlite3.Connection, key: str) -> Any:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return row[0] if row else None


def _json(text: Any) -> dict[str, Any]:
    """A JSON object of the table `meta`."""
    with contextlib.suppress(ValueError, TypeError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise JournalCorrupt("the journal's own description is damaged; move it away to start anew")


def _read_events(db: sqlite3.Connection, active: bool | None) -> list[Event]:
    condition = "" if active is None else f"WHERE active = {int(active)}"
    rows = db.execute(f"SELECT {_COLUMNS} FROM events {condition} ORDER BY seq").fetchall()
    return [_event(row) for row in rows]


def _event(row: tuple) -> Event:
    seq, uid, at, kind, subject, active, covers, details, layout, data = row
    try:
        return Event(
            seq=seq,
            uid=uid,
            at=at,
            kind=kind,
            subject=subject,
            details=json.loads(details),
            arrays=unpack_arrays(layout, data),
            covers=tuple(json.loads(covers)),
            active=bool(active),
        )
    except (ValueError, TypeError) as error:
        raise JournalCorrupt(f"entry {seq} is damaged ({error}); erase it to go on") from None


def _read_header(db: sqlite3.Connection) -> Header:
    details = _json(_meta(db, "header"))
    try:
        arrays = unpack_arrays(_meta(db, "header_layout"), _meta(db, "header_data"))
    except (ValueError, TypeError) as error:
        raise JournalCorrupt(f"the journal's header is damaged ({error})") from None
    return details, arrays


# --- the file ------------------------------------------------------------------------------------

_BUSY = "another process has been writing {!r} for more than 10 s; try again when it is done"


def _make_folder(folder: Path) -> None:
    """Make it, and what it lies in, for the owner only."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
        sync_folder(each.parent)


def _file_key(file: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    # Nothing of what is erased stays in the file, and no copies in a temporary folder.
    pragmas = ("secure_delete = ON", "temp_store = MEMORY")
    return connect(file, mode, *pragmas, patience=_BUSY_SECONDS)


def _prepare(file: Path, db: sqlite3.Connection, identity: str, header: Header) -> None:
    """Check the file's format; make its tables if nobody has, or was killed before."""
    if file.stat().st_size == 0:  # before the log is made, which takes its mode from it
        os.chmod(file, 0o600)
        sync_folder(file.parent)
    keep_log(db, _BUSY_SECONDS)
    if not _has_tables(db):
        text, (layout, data) = pack_json(header[0], "header"), pack_arrays(header[1], None)
        db.execute("BEGIN IMMEDIATE")
        with db:
            if not _has_tables(db):
                for statement in _SCHEMA.split(";"):  # `executescript` would commit
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {FORMAT.number}")
                rows = [
                    ("identity", identity),
                    ("generation", 1),
                    ("header", text),
                    ("header_layout", layout),
                    ("header_data", data),
                ]
                db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise JournalCorrupt(f"{str(file)!r} is no journal of feedback; choose another file")
    if not _is_todays(file, db):
        with _known_format(file):
            migrate(db, FORMAT, file)


def _is_todays(file: Path, db: sqlite3.Connection) -> bool:
    """Whether it has today's format; JournalError if a newer version has just changed it."""
    if db.execute("PRAGMA user_version").fetchone()[0] == FORMAT.number:
        return True
    with _known_format(file):
        return check_format(db, FORMAT)


@contextlib.contextmanager
def _known_format(file: Path) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise JournalError(f"{str(file)!r} {error}") from None


def _has_tables(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _refusal(str(file), error) from None


def _refusal(name: str, error: sqlite3.DatabaseError) -> Exception:
    what = trouble(error)
    if what is None:
        return error
    if what == "busy":
        return JournalBusy(_BUSY.format(name))
    if what == "damaged":
        return JournalCorrupt(
            f"{name!r} is damaged, or no journal of feedback ({error}); move it away to start anew"
        )
    if what == "denied":
        return JournalError(
            f"{name!r} cannot be written ({error}); give the right to write it and its folder, or "
            "choose another place"
        )
    return JournalError(
        f"{name!r} could not be read or saved ({error}), nothing was changed; free some space, or "
        "check the disk"
    )


@contextlib.contextmanager
def _making(file: Path) -> Iterator[None]:
    """SQLite's and the system's errors as ours."""
    try:
        with _errors(file):
            yield
    except OSError as error:
        if isinstance(error, JournalError):
            raise
        raise JournalError(
            f"{str(file)!r} cannot be made ({error.strerror or error}); choose a place that can be "
            "written"
        ) from None
