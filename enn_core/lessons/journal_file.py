"""The file of a journal: its tables and their formats, opened for writing or for reading alone.

Where SQLite cannot make the files that it needs beside a journal (a full disk, a folder that others
own), what was taught is still read: as the file lies, for its log is empty after every change.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.files.atomic import replacing, sync_folder
from enn_core.files.migrations import FormatError, Tables, check_format, forget_copies, migrate
from enn_core.files.sqlite import connect, keep_log, no_room_in, trouble
from enn_core.lessons.errors import JournalBusy, JournalCorrupt, JournalError, JournalMissing
from enn_core.lessons.events import (
    COLUMNS,
    Entries,
    pack_arrays,
    pack_json,
    row_crc,
    unpack_arrays,
)

__all__ = [
    "BUSY",
    "FORMAT",
    "HEADER_LOST",
    "META",
    "SEALED",
    "Header",
    "Reading",
    "check_todays",
    "crc_of",
    "errors",
    "files_key",
    "insert_rows",
    "make_tables",
    "making",
    "meta",
    "open_both",
    "own_files",
    "read_header",
    "read_identity",
    "refusal",
    "rewrite",
    "seal_meta",
    "sealed_meta",
    "write_copy",
]

_APPLICATION = 0x454E4E46  # "ENNF", in the file's header

SCHEMA = f"""
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
  data BLOB NOT NULL,                     -- the arrays' values, little endian
  crc INTEGER NOT NULL                    -- of the other columns
);
PRAGMA application_id = {_APPLICATION};
"""

SEALED = ("identity", "header", "header_layout", "header_data")
"""Keys of `meta` whose checksums are under "crc"; "entries" has its own."""

HEADER_LOST = "lost"
"""Key in the header's JSON object of a repaired journal whose header had lost its arrays."""

Header = tuple[dict[str, Any], dict[str, np.ndarray]]


def _with_checksums(db: sqlite3.Connection) -> None:
    """Format 2: every row has a checksum, and `meta` tells which rows there are."""
    db.execute("ALTER TABLE events ADD COLUMN crc INTEGER NOT NULL DEFAULT -2")
    entries = Entries()
    seqs = [seq for (seq,) in db.execute("SELECT seq FROM events ORDER BY seq")]
    for seq in seqs:
        row = db.execute(f"SELECT {COLUMNS} FROM events WHERE seq = ?", (seq,)).fetchone()
        db.execute("UPDATE events SET crc = ? WHERE seq = ?", (row_crc(row), seq))
        entries.add(seq)
    for (last,) in db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'"):
        entries.last = max(entries.last, last)
    db.execute("INSERT INTO meta VALUES ('entries', ?)", (entries.line(),))
    seal_meta(db)


FORMAT: Tables = Tables(_with_checksums)
"""Steps from older journals to those of `SCHEMA`; the app is in the identity, in `meta`."""


# --- meta ----------------------------------------------------------------------------------------


META = "SELECT value FROM meta WHERE key = ?"


def meta(db: sqlite3.Connection, key: str) -> Any:
    """A value of the table `meta`, None if there is none."""
    row = db.execute(META, (key,)).fetchone()
    return row[0] if row else None


def seal_meta(db: sqlite3.Connection) -> None:
    """Note the checksums of what the journal says of itself."""
    crcs = json.dumps({key: crc_of(meta(db, key)) for key in SEALED})
    db.execute("INSERT OR REPLACE INTO meta VALUES ('crc', ?)", (crcs,))


def crc_of(value: Any) -> int:
    """Checksum of a value of `meta`, -1 if it is neither text nor bytes."""
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return zlib.crc32(data) if isinstance(data, bytes) else -1


def sealed_meta(db: sqlite3.Connection, key: str) -> Any:
    """A value of `meta`; ValueError if it is not what was written."""
    value = meta(db, key)
    if json.loads(meta(db, "crc"))[key] != crc_of(value):
        raise ValueError("its checksum does not fit")
    return value


def read_identity(db: sqlite3.Connection) -> dict[str, Any]:
    """What a journal belongs to.

    Raises:
        JournalCorrupt: if that is damaged.
    """
    return _described(db, "identity")


def read_header(db: sqlite3.Connection) -> Header:
    """What is kept beside the events.

    Raises:
        JournalCorrupt: if it is damaged.
    """
    details = _described(db, "header")
    try:
        layout, data = sealed_meta(db, "header_layout"), sealed_meta(db, "header_data")
        return details, unpack_arrays(layout, data)
    except (ValueError, TypeError, KeyError) as error:
        raise JournalCorrupt(
            f"the journal's header is damaged ({error}); `enn check --repair` saves the rest"
        ) from None


def _described(db: sqlite3.Connection, key: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        value = json.loads(sealed_meta(db, key))
        if isinstance(value, dict):
            return value
    raise JournalCorrupt(
        "the journal's own description is damaged; restore it from a backup, or move it away to "
        "start anew"
    )


# --- making and opening it -----------------------------------------------------------------------


def own_files(file: Path) -> list[Path]:
    """All files that belong to a journal, itself first; each may be missing."""
    ends = ("", "-wal", "-shm", "-journal", ".promise", ".reserve")
    return [file.with_name(f"{file.name}{end}") for end in ends]


def open_both(
    file: Path,
    identity: str,
    header: Callable[[], Header] | None,
    *,
    create: bool,
    patience: float,
) -> tuple[sqlite3.Connection, Reading]:
    """Connect to a journal twice, to write and to read: see `Journal.open`.

    Its tables are made if there are none, and it is brought to today's format.

    Raises:
        JournalError: and all that `Journal.open` raises of the file itself.
    """
    writer = _open_writer(file, identity, header, create=create, patience=patience)
    try:
        with making(file):
            reader = _connect(file, "rw", patience)
            reader.execute("PRAGMA query_only = ON")
    except BaseException:
        writer.close()
        raise
    return writer, Reading(reader, (), live=True)


def _open_writer(
    file: Path,
    identity: str,
    header: Callable[[], Header] | None,
    *,
    create: bool,
    patience: float,
) -> sqlite3.Connection:
    with making(file):
        if not file.exists():
            if not create:
                raise JournalMissing(f"nothing has been taught yet: {str(file)!r} is not there")
            _make_folder(file.parent)
        writer = _connect(file, "rwc" if create else "rw", patience)
    try:
        with making(file):
            unmade = not _has_tables(writer)
        if unmade and not create:
            raise JournalMissing(f"nothing has been taught yet: {str(file)!r} is empty")
        content = header() if unmade and header is not None else ({}, {})
        with making(file):
            if file.stat().st_size == 0:  # before the log is made, which takes its mode from it
                os.chmod(file, 0o600)
                sync_folder(file.parent)
            keep_log(writer, patience)
            if unmade:
                make_tables(writer, identity, content)
            _check_application(file, writer)
            if not check_todays(file, writer):
                with _known_format(file):
                    migrate(writer, FORMAT, file)
    except BaseException:
        writer.close()
        raise
    return writer


@dataclass(eq=False)
class Reading:
    """A connection that needs no right to write and no room, to what a file held at one moment.

    Attributes:
        db: the connection.
        key: of the files then; another one says that they have changed since.
        live: whether it sees what others write.
    """

    db: sqlite3.Connection
    key: tuple
    live: bool
    _folder: str | None = None

    @classmethod
    def open(cls, file: Path, patience: float) -> Reading:
        """Read a journal where it cannot be opened for writing; of an older format, in memory.

        Raises:
            JournalError: it cannot be read, or is of a newer format.
        """
        with making(file):
            reading = cls._open(file, patience)
            try:
                if not _has_tables(reading.db):
                    raise JournalMissing(f"nothing has been taught yet: {str(file)!r} is empty")
                _check_application(file, reading.db)
                if not check_todays(file, reading.db):
                    reading._upgrade(file)
            except BaseException:
                reading.close()
                raise
            return reading

    @classmethod
    def instead(
        cls, file: Path, hindered: JournalError, *, create: bool, patience: float
    ) -> Reading:
        """Read a journal that cannot be written; raises what hinders that if there is no way."""
        if type(hindered) is not JournalError or not file.exists():
            raise hindered
        try:
            return cls.open(file, patience)
        except JournalError as error:
            if isinstance(error, JournalMissing) and not create:
                raise
            raise hindered from None

    @classmethod
    def _open(cls, file: Path, patience: float) -> Reading:
        key = files_key(file)
        if file.with_name(f"{file.name}-shm").exists():  # else SQLite would make one
            with contextlib.suppress(sqlite3.OperationalError):
                return cls(_reading_connection(file, "ro", patience), key, live=True)
        log = file.with_name(f"{file.name}-wal")
        if not log.exists() or log.stat().st_size == 0:
            return cls(_reading_connection(file, "ro&immutable=1", patience), key, live=False)
        folder = _copied(file, log)
        try:
            db = _reading_connection(Path(folder) / file.name, "rw", patience)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(db, key, live=False, _folder=folder)

    def _upgrade(self, file: Path) -> None:
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        memory.text_factory = _text
        try:
            self.db.backup(memory)
            with _known_format(file):
                migrate(memory, FORMAT, None)
        except BaseException:
            memory.close()
            raise
        self.db.close()
        self.db, self.live = memory, False

    def close(self) -> None:
        """Close it; twice is fine."""
        self.db.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def files_key(file: Path) -> tuple:
    """What tells whether a journal's files were changed, without opening them."""
    found = []
    for each in own_files(file)[:2]:
        with contextlib.suppress(OSError):
            status = os.stat(each)
            found.append((each.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _reading_connection(file: Path, mode: str, patience: float) -> sqlite3.Connection:
    db = _connect(file, mode, patience)
    try:
        db.execute("PRAGMA query_only = ON")
        _has_tables(db)
    except BaseException:
        db.close()
        raise
    return db


def _copied(file: Path, log: Path) -> str:
    """A folder with copies of a journal and its log, in memory if there is no room elsewhere."""
    try:
        return _copied_to(None, file, log)
    except OSError:
        if not os.path.isdir("/dev/shm"):
            raise
        return _copied_to("/dev/shm", file, log)


def _copied_to(place: str | None, file: Path, log: Path) -> str:
    folder = tempfile.mkdtemp(prefix="enn-journal-", dir=place)
    try:
        for each in (file, log):
            shutil.copyfile(each, os.path.join(folder, each.name))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


_text = functools.partial(str, encoding="utf-8", errors="surrogateescape")
"""Damaged text is read as it lies, so that its entry can be named."""


def _connect(file: Path, mode: str, patience: float) -> sqlite3.Connection:
    # No copies of what may be erased in a temporary folder.
    db = connect(file, mode, "temp_store = MEMORY", patience=patience)
    db.text_factory = _text
    return db


def make_tables(db: sqlite3.Connection, identity: str, header: Header) -> None:
    """Make a journal's tables, if nobody has meanwhile."""
    text, (layout, data) = pack_json(header[0], "header"), pack_arrays(header[1], None)
    db.execute("BEGIN IMMEDIATE")
    with db:
        if _has_tables(db):
            return
        for statement in SCHEMA.split(";"):  # `executescript` would commit
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {FORMAT.number}")
        rows = [
            ("identity", identity),
            ("generation", 1),
            ("header", text),
            ("header_layout", layout),
            ("header_data", data),
            ("entries", Entries().line()),
        ]
        db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        seal_meta(db)


def write_copy(db: sqlite3.Connection, target: Path) -> None:
    """Write a journal to another file, as it is at one moment, for the owner only.

    Raises:
        sqlite3.Error, OSError: it cannot be written; what was there is as it was.
    """
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with contextlib.closing(sqlite3.connect(temporary)) as copy:
            copy.execute("PRAGMA journal_mode = OFF")  # it is complete, or never gets its name
            db.backup(copy)


def copy_journal(file: Path, target: Path, patience: float) -> None:
    """Copy a journal of any app as it is at one moment, while others use it.

    Raises:
        JournalError: it cannot be read or copied, or is of a newer format.
    """
    with contextlib.closing(Reading.open(file, patience)) as reading, making(target):
        write_copy(reading.db, target)


def rewrite(file: Path, db: sqlite3.Connection) -> None:
    """Write a journal anew without what was erased, and drop all copies that lie beside it.

    SQLite frees the pages of what is erased as they are; those that it writes here have none of it.

    Raises:
        JournalBusy: others still read the old ones.
        JournalError: there is no room.
    """
    with making(file):
        forget_copies(file, ".damaged-")
        try:
            db.execute("VACUUM")
            busy = bool(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        except sqlite3.OperationalError as error:
            full = no_room_in(file.parent)
            if full is None:
                raise
            needed = file.stat().st_size / 2**20  # what is left of it is written beside it first
            raise JournalError(f"{full}; free {needed:,.1f} MB there") from error
        if busy:
            raise JournalBusy("another process is reading them; wait for it")


def insert_rows(db: sqlite3.Connection, rows: list[tuple]) -> None:
    """Insert rows of `events.row_of`."""
    marks = ",".join("?" * 11)
    db.executemany(f"INSERT INTO events ({COLUMNS}) VALUES ({marks})", rows)


def _check_application(file: Path, db: sqlite3.Connection) -> None:
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise JournalCorrupt(f"{str(file)!r} is no journal of feedback; choose another file")


def check_todays(file: Path, db: sqlite3.Connection) -> bool:
    """Whether it has today's format; JournalError if a newer version has just changed it."""
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


# --- its errors ----------------------------------------------------------------------------------

BUSY = "another process has been writing {!r} for more than 10 s; try again when it is done"


@contextlib.contextmanager
def errors(file: Path) -> Iterator[None]:
    """SQLite's errors as ours, and the file's name in all that is said of damage."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError, JournalCorrupt) as error:
        raise refusal(file, error) from None


@contextlib.contextmanager
def making(file: Path) -> Iterator[None]:
    """SQLite's and the system's errors as ours."""
    try:
        with errors(file):
            yield
    except OSError as error:
        if isinstance(error, JournalError):
            raise
        raise JournalError(
            f"{str(file)!r} cannot be made ({error.strerror or error}); choose a place that can be "
            "written"
        ) from None


def refusal(file: Path, error: Exception) -> Exception:
    """SQLite's error as ours, with the file's name in it.

    UnicodeDecodeError is what its messages on damage can end in.
    """
    name = str(file)
    if isinstance(error, JournalCorrupt):  # of a part of it
        return error if name in str(error) else JournalCorrupt(f"{name!r}: {error}")
    what = trouble(error) if isinstance(error, sqlite3.DatabaseError) else "damaged"
    said = " ".join(str(error).split())[:200]
    if what is None:
        return error
    if what == "busy":
        return JournalBusy(BUSY.format(name))
    if what == "damaged":
        return JournalCorrupt(
            f"{name!r} is damaged, or no journal of feedback ({said}); `enn check --repair` saves "
            "what is whole, or move it away to start anew"
        )
    full = no_room_in(file.parent)
    if full is None and what == "denied":
        return JournalError(
            f"{name!r} cannot be written ({said}); give the right to write it and its folder, or "
            "choose another place"
        )
    return JournalError(
        f"{name!r} could not be read or saved ({full or said}), nothing was changed; free some "
        "space, or check the disk"
    )
