"""The tables of a catalog, what their rows are, and how those of older formats become so.

Rows have a checksum, `row_sum` of all their other fields, a function of `retrieval.index.catalog`
that every connection knows. Rows that vanish are noticed by the counts and totals of `sums`, which
triggers keep: whoever changes a row without its checksum leaves a damaged one behind.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass

import numpy as np

from enn_core.files.migrations import Tables

__all__ = ["FORMAT", "IMAGE", "KEPT", "PENDING", "PROTECTED", "SCHEMA", "TOTALS", "Entry", "Kept"]

IMAGE = "id, path, size, mtime_ns, read_ns, sha256, width, height, state, error, changed, former"
"""Fields of an image's row that its checksum covers, in its order."""
PENDING = "seq, id, vector"
KEPT = "sha256, width, height, deleted, vector"

PROTECTED = (
    "generation",
    "root",
    "snapshot",
    "ann",
    "snapshot_number",
    "digests",
    "manifest",
)
"""Keys of `meta` whose values have a checksum in `sums`."""

TOTALS = {"images": "crc", "pending": "3 * seq + id", "removed": "id", "kept": "crc"}
"""What `sums` adds up of each table; of pending vectors what their index holds."""


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


_CHECKED = (
    "ALTER TABLE images ADD COLUMN changed INTEGER NOT NULL DEFAULT 0",  # generation of that
    "ALTER TABLE images ADD COLUMN former TEXT",  # the row before it, for readers of that state
    "ALTER TABLE images ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE pending ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE kept ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
    """CREATE TABLE sums (
  name TEXT PRIMARY KEY,                  -- of a table, or "meta." and a key of `meta`
  rows INTEGER NOT NULL,
  total INTEGER NOT NULL
) WITHOUT ROWID""",
    f"UPDATE images SET crc = row_sum({IMAGE})",
    f"UPDATE pending SET crc = row_sum({PENDING})",
    f"UPDATE kept SET crc = row_sum({KEPT})",
    *(
        f"INSERT INTO sums SELECT '{table}', count(*), ifnull(sum({value}), 0) FROM {table}"
        for table, value in TOTALS.items()
    ),
    "INSERT INTO sums SELECT 'meta.' || key, 1, row_sum(key, value) FROM meta"
    f" WHERE key IN {PROTECTED}",
)


def _triggers() -> list[str]:
    made = []
    for table, value in TOTALS.items():
        new, old = (re.sub("crc|seq|id", rf"{row}.\g<0>", value) for row in ("new", "old"))
        for name, event, rows, total in (
            ("in", "INSERT", "+ 1", f"+ ({new})"),
            ("on", "UPDATE", "+ 0", f"+ ({new}) - ({old})"),
            ("out", "DELETE", "- 1", f"- ({old})"),
        ):
            made.append(
                f"CREATE TRIGGER {table}_{name} AFTER {event} ON {table} BEGIN UPDATE sums SET"
                f" rows = rows {rows}, total = total {total} WHERE name = '{table}'; END"
            )
    return made


def _with_sums(db: sqlite3.Connection) -> None:
    """Format 3: rows have checksums, and their state before the last change."""
    for statement in (*_CHECKED, *_triggers()):
        db.execute(statement)


FORMAT: Tables = Tables(_with_kept, _with_sums)
"""Steps from older catalogs to those of `SCHEMA`."""

SCHEMA = """
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
""" + "".join(f"{statement};\n" for statement in (*_KEPT, *_CHECKED, *_triggers()))
"""Of a new catalog: the tables of 0.1, and what was added since."""
