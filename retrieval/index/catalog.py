"""The catalog of an index: one SQLite file that holds everything that changes.

A row per image (stable id, path, size, times, hash, state), the vectors added since the last
snapshot, the snapshot's rows that no longer count, the vectors of deleted images, and the name of
the snapshot. A vector is committed together with its row, so a process killed at any instant leaves
a consistent catalog.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from enn_core.files.migrations import FormatError, Tables, check_format, migrate
from enn_core.files.sqlite import connect
from retrieval.index.manifest import IndexMismatch

__all__ = ["Catalog", "Entry", "Kept", "decode_path", "encode_path"]

FILE_NAME = "catalog.sqlite"
_BUSY_SECONDS = 30.0
_VARIABLES = 500  # per statement; the smallest limit of any SQLite build is 999

_KEPT = (
    """CREATE TABLE kept (
  sha256 BLOB PRIMARY KEY,                -- of the content; any file that has it gets the vector
  width INTEGER,
  height INTEGER,
  deleted INTEGER NOT NULL,               -- when its row was, in s since the epoch
  vector BLOB NOT NULL                    -- float32, little endian
)""",
    "CREATE INDEX kept_deleted ON kept (deleted)",
)


def _with_kept(db: sqlite3.Connection) -> None:
    """Format 2: vectors of deleted images are kept for a while."""
    for statement in _KEPT:
        db.execute(statement)


FORMAT: Tables = Tables(_with_kept)
"""Steps from older catalogs to those of `_SCHEMA`."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE images (
  id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used again, even after deletion
  path NOT NULL,                          -- relative to the root; TEXT, BLOB if not UTF-8
  size INTEGER,
  mtime_ns INTEGER,
  read_ns INTEGER,                        -- when the file was read, to mistrust a racy mtime
  sha256 BLOB,
  width INTEGER,
  height INTEGER,
  state TEXT NOT NULL CHECK (state IN ('indexed', 'skipped', 'deleted')),
  error TEXT
);
CREATE UNIQUE INDEX images_path ON images (path) WHERE state <> 'deleted';
CREATE INDEX images_sha256 ON images (sha256) WHERE sha256 IS NOT NULL;
CREATE INDEX images_other ON images (state, id) WHERE state <> 'indexed';
CREATE TABLE pending (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id INTEGER NOT NULL UNIQUE,
  vector BLOB NOT NULL                    -- float32, little endian
);
CREATE TABLE removed (id INTEGER PRIMARY KEY);
""" + "".join(f"{statement};\n" for statement in _KEPT)

_COLUMNS = "id, path, size, mtime_ns, read_ns, sha256, width, height, state, error"


@dataclass(frozen=True)
class Entry:
    """What the catalog knows of one file.

    Attributes:
        id: stable; a moved file and a changed file keep theirs.
        path: relative to the index's root, with forward slashes.
        width, height: pixels of the upright original; None if it was never decoded.
        size: bytes; None for folders and links that are reported as skipped.
        mtime_ns: modification time in ns.
        sha256: hex of the content; None if it was never read.
        state: "indexed", "skipped" or "deleted".
        error: why it was skipped, one line.
        read_ns: when it was read, in ns since the epoch.
    """

    id: int
    path: str
    width: int | None = None
    height: int | None = None
    size: int | None = None
    mtime_ns: int | None = None
    sha256: str | None = None
    state: str = "indexed"
    error: str | None = None
    read_ns: int | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a deleted image: its vector (r,) float32, and its pixels if known."""

    vector: np.ndarray
    width: int | None
    height: int | None


def encode_path(path: str) -> str | bytes:
    """A path as SQLite stores it: text, or bytes if the name on disk is not valid UTF-8."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return path.encode("utf-8", "surrogateescape")
    return path


def decode_path(value: str | bytes) -> str:
    """The inverse of `encode_path`."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _entry(row: tuple) -> Entry:
    id_, path, size, mtime_ns, read_ns, sha256, width, height, state, error = row
    return Entry(
        id=id_,
        path=decode_path(path),
        width=width,
        height=height,
        size=size,
        mtime_ns=mtime_ns,
        sha256=sha256.hex() if sha256 is not None else None,
        state=state,
        error=error,
        read_ns=read_ns,
    )


def _is_todays(db: sqlite3.Connection) -> bool:
    """Whether it has today's format; IndexMismatch if a newer version has just changed it."""
    if db.execute("PRAGMA user_version").fetchone()[0] == FORMAT.number:
        return True
    with _known_format():
        return check_format(db, FORMAT)


@contextlib.contextmanager
def _known_format() -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise IndexMismatch(f"the index's catalog {error}") from None


class Catalog:
    """One connection; safe to share between threads. Writing needs the index's lock."""

    def __init__(
        self, connection: sqlite3.Connection, *, detached: bool = False, copy: str | None = None
    ) -> None:
        self._db = connection
        self._lock = threading.RLock()
        self._copy = copy  # temporary folder of a copied catalog
        self.detached = detached
        """Whether this connection never sees later changes: it must be opened anew for them."""

    # --- opening -------------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path) -> None:
        """Write an empty catalog; replaces one that was never completed."""
        path = folder / FILE_NAME
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}{suffix}")
        with contextlib.closing(
            connect(path, "rwc", "journal_mode = WAL", patience=_BUSY_SECONDS)
        ) as db:
            version = f"PRAGMA user_version = {FORMAT.number};"
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {version} COMMIT;")

    @classmethod
    def open(cls, folder: Path, *, write: bool = False) -> Catalog:
        """Connect to an existing catalog.

        A reader needs no right to write: on a read-only mount, or on a full disk, where SQLite
        cannot make its shared-memory file, the catalog is read as it lies, or from a copy if it
        has an unfinished write-ahead log. One of an older format is brought up to date in memory,
        in place by a writer.

        Raises:
            IndexMismatch: if it is of a newer format.
            sqlite3.Error: if the file is missing, damaged or no catalog.
            OSError: if an older one cannot be copied before it is changed.
        """
        path = folder / FILE_NAME
        if not path.exists():
            raise sqlite3.DatabaseError(f"{FILE_NAME} is missing")
        if write:
            catalog = cls(cls._connect(path, "rw"))
            try:
                if not _is_todays(catalog._db):
                    with _known_format():
                        migrate(catalog._db, FORMAT, path)
            except BaseException:
                catalog.close()
                raise
            return catalog
        try:
            return cls(cls._connect(path, "ro"))._up_to_date()
        except sqlite3.OperationalError:
            pass
        wal = Path(f"{path}-wal")
        if not wal.exists() or wal.stat().st_size == 0:
            return cls(cls._connect(path, "ro&immutable=1"), detached=True)._up_to_date()
        copy = tempfile.mkdtemp(prefix="enn-catalog-")
        try:
            for source in (path, wal):
                shutil.copyfile(source, os.path.join(copy, source.name))
            db = cls._connect(Path(copy) / FILE_NAME, "rw")
            return cls(db, detached=True, copy=copy)._up_to_date()
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise

    @staticmethod
    def _connect(path: Path, mode: str) -> sqlite3.Connection:
        db = connect(path, mode, patience=_BUSY_SECONDS)
        try:
            db.execute("SELECT key FROM meta LIMIT 1").fetchone()
            _is_todays(db)
        except BaseException:
            db.close()
            raise
        return db

    def _up_to_date(self) -> Catalog:
        """Itself, or a copy in memory if it is of an older format."""
        if _is_todays(self._db):
            return self
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            self._db.backup(memory)
            migrate(memory, FORMAT, None)
        except BaseException:
            memory.close()
            raise
        finally:
            self.close()
        return Catalog(memory, detached=True)

    def close(self) -> None:
        with self._lock:
            self._db.close()
            if self._copy is not None:
                shutil.rmtree(self._copy, ignore_errors=True)
                self._copy = None

    # --- transactions --------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """All reads inside see one state."""
        with self._lock:
            self._db.execute("BEGIN")
            try:
                _is_todays(self._db)
                yield
            finally:
                self._db.execute("COMMIT")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """All writes inside become visible together, on disk when this returns, or not at all."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                _is_todays(self._db)
                yield
                self._db.execute(
                    "INSERT INTO meta VALUES ('generation', 1)"
                    " ON CONFLICT (key) DO UPDATE SET value = value + 1"
                )

    def _rows(self, sql: str, values: Sequence = ()) -> list[tuple]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # --- meta ----------------------------------------------------------------------------------

    def meta(self, key: str) -> str | bytes | int | None:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def set_meta(self, key: str, value: str | bytes | int | None) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def generation(self) -> int:
        """Counts committed changes."""
        return int(self.meta("generation") or 0)

    # --- reading rows --------------------------------------------------------------------------

    def entry(self, id_: int) -> Entry | None:
        rows = self._rows(f"SELECT {_COLUMNS} FROM images WHERE id = ?", (int(id_),))
        return _entry(rows[0]) if rows else None

    def entries(self, state: str | None = None, batch: int = 2000) -> Iterator[Entry]:
        """Rows in id order, deleted ones only if asked for; read in batches, each one a state."""
        condition = "state = ?" if state is not None else "state <> 'deleted'"
        values = () if state is None else (state,)
        last = -1
        while True:
            rows = self._rows(
                f"SELECT {_COLUMNS} FROM images WHERE {condition} AND id > ?"
                f" ORDER BY id LIMIT {batch}",
                (*values, last),
            )
            yield from map(_entry, rows)
            if len(rows) < batch:
                return
            last = rows[-1][0]

    def by_id(self, ids: Sequence[int]) -> dict[int, Entry]:
        """Rows of the given ids, deleted ones too."""
        found = {}
        for start in range(0, len(ids), _VARIABLES):
            part = [int(id_) for id_ in ids[start : start + _VARIABLES]]
            marks = ",".join("?" * len(part))
            for row in self._rows(f"SELECT {_COLUMNS} FROM images WHERE id IN ({marks})", part):
                found[row[0]] = _entry(row)
        return found

    def by_path(self, paths: Sequence[str]) -> dict[str, Entry]:
        """Rows of the given paths that are not deleted."""
        found = {}
        for start in range(0, len(paths), _VARIABLES):
            part = [encode_path(path) for path in paths[start : start + _VARIABLES]]
            marks = ",".join("?" * len(part))
            for row in self._rows(
                f"SELECT {_COLUMNS} FROM images WHERE path IN ({marks}) AND state <> 'deleted'",
                part,
            ):
                found[decode_path(row[1])] = _entry(row)
        return found

    def by_hash(self, sha256: str, state: str | None = None) -> list[Entry]:
        """Rows of one content in id order, of one state or of all."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM images WHERE sha256 = ?1 AND state = ifnull(?2, state)"
            " ORDER BY id",
            (bytes.fromhex(sha256), state),
        )
        return [_entry(row) for row in rows]

    def all_paths(self, batch: int = 5000) -> Iterator[tuple[int, str, str]]:
        """(id, path, state) of every row that is not deleted, in id order, read in batches."""
        last = -1
        while True:
            rows = self._rows(
                "SELECT id, path, state FROM images WHERE state <> 'deleted' AND id > ?"
                f" ORDER BY id LIMIT {batch}",
                (last,),
            )
            for id_, path, state in rows:
                yield id_, decode_path(path), state
            if len(rows) < batch:
                return
            last = rows[-1][0]

    def max_id(self) -> int:
        """The largest id ever given."""
        rows = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'images'")
        return int(rows[0][0]) if rows else 0

    def counts(self) -> dict[str, int]:
        """Rows by state."""
        other = dict(
            self._rows("SELECT state, count(*) FROM images WHERE state <> 'indexed' GROUP BY state")
        )
        total = self._rows("SELECT count(*) FROM images")[0][0]
        return {
            "indexed": total - sum(other.values()),
            "skipped": other.get("skipped", 0),
            "deleted": other.get("deleted", 0),
        }

    # --- writing rows (inside `writing`) -------------------------------------------------------

    def put(self, entry: Entry) -> int:
        """Insert a row, or replace the row of its id if that is above 0. Returns the id."""
        values = (
            encode_path(entry.path),
            entry.size,
            entry.mtime_ns,
            entry.read_ns,
            bytes.fromhex(entry.sha256) if entry.sha256 is not None else None,
            entry.width,
            entry.height,
            entry.state,
            entry.error,
        )
        cursor = self._db.execute(
            "INSERT INTO images (path, size, mtime_ns, read_ns, sha256, width, height, state,"
            " error, id) VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET"
            " path = excluded.path, size = excluded.size, mtime_ns = excluded.mtime_ns,"
            " read_ns = excluded.read_ns, sha256 = excluded.sha256, width = excluded.width,"
            " height = excluded.height, state = excluded.state, error = excluded.error",
            (*values, entry.id if entry.id > 0 else None),
        )
        return entry.id if entry.id > 0 else int(cursor.lastrowid or 0)

    def mark_deleted(self, id_: int) -> None:
        """Keep the row, so that a reader of an older state and a returning file find it."""
        self._db.execute("UPDATE images SET state = 'deleted' WHERE id = ?", (id_,))
        self.drop_vector(id_)

    def erase(self, id_: int) -> None:
        self._db.execute("DELETE FROM images WHERE id = ?", (id_,))
        self.drop_vector(id_)

    def erase_deleted(self) -> None:
        """Forget deleted rows for good, but for those whose vectors are kept."""
        self._db.execute(
            "DELETE FROM images WHERE state = 'deleted'"
            " AND (sha256 IS NULL OR sha256 NOT IN (SELECT sha256 FROM kept))"
        )

    # --- vectors of deleted images -------------------------------------------------------------

    def keep(self, id_: int, vector: np.ndarray, now: float) -> None:
        """Set the vector of a row aside, by its content; what was never hashed is not kept.

        Args:
            id_: of the row, which still has its content's hash.
            vector: (r,).
            now: s since the epoch.
        """
        self._db.execute(
            "INSERT OR REPLACE INTO kept SELECT sha256, width, height, ?, ? FROM images"
            " WHERE id = ? AND sha256 IS NOT NULL",
            (int(now), np.ascontiguousarray(vector, dtype="<f4").tobytes(), id_),
        )

    def kept(self, sha256: str, dim: int) -> Kept | None:
        """What is kept of a content, or None.

        Raises:
            ValueError: if the vector has another length than dim.
        """
        rows = self._rows(
            "SELECT vector, width, height FROM kept WHERE sha256 = ?", (bytes.fromhex(sha256),)
        )
        if not rows:
            return None
        return Kept(np.frombuffer(rows[0][0], "<f4").reshape(dim), *rows[0][1:])

    def is_kept(self, sha256: str) -> bool:
        return bool(self._rows("SELECT 1 FROM kept WHERE sha256 = ?", (bytes.fromhex(sha256),)))

    def kept_count(self) -> tuple[int, int | None]:
        """How many contents are kept, and when the last was deleted, in s since the epoch."""
        return self._rows("SELECT count(*), max(deleted) FROM kept")[0]

    def drop_kept(self, sha256: str) -> None:
        self._db.execute("DELETE FROM kept WHERE sha256 = ?", (bytes.fromhex(sha256),))

    def drop_all_kept(self) -> None:
        self._db.execute("DELETE FROM kept")

    # --- vectors since the snapshot ------------------------------------------------------------

    def put_vector(self, id_: int, vector: np.ndarray) -> None:
        """Set the vector of a row; it wins over the snapshot's, removed or not."""
        self._db.execute(
            "INSERT OR REPLACE INTO pending (id, vector) VALUES (?, ?)",
            (id_, np.ascontiguousarray(vector, dtype="<f4").tobytes()),
        )

    def drop_vector(self, id_: int) -> None:
        self._db.execute("DELETE FROM pending WHERE id = ?", (id_,))
        self._db.execute("INSERT OR IGNORE INTO removed VALUES (?)", (id_,))

    def pending_ids(self) -> list[tuple[int, int]]:
        """(seq, id) of every pending vector, in the order of writing; reads no vector."""
        return self._rows(
            "SELECT seq, id FROM pending INDEXED BY sqlite_autoindex_pending_1 ORDER BY seq"
        )

    def pending_vectors(self, after: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Pending vectors with seq > after.

        Returns:
            (M,) int64 seq, ascending, and (M, dim) float32.

        Raises:
            ValueError: if a stored vector has another length.
        """
        rows = self._rows("SELECT seq, vector FROM pending WHERE seq > ? ORDER BY seq", (after,))
        sequence = np.fromiter((row[0] for row in rows), np.int64, len(rows))
        data = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f4")
        return sequence, data.reshape(len(rows), dim)

    def pending_vector(self, id_: int, dim: int) -> np.ndarray | None:
        """The pending vector (dim,) of one row, or None."""
        rows = self._rows("SELECT vector FROM pending WHERE id = ?", (id_,))
        return np.frombuffer(rows[0][0], "<f4").reshape(dim) if rows else None

    def pending_count(self) -> int:
        return self._rows("SELECT count(*) FROM pending")[0][0]

    def removed_count(self) -> int:
        return self._rows("SELECT count(*) FROM removed")[0][0]

    def is_removed(self, id_: int) -> bool:
        return bool(self._rows("SELECT 1 FROM removed WHERE id = ?", (id_,)))

    def removed_ids(self) -> np.ndarray:
        """Ids whose rows in the snapshot do not count, (M,) int64, ascending."""
        rows = self._rows("SELECT id FROM removed ORDER BY id")
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def commit_snapshot(self, name: str | None, ann: str | None) -> None:
        """Make a snapshot that holds every live vector the current one."""
        self.set_meta("snapshot", name)
        self.set_meta("ann", ann)
        self._db.execute("DELETE FROM pending")
        self._db.execute("DELETE FROM removed")

    def drop_kept_outside(self, earliest: float, latest: float) -> None:
        """Drop what is kept of rows deleted outside these times, s since the epoch."""
        condition, times = "FROM kept WHERE deleted < ? OR deleted > ?", (earliest, latest)
        if self._rows(f"SELECT 1 {condition} LIMIT 1", times):
            with self.writing():
                self._db.execute(f"DELETE {condition}", times)

    # --- upkeep --------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the file, as far as readers allow it."""
        with self._lock, contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA busy_timeout = 200")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with self._lock:
            self._db.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1000)}")

    def vacuum(self) -> None:
        """Give free pages back to the disk."""
        with self._lock:
            self._db.execute("VACUUM")
