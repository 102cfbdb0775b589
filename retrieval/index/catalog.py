"""The catalog of an index: one SQLite file that holds everything that changes.

A row per image (stable id, path, size, times, hash, state), the vectors added since the last
snapshot, the snapshot's rows that no longer count, the vectors of deleted images, and the name and
the digests of the snapshot. A vector is committed together with its row, so a process killed at any
instant leaves a consistent catalog. Rows are read with their checksums; one that does not fit is
an error, as SQLite's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from enn_core.files.migrations import FormatError, check_format, migrate
from enn_core.files.sqlite import connect
from retrieval.index.manifest import IndexMismatch
from retrieval.index.schema import (
    FORMAT,
    IMAGE,
    KEPT,
    PENDING,
    PROTECTED,
    SCHEMA,
    Entry,
    Kept,
)

__all__ = ["Catalog", "Entry", "Kept", "RowDamaged", "decode_path", "encode_path", "row_sum"]

FILE_NAME = "catalog.sqlite"
_BUSY_SECONDS = 30.0
_VARIABLES = 500  # per statement; the smallest limit of any SQLite build is 999

UNIT_TOLERANCE = 2e-3
"""How far the norm of a stored vector may be from 1; what is imported may be off by half of it."""

_COLUMNS = f"{IMAGE}, crc"


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


class RowDamaged(sqlite3.DatabaseError):
    """What is stored is not what was written; says what."""


def row_sum(*values: object) -> int:
    """CRC-32 of a row's fields, each with its type; a function of SQLite, too.

    >>> row_sum(1, "a", None, 2), row_sum(1, b"a", None, 2)
    (68927957, 2622493382)
    """
    if isinstance(values[-1], bytes):  # a vector, whose text would be long
        return zlib.crc32(values[-1], zlib.crc32(ascii(values[:-1]).encode()))
    return zlib.crc32(ascii(values).encode())


def _entry(row: tuple, state: int | None = None) -> Entry | None:
    """A checked row of `_COLUMNS`; as it was in a state, None if that is not known any more."""
    *values, crc = row
    if row_sum(*values) != crc:
        raise RowDamaged(f"row {row[0]} of its images does not fit its checksum")
    id_, path, size, mtime_ns, read_ns, sha256, width, height, kind, error, changed, former = values
    if state is not None and changed > state:
        fields, changed = json.loads(former) if former is not None else ((), changed)
        return Entry(*fields) if changed <= state else None
    return Entry(
        id=id_,
        path=decode_path(path),
        width=width,
        height=height,
        size=size,
        mtime_ns=mtime_ns,
        sha256=sha256.hex() if sha256 is not None else None,
        state=kind,
        error=error,
        read_ns=read_ns,
    )


def _vectors(rows: list[tuple], dim: int, table: str) -> np.ndarray:
    """Checked vectors (N, dim) float32 of rows (name, …, vector, crc)."""
    for *values, crc in rows:
        if row_sum(*values) != crc:
            raise RowDamaged(f"row {values[0]!r:.40} of {table} does not fit its checksum")
    vectors = np.frombuffer(b"".join([row[-2] for row in rows]), "<f4").reshape(len(rows), dim)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))  # so that NaN is bad
    if len(bad):
        name = f"row {rows[bad[0]][0]!r:.40} of {table}"
        raise RowDamaged(f"{name} holds a vector of norm {norms[bad[0]]:.3g} instead of 1")
    return vectors


def _prepare(db: sqlite3.Connection) -> None:
    """What every connection needs: the checksum, and triggers for rows that are replaced."""
    db.create_function("row_sum", -1, row_sum, deterministic=True)
    db.execute("PRAGMA recursive_triggers = ON")


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
        self._next = 0  # generation that is being written
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
            _prepare(db)
            version = f"PRAGMA user_version = {FORMAT.number};"
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {version} COMMIT;")

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
            _prepare(db)
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
            _prepare(memory)
            self._db.backup(memory)
            migrate(memory, FORMAT, None)
        except BaseException:
            memory.close()
            raise
        finally:
            self.close()
        return Catalog(memory, detached=True)

    def copy_to(self, other: sqlite3.Connection) -> None:
        """Copy all of it, inside `reading` or `writing` as it is there, into an empty database."""
        self._db.backup(other)

    def forget_on_close(self, copy: str) -> None:
        """Delete the folder of a copy with it."""
        self._copy = copy

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
                self._next = self.generation + 1
                yield
                self.set_meta("generation", self._next)

    def rows(self, sql: str, values: Sequence = ()) -> list[tuple]:
        """What a query finds; nothing is checked."""
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # --- meta ----------------------------------------------------------------------------------

    def meta(self, key: str) -> str | bytes | int | None:
        """A value, checked if its key is one of `PROTECTED`."""
        value, crc = self.rows(
            "SELECT (SELECT value FROM meta WHERE key = ?1),"
            " (SELECT total FROM sums WHERE name = 'meta.' || ?1)",
            (key,),
        )[0]
        if key in PROTECTED and (value, crc) != (None, None) and row_sum(key, value) != crc:
            raise RowDamaged(f"its {key.replace('_', ' ')} does not fit its checksum")
        return value

    def set_meta(self, key: str, value: str | bytes | int | None) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        if key in PROTECTED:
            crc = row_sum(key, value)
            self._db.execute("INSERT OR REPLACE INTO sums VALUES ('meta.' || ?, 1, ?)", (key, crc))

    @property
    def generation(self) -> int:
        """Counts committed changes."""
        return int(self.meta("generation") or 0)

    def snapshot(self) -> tuple[str, str | None, bytes | None] | None:
        """Names of the snapshot and its ANN, and its packed digests if it has some."""
        name, ann, digests = (self.meta(key) for key in ("snapshot", "ann", "digests"))
        if not name:
            return None
        return str(name), str(ann) if ann else None, digests if isinstance(digests, bytes) else None

    def check_sum(self, table: str, rows: int, total: int) -> None:
        """Raise RowDamaged if a table has not the rows that were written into it.

        Args:
            table: of `TOTALS`.
            rows, total: what was counted and added up.
        """
        if self.rows("SELECT rows, total FROM sums WHERE name = ?", (table,)) != [(rows, total)]:
            raise RowDamaged(f"rows of its {table} are missing or changed")

    # --- reading rows --------------------------------------------------------------------------

    def entry(self, id_: int) -> Entry | None:
        rows = self.rows(f"SELECT {_COLUMNS} FROM images WHERE id = ?", (int(id_),))
        return _entry(rows[0]) if rows else None

    def entries(
        self, state: str | None = None, generation: int | None = None, batch: int = 2000
    ) -> Iterator[Entry]:
        """Rows in id order, deleted ones only if asked for; read in batches.

        Args:
            state: of the rows.
            generation: that they are of, by default the one of each batch.
            batch: rows read at once.
        """
        condition = "state = ?" if state is not None else "state <> 'deleted'"
        values: tuple = () if state is None else (state,)
        if generation is not None and generation != self.generation:
            condition, values = f"({condition} OR changed > ?)", (*values, generation)
        last = -1
        while True:
            rows = self.rows(
                f"SELECT {_COLUMNS} FROM images WHERE {condition} AND id > ?"
                f" ORDER BY id LIMIT {batch}",
                (*values, last),
            )
            for row in rows:
                entry = _entry(row, generation)
                if entry is None or entry.state == "deleted" != state:
                    continue
                if state is None or entry.state == state:
                    yield entry
            if len(rows) < batch:
                return
            last = rows[-1][0]

    def by_id(self, ids: Sequence[int], generation: int | None = None) -> dict[int, Entry]:
        """Rows of the given ids, deleted ones too, as they are now or were in a generation."""
        found = {}
        for start in range(0, len(ids), _VARIABLES):
            part = [int(id_) for id_ in ids[start : start + _VARIABLES]]
            marks = ",".join("?" * len(part))
            for row in self.rows(f"SELECT {_COLUMNS} FROM images WHERE id IN ({marks})", part):
                entry = _entry(row, generation)
                if entry is not None:
                    found[row[0]] = entry
        return found

    def by_path(self, paths: Sequence[str]) -> dict[str, Entry]:
        """Rows of the given paths that are not deleted."""
        found = {}
        for start in range(0, len(paths), _VARIABLES):
            part = [encode_path(path) for path in paths[start : start + _VARIABLES]]
            marks = ",".join("?" * len(part))
            for row in self.rows(
                f"SELECT {_COLUMNS} FROM images WHERE path IN ({marks}) AND state <> 'deleted'",
                part,
            ):
                entry = _entry(row)
                if entry is not None:
                    found[entry.path] = entry
        return found

    def by_hash(self, sha256: str, state: str | None = None) -> list[Entry]:
        """Rows of one content in id order, of one state or of all."""
        rows = self.rows(
            f"SELECT {_COLUMNS} FROM images WHERE sha256 = ?1 AND state = ifnull(?2, state)"
            " ORDER BY id",
            (bytes.fromhex(sha256), state),
        )
        return [entry for row in rows if (entry := _entry(row)) is not None]

    def all_paths(self, batch: int = 5000) -> Iterator[tuple[int, str, str]]:
        """(id, path, state) of every row that is not deleted, in id order, read in batches.

        Nobody may be writing. At the end RowDamaged is raised if rows are missing; those that
        are there are not looked at one by one.
        """
        last, count, total = -1, 0, 0
        while True:
            rows = self.rows(
                f"SELECT id, path, state, crc FROM images WHERE id > ? ORDER BY id LIMIT {batch}",
                (last,),
            )
            for id_, path, state, crc in rows:
                total += crc
                if state != "deleted":
                    yield id_, decode_path(path), state
            count += len(rows)
            if len(rows) < batch:
                break
            last = rows[-1][0]
        self.check_sum("images", count, total)

    def max_id(self) -> int:
        """The largest id ever given."""
        rows = self.rows("SELECT seq FROM sqlite_sequence WHERE name = 'images'")
        return int(rows[0][0]) if rows else 0

    def counts(self) -> dict[str, int]:
        """Rows by state."""
        other = dict(
            self.rows("SELECT state, count(*) FROM images WHERE state <> 'indexed' GROUP BY state")
        )
        total = self.rows("SELECT count(*) FROM images")[0][0]
        return {
            "indexed": total - sum(other.values()),
            "skipped": other.get("skipped", 0),
            "deleted": other.get("deleted", 0),
        }

    # --- writing rows (inside `writing`) -------------------------------------------------------

    def put(self, entry: Entry) -> int:
        """Insert a row, or replace the row of its id if that is above 0. Returns the id."""
        before = self._former(entry.id) if entry.id > 0 else None
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
            self._next,
            before,
        )
        cursor = self._db.execute(
            "INSERT INTO images (path, size, mtime_ns, read_ns, sha256, width, height, state,"
            " error, changed, former, id) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"
            " ON CONFLICT (id) DO UPDATE SET"
            " path = excluded.path, size = excluded.size, mtime_ns = excluded.mtime_ns,"
            " read_ns = excluded.read_ns, sha256 = excluded.sha256, width = excluded.width,"
            " height = excluded.height, state = excluded.state, error = excluded.error,"
            " changed = excluded.changed, former = excluded.former",
            (*values, entry.id if entry.id > 0 else None),
        )
        id_ = entry.id if entry.id > 0 else int(cursor.lastrowid or 0)
        self._sum_up(id_)
        return id_

    def _former(self, id_: int) -> str | None:
        """A row as it is before this transaction, for readers who have not seen it yet."""
        rows = self.rows(f"SELECT {_COLUMNS} FROM images WHERE id = ?", (id_,))
        entry = _entry(rows[0]) if rows else None
        if entry is None:
            return None
        *_, changed, former, _ = rows[0]
        # Changed twice in one transaction: nobody has seen what is between.
        fields = list(vars(entry).values())
        return former if changed == self._next else json.dumps([fields, changed])

    def _sum_up(self, id_: int) -> None:
        self._db.execute(f"UPDATE images SET crc = row_sum({IMAGE}) WHERE id = ?", (id_,))

    def mark_deleted(self, id_: int) -> None:
        """Keep the row, so that a reader of an older state and a returning file find it."""
        self._db.execute(
            "UPDATE images SET state = 'deleted', former = ?, changed = ? WHERE id = ?",
            (self._former(id_), self._next, id_),
        )
        self._sum_up(id_)
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
            f"INSERT OR REPLACE INTO kept SELECT {KEPT}, row_sum({KEPT}) FROM (SELECT sha256,"
            " width, height, ? AS deleted, ? AS vector FROM images WHERE id = ?)"
            " WHERE sha256 IS NOT NULL",
            (int(now), np.ascontiguousarray(vector, dtype="<f4").tobytes(), id_),
        )

    def kept(self, sha256: str, dim: int) -> Kept | None:
        """What is kept of a content, or None.

        Raises:
            ValueError: if the vector has another length than dim.
        """
        rows = self.rows(f"SELECT {KEPT}, crc FROM kept WHERE sha256 = ?", (bytes.fromhex(sha256),))
        if not rows:
            return None
        return Kept(_vectors(rows, dim, "the kept vectors")[0], *rows[0][1:3])

    def is_kept(self, sha256: str) -> bool:
        return bool(self.rows("SELECT 1 FROM kept WHERE sha256 = ?", (bytes.fromhex(sha256),)))

    def kept_count(self) -> tuple[int, int | None]:
        """How many contents are kept, and when the last was deleted, in s since the epoch."""
        return self.rows("SELECT count(*), max(deleted) FROM kept")[0]

    def drop_kept(self, sha256: str) -> None:
        self._db.execute("DELETE FROM kept WHERE sha256 = ?", (bytes.fromhex(sha256),))

    def drop_all_kept(self) -> None:
        self._db.execute("DELETE FROM kept")

    # --- vectors since the snapshot ------------------------------------------------------------

    def put_vector(self, id_: int, vector: np.ndarray) -> None:
        """Set the vector of a row; it wins over the snapshot's, removed or not."""
        data = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        cursor = self._db.execute(
            "INSERT OR REPLACE INTO pending (id, vector) VALUES (?, ?)", (id_, data)
        )
        seq = cursor.lastrowid
        crc = row_sum(seq, id_, data)
        self._db.execute("UPDATE pending SET crc = ? WHERE seq = ?", (crc, seq))

    def drop_vector(self, id_: int) -> None:
        self._db.execute("DELETE FROM pending WHERE id = ?", (id_,))
        self._db.execute("INSERT OR IGNORE INTO removed VALUES (?)", (id_,))

    def pending_ids(self) -> list[tuple[int, int]]:
        """(seq, id) of every pending vector, in the order of writing; reads no vector.

        Raises:
            RowDamaged: some are missing.
        """
        rows = self.rows(
            "SELECT seq, id FROM pending INDEXED BY sqlite_autoindex_pending_1 ORDER BY seq"
        )
        self.check_sum("pending", len(rows), sum([3 * seq + id_ for seq, id_ in rows]))
        return rows

    def pending_vectors(self, after: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Pending vectors with seq > after.

        Returns:
            (M,) int64 seq, ascending, and (M, dim) float32.

        Raises:
            ValueError: if a stored vector has another length.
        """
        rows = self.rows(f"SELECT {PENDING}, crc FROM pending WHERE seq > ? ORDER BY seq", (after,))
        vectors = _vectors(rows, dim, "the pending vectors")
        return np.fromiter((row[0] for row in rows), np.int64, len(rows)), vectors

    def pending_vector(self, id_: int, dim: int) -> np.ndarray | None:
        """The pending vector (dim,) of one row, or None."""
        rows = self.rows(f"SELECT {PENDING}, crc FROM pending WHERE id = ?", (id_,))
        return _vectors(rows, dim, "the pending vectors")[0] if rows else None

    def pending_count(self) -> int:
        return self.rows("SELECT count(*) FROM pending")[0][0]

    def removed_count(self) -> int:
        return self.rows("SELECT count(*) FROM removed")[0][0]

    def is_removed(self, id_: int) -> bool:
        return bool(self.rows("SELECT 1 FROM removed WHERE id = ?", (id_,)))

    def removed_ids(self) -> np.ndarray:
        """Ids whose rows in the snapshot do not count, (M,) int64, ascending."""
        rows = self.rows("SELECT id FROM removed ORDER BY id")
        ids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
        self.check_sum("removed", len(ids), int(ids.sum()))
        return ids

    def commit_snapshot(
        self, name: str | None, ann: str | None, digests: bytes | None, number: int
    ) -> None:
        """Make the snapshot of a number, which holds every live vector, the current one."""
        self.set_meta("snapshot", name)
        self.set_meta("ann", ann)
        self.set_meta("digests", digests)
        self.set_meta("snapshot_number", number)
        self._db.execute("DELETE FROM pending")
        self._db.execute("DELETE FROM removed")

    def drop_kept_outside(self, earliest: float, latest: float) -> None:
        """Drop what is kept of rows deleted outside these times, s since the epoch."""
        condition, times = "FROM kept WHERE deleted < ? OR deleted > ?", (earliest, latest)
        if self.rows(f"SELECT 1 {condition} LIMIT 1", times):
            with self.writing():
                self._db.execute(f"DELETE {condition}", times)

    # --- repair (inside `writing`) --------------------------------------------------------------

    def copy_rows(self, table: str, rows: Sequence[tuple]) -> None:
        """Insert rows as they are, with their checksums; those that are there already stay."""
        marks = ",".join("?" * len(rows[0])) if rows else "NULL"
        self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)

    def go_on_from(self, generation: int, max_id: int) -> None:
        """Count states and ids after those of another catalog."""
        self._next = generation + 1
        self._db.execute("DELETE FROM sqlite_sequence WHERE name = 'images'")
        self._db.execute("INSERT INTO sqlite_sequence VALUES ('images', ?)", (max_id,))

    def overwrite(self, folder: Path) -> None:
        """Make the catalog of a folder one like this, in one transaction that its readers see."""
        with contextlib.closing(connect(folder / FILE_NAME, "rw", patience=_BUSY_SECONDS)) as old:
            self._db.backup(old)

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
