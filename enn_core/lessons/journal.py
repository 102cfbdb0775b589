"""The journal: every act of feedback, on disk before it is acknowledged.

One SQLite file per profile. Events are appended and switched off or on again, and what a user
taught is recomputed from the active ones, so an undo restores the earlier bits. Several processes
and threads may use one file: readers never wait, writers wait for each other. Every row has a
checksum, and what was acknowledged is in the file itself: a copy of that alone has all of it.

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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.files.closing import Closing
from enn_core.lessons import journal_file as on_disk
from enn_core.lessons import promise
from enn_core.lessons.errors import (
    JournalBusy,
    JournalCorrupt,
    JournalError,
    check_identity,
)
from enn_core.lessons.events import (
    COLUMNS,
    ERASED,
    SET_ASIDE,
    DamagedEntry,
    Entries,
    Event,
    event_of,
    events_of,
    intact,
    is_whole,
    pack_json,
    row_of,
    stripped,
    switched,
)
from enn_core.lessons.journal_file import META, Header, Reading
from enn_core.lessons.lesson_file import read_lessons, write_lessons
from enn_core.lessons.reserve import make_reserve, make_room, reserve_file

__all__ = ["Journal", "Writing"]

_BUSY_SECONDS = 10.0
# Before the end of a writing tries to empty the log (again): others just read it, for ms. In s.
_PAUSES = (0.0, 0.001, 0.004, 0.02)
_ROWS = f"SELECT {COLUMNS} FROM events ORDER BY seq"
_ROW = f"SELECT {COLUMNS} FROM events WHERE seq = ?"
_INSERT = f"INSERT INTO events ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)"
_STRIP = """UPDATE events SET uid = ?, at = ?, kind = ?, subject = ?, active = ?, covers = ?,
details = ?, layout = ?, data = ?, crc = ? WHERE seq = ?"""


class Journal(Closing):
    """An open journal; may be used from several threads, but not across a fork.

    While it is open, this process must not read its files by other means: on POSIX systems closing
    a file drops the process's locks on it, SQLite's among them.
    """

    def __init__(
        self,
        path: Path,
        reader: Reading,
        writer: sqlite3.Connection | None,
        identity: dict[str, Any],
        loss: str | None,
    ) -> None:
        """Use `open`."""
        self.path = path
        # Two connections: a search never waits for a teaching that waits for the disk.
        self._reader, self._read_lock = reader, threading.Lock()
        # None where it can only be read.
        self._writer, self._write_lock = writer, threading.Lock()
        self._file = _file_key(path)
        self._promise, self._reserve = promise.promise_file(path), reserve_file(path)
        self._loss = loss
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

        One that cannot be written (a full disk, a folder of others) is read as it lies, and a
        writing says what is in its way. A warning says so if changes that were acknowledged are
        lost.

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
            JournalError: if it cannot be made or read.
        """
        file = Path(os.path.abspath(path))
        wanted = pack_json(identity, "identity")
        promised = None
        with contextlib.suppress(OSError, ValueError):
            promised = promise.read(file)
        with contextlib.ExitStack() as opened:
            writer: sqlite3.Connection | None = None
            try:
                writer, reader = on_disk.open_both(
                    file, wanted, header, create=create, patience=_BUSY_SECONDS
                )
                opened.callback(writer.close)
            except JournalError as error:
                reader = Reading.instead(file, error, create=create, patience=_BUSY_SECONDS)
            opened.callback(reader.close)
            with on_disk.making(file):
                stored = on_disk.read_identity(reader.db)
                loss = promise.lost(promised, reader.db)
            check_identity(str(file), stored, json.loads(wanted))
            opened.pop_all()
        if loss is not None:
            warnings.warn(
                f"{str(file)!r} has lost {loss}: the log in which they lay was damaged or removed; "
                "import them from an export or a backup, or teach them again",
                stacklevel=2,
            )
        journal = cls(file, reader, writer, stored, loss)
        with contextlib.suppress(JournalError):  # then whoever opens it next does it
            journal._finish_erasing()
        return journal

    def close(self) -> None:
        """Close the file; twice is fine."""
        with self._read_lock:
            self._reader.close()
        with self._write_lock:
            if self._writer is not None:
                self._writer.close()

    # --- reading -------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Grows whenever the journal is changed, by any process; costs some microseconds."""
        with self._reading() as db:
            (number,) = db.execute(META, ("generation",)).fetchone() or (None,)
        if type(number) is not int:
            raise JournalCorrupt(f"{str(self.path)!r} is damaged: its changes cannot be counted")
        return number

    @property
    def header(self) -> Header:
        """The JSON object and the arrays that are kept beside the events."""
        with self._reading(snapshot=True) as db:
            return on_disk.read_header(db)

    def events(self, *, active: bool | None = True) -> list[Event]:
        """Events by seq: the active ones, the inactive ones (False), or all (None).

        Raises:
            JournalCorrupt: if an entry is damaged, even one of the others.
        """
        with self._reading(snapshot=True) as db:
            return events_of(*_rows(db), active)

    def intact(self) -> tuple[list[Event], list[DamagedEntry]]:
        """All events that are as they were written, and those that are not."""
        with self._reading(snapshot=True) as db:
            return intact(*_rows(db), None)

    def snapshot(self) -> tuple[Header, list[Event]]:
        """The header and all events, of one moment."""
        with self._reading(snapshot=True) as db:
            return on_disk.read_header(db), events_of(*_rows(db), None)

    @contextlib.contextmanager
    def _reading(self, *, snapshot: bool = False) -> Iterator[sqlite3.Connection]:
        with self._read_lock:
            try:
                if self._writer is None:
                    self._read_anew()
                db = self._reader.db
                if db.execute("PRAGMA user_version").fetchone()[0] != on_disk.FORMAT.number:
                    on_disk.check_todays(self.path, db)
                if not snapshot:
                    yield db
                    return
                db.execute("BEGIN")  # all reads inside are of one moment
                try:
                    yield db
                finally:
                    db.execute("COMMIT")
            except (sqlite3.DatabaseError, UnicodeDecodeError, JournalCorrupt) as error:
                raise on_disk.refusal(self.path, error) from None

    def _read_anew(self) -> None:
        """Take over what others have written to a file that this process can only read."""
        if not self._reader.live and on_disk.files_key(self.path) != self._reader.key:
            fresh = Reading.open(self.path, _BUSY_SECONDS)
            self._reader.close()
            self._reader = fresh

    # --- writing -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, *, erasing: bool = False) -> Iterator[Writing]:
        """All changes inside are on disk together when this returns, or none of them is.

        Writers of all processes and threads take turns; what `Writing.events` shows stays true
        until the end.

        Args:
            erasing: it will erase; on a full disk that gets the room that is kept for it.

        Raises:
            JournalBusy: after 10 s of waiting for another writer.
            JournalError: if the disk is full, or the file cannot be written or was replaced.
        """
        if not self._write_lock.acquire(timeout=_BUSY_SECONDS):
            raise JournalBusy(on_disk.BUSY.format(str(self.path)))
        try:
            if erasing:
                make_room(self.path)
            if self._writer is None:
                self._writer = self._made_writable()
            with self._transaction(self._writer) as writing:
                yield writing
            if writing.erased:
                self._erase_bytes(self._writer)
            elif writing.changed:
                self._empty_log(self._writer)
        finally:
            self._write_lock.release()

    def _made_writable(self) -> sqlite3.Connection:
        """A connection to write to a file that could only be read when it was opened."""
        self._check_in_place()
        wanted = pack_json(self.identity, "identity")
        writer, fresh = on_disk.open_both(
            self.path, wanted, None, create=False, patience=_BUSY_SECONDS
        )
        with self._read_lock:
            self._reader.close()
            self._reader = fresh
        return writer

    def _check_in_place(self) -> None:
        if _file_key(self.path) != self._file:
            raise JournalError(
                f"{str(self.path)!r} was deleted or replaced while open; open it again"
            )

    @contextlib.contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[Writing]:
        self._check_in_place()
        writing = Writing(self.path, db, self.dim)
        try:
            with writing.using():
                db.execute("BEGIN IMMEDIATE")
            with db:
                with writing.using():
                    if db.execute("PRAGMA user_version").fetchone()[0] != on_disk.FORMAT.number:
                        on_disk.check_todays(self.path, db)
                yield writing
                writing.end()
        finally:
            writing.over = True

    def _empty_log(self, db: sqlite3.Connection) -> None:
        """Move what was committed from the log to the file; where others read it, promise it."""
        done, generation = False, 0
        try:
            (generation,) = db.execute(META, ("generation",)).fetchone()
            db.execute("PRAGMA busy_timeout = 0")  # it would keep other writers waiting, too
            for pause in _PAUSES:
                time.sleep(pause)
                if done := not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    break
        except sqlite3.OperationalError:  # no room in the file: what is in the log is safe there
            pass
        finally:
            db.execute(f"PRAGMA busy_timeout = {int(1000 * _BUSY_SECONDS)}")
        if not done:
            promise.keep(self.path, db, generation)
        elif self._loss is not None or os.path.exists(self._promise):
            promise.redeem(self.path, db, generation, self._loss)
            self._loss = None
        if not os.path.exists(self._reserve):
            make_reserve(self.path)

    def forget(self, seqs: Iterable[int] | None = None) -> int:
        """Erase events, all of them if None; nothing of them stays readable in the files.

        Copies that an upgrade or a repair left beside the file go, too. On a full disk this uses
        the room that is kept for it.

        Returns:
            How many there were.

        Raises:
            JournalBusy: if they are erased, but another process still reads their bytes.
        """
        with self.writing(erasing=True) as writing:
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

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a copy of the journal as it is at one moment, while others go on using it.

        It is a journal like this one: put in its place, it is the profile. A file that is there is
        replaced once the copy is complete on the disk. Only its owner may read it.

        Raises:
            JournalError: if it cannot be written, or would replace the journal itself.
        """
        target = Path(os.path.realpath(path))
        if target in on_disk.own_files(Path(os.path.realpath(self.path))):
            raise JournalError(f"{str(path)!r} is the profile itself; give another file")
        with on_disk.making(target), self._reading() as db:
            on_disk.write_copy(db, target)

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
            if self._writer is None:
                return
            with on_disk.errors(self.path):
                unfinished = on_disk.meta(self._writer, "erasing") is not None
            if unfinished:
                self._erase_bytes(self._writer)

    def _erase_bytes(self, db: sqlite3.Connection) -> None:
        """Take erased bytes out of the file and its log, and give their room back."""
        try:
            on_disk.rewrite(self.path, db)
        except JournalError as error:
            self._empty_log(db)
            raise type(error)(
                f"the entries are erased, but their bytes may still lie in {str(self.path)!r}: "
                f"{error}, and forget again"
            ) from None
        with self._transaction(db) as writing, writing.using():
            db.execute("DELETE FROM meta WHERE key = 'erasing'")
        self._empty_log(db)


class Writing:
    """What can be done inside `Journal.writing`."""

    def __init__(self, path: Path, db: sqlite3.Connection, dim: int | None) -> None:
        """Use `Journal.writing`."""
        self._path = path
        self._db = db
        self._dim = dim
        self._entries: Entries | None = None
        self._line: str | None = None  # of the entries, once they are others
        self.changed = False
        self.erased = False
        self.over = False

    @contextlib.contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """The connection, with its errors as ours."""
        if self.over:
            raise JournalError("this writing is over; start another one")
        try:
            yield self._db
        except (sqlite3.DatabaseError, UnicodeDecodeError, JournalCorrupt) as error:
            raise on_disk.refusal(self._path, error) from None

    def events(self, *, active: bool | None = True) -> list[Event]:
        """As `Journal.events`, with the changes made so far."""
        with self.using() as db:
            return events_of(*_rows(db, self._line), active)

    def intact(self) -> tuple[list[Event], list[DamagedEntry]]:
        """As `Journal.intact`, with the changes made so far."""
        with self.using() as db:
            return intact(*_rows(db, self._line), None)

    def has(self, uid: str) -> bool:
        """Whether an event is here, active or not, or was until it was erased."""
        with self.using() as db:
            # By the rows, for nothing tells whether the index is whole.
            return bool(db.execute("SELECT 1 FROM events WHERE +uid = ?", (uid,)).fetchone())

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
        with self.using() as db:
            known = "SELECT seq FROM events WHERE uid = ? AND kind = ?"
            erased = db.execute(known, (uid, ERASED)).fetchall()
        held = self._held()
        seq = held.last + 1
        row = row_of(seq, uid, at, kind, subject, active, covers, details, arrays, self._dim)
        event = event_of(row)
        for (gone,) in erased:
            held.discard(gone)
        held.add(seq)
        self._line = held.line()
        with self.using() as db:
            db.executemany("DELETE FROM events WHERE seq = ?", erased)
            db.execute(_INSERT, row)
        self.changed = True
        return event

    def deactivate(self, seqs: Iterable[int]) -> int:
        """Undo events; returns how many were active."""
        return self._switch(seqs, False)

    def activate(self, seqs: Iterable[int]) -> int:
        """Take events back that were undone; returns how many were inactive."""
        return self._switch(seqs, True)

    def erase(self, seqs: Iterable[int] | None, *, keep_uid: bool = False) -> int:
        """Delete events, all if None; returns how many there were. See `Journal.forget`.

        With `keep_uid` the number and the uid of each stay, as an event of the kind ERASED; not of
        damaged ones, which go altogether.
        """
        count = 0
        if seqs is None:
            held, held.last = Entries(), self._highest()
            with self.using() as db:
                count = max(0, db.execute("DELETE FROM events").rowcount)
        else:
            held = self._held()
            for seq in map(int, seqs):
                count += self._erase(seq, held, keep_uid)
        self._entries, self._line = held, held.line()
        with self.using() as db:
            # Also when there were none: the bytes of an earlier erasure may still be held.
            db.execute("INSERT OR REPLACE INTO meta VALUES ('erasing', 1)")
        self.erased = True
        self.changed |= count > 0
        return count

    def set_header(self, details: Mapping[str, Any]) -> None:
        """Replace the header's JSON object; its arrays stay."""
        text = pack_json(details, "header")
        with self.using() as db:
            on_disk.read_header(db)  # what is damaged must not be sealed anew
            db.execute("INSERT OR REPLACE INTO meta VALUES ('header', ?)", (text,))
            on_disk.seal_meta(db)
        self.changed = True

    def end(self) -> None:
        """Commit; of `Journal.writing`."""
        with self.using() as db:
            if self.changed:
                db.execute("UPDATE meta SET value = value + 1 WHERE key = 'generation'")
            if self._line is not None:
                entries = "UPDATE meta SET value = ? WHERE key = 'entries'"
                db.execute(entries, (self._line,))
            db.execute("COMMIT")

    def _held(self) -> Entries:
        if self._entries is None:
            with self.using() as db:
                row = db.execute(META, ("entries",)).fetchone()
            self._entries = Entries.read(row and row[0])
        return self._entries

    def _highest(self) -> int:
        """The highest number of an entry ever, even if the list of entries is damaged."""
        with contextlib.suppress(JournalCorrupt):
            return self._held().last
        with self.using() as db:
            return max(0, *(seq for (seq,) in db.execute("SELECT seq FROM sqlite_sequence")))

    def _switch(self, seqs: Iterable[int], active: bool) -> int:
        count = 0
        for seq in map(int, seqs):
            row = self._whole(seq)
            if row is None or row[5] == active:
                continue
            changed = switched(row, active)
            with self.using() as db:
                values = (changed[5], changed[10], seq)
                db.execute("UPDATE events SET active = ?, crc = ? WHERE seq = ?", values)
            count += 1
        self.changed |= count > 0
        return count

    def _whole(self, seq: int) -> Sequence | None:
        """The row of an entry, None if there is none; JournalCorrupt if it is damaged."""
        if seq not in self._held():
            return None
        with self.using() as db:
            row = db.execute(_ROW, (seq,)).fetchone()
            if row is None or not is_whole(row):
                raise JournalCorrupt(f"entry {seq} is damaged; {SET_ASIDE}")
        return row

    def _erase(self, seq: int, held: Entries, keep_uid: bool) -> bool:
        with self.using() as db:
            row = db.execute(_ROW, (seq,)).fetchone() if keep_uid else None
            if row is not None and is_whole(row):
                left = stripped(row)
                db.execute(_STRIP, (*left[1:], seq))
                return True
            found = db.execute("DELETE FROM events WHERE seq = ?", (seq,)).rowcount > 0
        found |= seq in held
        held.discard(seq)
        return found


def _rows(db: sqlite3.Connection, line: str | None = None) -> tuple[list[tuple], Any]:
    """All rows, by seq, and the line that says which there are, that in `meta` by default."""
    rows = db.execute(_ROWS).fetchall()
    if line is None:
        (line,) = db.execute(META, ("entries",)).fetchone() or (None,)
    return rows, line


def _file_key(file: Path) -> tuple[int, int] | None:
    """Which file it is, whatever it is called."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino
