"""SQLite files: opened without being made by accident, and what is wrong with them.

Connections commit by themselves. What changes together begins with BEGIN IMMEDIATE, so that what is
read meanwhile stays true, and goes on inside of `with connection`, which ends it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Literal
from urllib.parse import quote

__all__ = ["Trouble", "connect", "is_full", "keep_log", "no_room", "no_room_in", "trouble"]

Trouble = Literal["busy", "denied", "damaged", "full", "failed"]

_TROUBLES: dict[int, Trouble] = {
    sqlite3.SQLITE_BUSY: "busy",
    sqlite3.SQLITE_LOCKED: "busy",
    sqlite3.SQLITE_READONLY: "denied",
    sqlite3.SQLITE_CANTOPEN: "denied",
    sqlite3.SQLITE_PERM: "denied",
    sqlite3.SQLITE_CORRUPT: "damaged",
    sqlite3.SQLITE_NOTADB: "damaged",
    sqlite3.SQLITE_ERROR: "damaged",  # such as a table that is missing
    sqlite3.SQLITE_FULL: "full",
}


def connect(file: Path, mode: str, *pragmas: str, patience: float) -> sqlite3.Connection:
    """Open a file; what is committed is on the disk.

    Args:
        file: any name, also one that is not UTF-8.
        mode: of SQLite's URIs: "ro", "rw" or "rwc"; with "&immutable=1" nobody may be writing.
        pragmas: to set, such as "secure_delete = ON".
        patience: seconds to wait for others.

    Raises:
        sqlite3.Error: it is missing, or cannot be opened.
    """
    # A URI, because only there can a file be opened without being created.
    name = quote(os.fsencode(file.absolute()))
    host = "//" if name.startswith("/") else ""  # or a name with two slashes would begin with one
    uri = f"file:{host}{name}?mode={mode}"
    db = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=patience
    )
    try:
        for pragma in ("synchronous = FULL", *pragmas):
            db.execute(f"PRAGMA {pragma}")
    except BaseException:
        db.close()
        raise
    return db


def keep_log(db: sqlite3.Connection, patience: float) -> None:
    """Switch a file to a write-ahead log; SQLite itself does not wait for others that do the same.

    Raises:
        sqlite3.Error: others are still at it after so many seconds.
    """
    end = time.monotonic() + patience
    while db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def trouble(error: sqlite3.DatabaseError) -> Trouble | None:
    """What is wrong with a file; None for errors of programs, such as using it after `close`."""
    if isinstance(error, sqlite3.ProgrammingError):
        return None
    if "Could not decode to UTF-8" in str(error):  # of Python's own, without a code
        return "damaged"
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_INTERNAL) & 0xFF
    return _TROUBLES.get(code, "failed")


_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "the file would be larger than this system allows",
}


def is_full(error: OSError) -> bool:
    """Whether the system has no room for a file."""
    return error.errno in _NO_ROOM


def no_room(error: OSError) -> str | None:
    """Why the system has no room for a file, in words; None if that is not what is wrong."""
    return _NO_ROOM.get(error.errno or 0)


def no_room_in(folder: Path, size: int = 2**16) -> str | None:
    """Why a folder has no room for so many bytes, in words; None if it has, or nobody may write.

    SQLite tells a used-up quota, and a full disk where it needs memory that processes share, as an
    I/O error, so this tries: the file that it writes is gone when it returns.
    """
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            data = memoryview(os.urandom(size))  # some file systems need no room for zeros
            while data:
                data = data[file.write(data) :]
    except OSError as error:
        return no_room(error)
    return None
