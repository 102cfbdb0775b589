"""The one writer of an index: the lock, and the publishing of snapshots."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import filelock
import numpy as np

from enn_core.files.migrations import forget_copies
from enn_core.files.sqlite import is_full, no_room, no_room_in, trouble
from retrieval.index import snapshot as snapshots
from retrieval.index.catalog import FILE_NAME, Catalog, decode_path, encode_path
from retrieval.index.manifest import FILE_NAME as MANIFEST
from retrieval.index.manifest import (
    IndexCorrupt,
    IndexLocked,
    IndexMismatch,
    Manifest,
    NoIndex,
    repair_command,
)
from retrieval.index.snapshot import Digests, Snapshot

__all__ = ["ANN_FROM", "KEPT_SECONDS", "Writer", "index_lock", "size_of"]

ANN_FROM = 200_000
"""Number of vectors from which a snapshot gets an ANN beside it."""

KEPT_SECONDS = 30 * 24 * 3600
"""How long the vector of a deleted image is kept for its return."""

# Rewriting a snapshot of this many vectors takes well under a second; larger ones are rewritten
# once the pending changes are this share of them, and meanwhile live in the catalog.
SMALL_SNAPSHOT = 100_000
PENDING_SHARE = 0.05
# During a long update the pending vectors are folded in when they exceed both of these.
PENDING_ROWS = 50_000
PENDING_GROWTH = 0.25

DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What SQLite raises on a damaged file; the second where its own message quotes the damage."""

_LOCK_NAME = "write.lock"
_HOLDER_NAME = "writer.json"


@contextlib.contextmanager
def index_lock(folder: Path) -> Iterator[None]:
    """Hold the right to write an index directory; the system drops it if the process dies.

    Raises:
        IndexLocked: if somebody else holds it, saying who.
        OSError: if the directory cannot be written.
    """
    if not folder.is_dir():
        raise gone(folder)  # or the lock would make it
    lock = filelock.FileLock(folder / _LOCK_NAME, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise IndexLocked(
            f"the index in {str(folder)!r} is being written by {_holder(folder)}; "
            "wait for it, or stop it and run again"
        ) from None
    except OSError as error:
        raise not_writable(error, folder) from None
    try:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        # Only for the message of a second writer: a full disk is no reason to stop here.
        with contextlib.suppress(OSError):
            (folder / _HOLDER_NAME).write_text(json.dumps(holder), "utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _HOLDER_NAME).unlink()
        lock.release()


def size_of(folder: Path) -> int:
    """Bytes of the files in an index directory."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += entry.stat().st_size
    return total


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / _HOLDER_NAME).read_text("utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


class Writer:
    """Holds the lock and a writing connection; use as a context manager."""

    def __init__(self, folder: Path, manifest: Manifest, *, ann_from: int = ANN_FROM) -> None:
        self.folder = folder
        self.manifest = manifest
        self.ann_from = ann_from
        self._stack = contextlib.ExitStack()
        self._snapshot: Snapshot | None = None

    def __enter__(self) -> Writer:
        with contextlib.ExitStack() as stack:
            stack.enter_context(index_lock(self.folder))
            with self.guard():
                self.catalog = Catalog.open(self.folder, write=True)
                stack.callback(self.catalog.close)
                stack.callback(self.catalog.checkpoint)
                now = time.time()
                # Those of days to come were written by a clock that was wrong.
                self.catalog.drop_kept_outside(now - KEPT_SECONDS, now + KEPT_SECONDS)
                stored, known = self.catalog.snapshot(), self.catalog.meta("manifest")
                text = Manifest.bring_up_to_date(self.folder)
                if text != known:
                    with self.catalog.writing():
                        self.catalog.set_meta("manifest", text)
            if stored is not None:
                try:
                    name, ann, digests = stored
                    self._snapshot = Snapshot(
                        self.folder, name, ann, self.manifest.dim, Digests.unpack(digests)
                    )
                except (FileNotFoundError, snapshots.SnapshotError) as error:
                    raise damaged(error, self.folder) from None
                if digests is None:
                    self._trust(self._snapshot)
            snapshots.collect_strays(self.folder, stored[:2] if stored is not None else ())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._snapshot = None
        self._stack.close()

    def _trust(self, snapshot: Snapshot) -> None:
        """Give a snapshot of an older version its digests; that it was damaged only norms tell."""
        with self.guard():
            gone = np.concatenate(
                [
                    self.catalog.removed_ids(),
                    np.array(self.catalog.pending_ids(), np.int64).reshape(-1, 2)[:, 1],
                ]
            )
            bad = snapshot.ids[snapshots.not_unit(snapshot.vectors)]
            bad = np.setdiff1d(bad, gone)
            if len(bad):
                what = f"{snapshot.name} has {len(bad)} vectors that are not of unit norm"
                raise damaged(what, self.folder)
            ann = snapshot.ann_name
            of_ann = snapshots.file_digest(self.folder / ann) if ann else b""
            digests = Digests.of(snapshot.ids, snapshot.vectors, of_ann)
            with self.catalog.writing():
                self.catalog.set_meta("digests", digests.packed)
        self._snapshot = Snapshot(self.folder, snapshot.name, ann, self.manifest.dim, digests)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """SQLite's errors inside as one line that says what to do."""
        try:
            yield
        except DAMAGE as error:
            raise refusal(error, self.folder, writing=True) from None
        except OSError as error:
            if not is_full(error):
                raise
            raise no_space(error, self.folder) from None

    def root(self) -> Path | None:
        """The photo folder, absolute."""
        return read_root(self.catalog, self.folder)

    def set_root(self, root: Path) -> None:
        """Remember the photo folder."""
        set_root(self.catalog, self.folder, root)

    def is_new_root(self, root: Path) -> bool:
        """Whether a photo folder is not yet the remembered one.

        Raises:
            IndexMismatch: if that one still exists.
        """
        if not root.is_dir():
            return False  # whoever looks into it says what is wrong with it
        known = self.root()
        if known is not None and known.is_dir() and not os.path.samefile(known, root):
            raise IndexMismatch(
                f"the index belongs to the folder {str(known)!r}, not {str(root)!r}; "
                "give that folder, or another index directory"
            )
        return known != Path(os.path.abspath(root))

    def vector(self, id_: int) -> np.ndarray | None:
        """The live vector (r,) of a row, or None."""
        pending = self.catalog.pending_vector(id_, self.manifest.dim)
        if pending is not None:
            return pending
        if self._snapshot is None or self.catalog.is_removed(id_):
            return None
        row = self._snapshot.positions(np.array([id_]))[0]
        return None if row < 0 else self._snapshot.take(np.array([row]))[0]

    def keep(self, id_: int) -> None:
        """Set the vector of a row aside that is about to lose it."""
        vector = self.vector(id_)
        if vector is not None:
            self.catalog.keep(id_, vector, time.time())

    def delete(self, ids: Iterable[int]) -> None:
        """Delete indexed rows; their vectors are kept, since a disk may come back."""
        for id_ in ids:
            self.keep(id_)
            self.catalog.mark_deleted(id_)

    def compact(self, *, drop_deleted: bool = False) -> None:
        """Write all files anew without what is deleted; see `EigenIndex.compact`."""
        with self.catalog.writing():
            if drop_deleted:
                self.catalog.drop_all_kept()
            self.catalog.erase_deleted()
        self.publish(force=True)
        self.catalog.vacuum()
        if drop_deleted:
            forget_copies(self.folder / FILE_NAME)

    def publish(self, *, final: bool = True, force: bool = False) -> bool:
        """Fold the pending changes into a new snapshot, if it is worth it.

        Args:
            final: whether this is the end of an update, when smaller changes are folded in too.
            force: fold in whatever there is, and rewrite even if nothing changed.

        Returns:
            Whether a snapshot was written.

        Raises:
            IndexCorrupt: if vectors are damaged that would be copied.
            OSError: if the disk is full; the index stays as it was, pending changes included.
        """
        rows = len(self._snapshot) if self._snapshot is not None else 0
        pending = self.catalog.pending_count()
        changes = pending + self.catalog.removed_count()
        if final:
            due = changes > 0 and (rows < SMALL_SNAPSHOT or changes >= PENDING_SHARE * rows)
        else:
            due = pending >= max(PENDING_ROWS, PENDING_GROWTH * rows)
        if not (due or force):
            return False
        dim = self.manifest.dim
        new_ids = np.array(self.catalog.pending_ids(), np.int64).reshape(-1, 2)[:, 1]
        _, new = self.catalog.pending_vectors(-1, dim)
        order = np.argsort(new_ids, kind="stable")
        new_ids, new = new_ids[order], new[order]
        old_ids = np.empty(0, np.int64)
        if self._snapshot is not None:
            old_ids = self._snapshot.ids
            gone = np.union1d(self.catalog.removed_ids(), new_ids)
            keep = ~np.isin(old_ids, gone, assume_unique=True)
            self._snapshot.check(np.flatnonzero(keep))
        else:
            keep = np.empty(0, bool)
        ids = np.concatenate([old_ids[keep], new_ids])
        source = np.concatenate([np.flatnonzero(keep), len(old_ids) + np.arange(len(new_ids))])
        order = np.argsort(ids, kind="stable")
        ids, source = ids[order], source[order]
        number = int(self.catalog.meta("snapshot_number") or 0) + 1
        name: str | None = None
        ann: str | None = None
        digests: Digests | None = None
        if len(ids):
            name = f"vectors-{number}.faiss"
            old = self._snapshot.vectors if self._snapshot is not None else new[:0]
            blocks = snapshots.gather(source, old, new)
            digests = snapshots.write(self.folder, name, ids, blocks, dim)
            if len(ids) >= self.ann_from:
                ann = f"ann-{number}.faiss"
                fresh = Snapshot(self.folder, name, None, dim, digests)
                digests = replace(digests, ann=snapshots.build_ann(self.folder, ann, fresh))
        packed = digests.packed if digests is not None else None
        with self.catalog.writing():
            self.catalog.commit_snapshot(name, ann, packed, number)
        self._snapshot = Snapshot(self.folder, name, ann, dim, digests) if name else None
        snapshots.collect_strays(self.folder, (name, ann))
        return True


def kept_stats(catalog: Catalog) -> dict[str, int | str | None]:
    """How many vectors of deleted images are kept, and up to which day (UTC, ISO 8601) at most."""
    count, last = catalog.kept_count()
    until = last and time.strftime("%Y-%m-%d", time.gmtime(last + KEPT_SECONDS))
    return {"kept": count, "kept_until": until}


def read_root(catalog: Catalog, folder: Path) -> Path | None:
    """The photo folder of an index, absolute, or None if it has none yet."""
    value = catalog.meta("root")
    if value is None or isinstance(value, int):
        return None
    return Path(os.path.normpath(os.path.join(os.path.abspath(folder), decode_path(value))))


def set_root(catalog: Catalog, folder: Path, root: Path) -> None:
    """Remember the photo folder of an index.

    It is kept relative to an index that lies inside it, so that both can move together.
    """
    root, folder = Path(os.path.abspath(root)), Path(os.path.abspath(folder))
    inside = folder.is_relative_to(root)
    value = os.path.relpath(root, folder) if inside else str(root)
    with catalog.writing():
        catalog.set_meta("root", encode_path(value))


def not_writable(error: OSError, folder: Path) -> OSError:
    """The system's refusal to make or lock an index directory, in one line."""
    return OSError(
        error.errno,
        f"the index in {str(folder)!r} cannot be written ({error.strerror}); "
        "give a directory that can with --index",
    )


def refusal(error: Exception, folder: Path, *, writing: bool = False) -> Exception:
    """SQLite's error, one of `DAMAGE`, as one of the index, in one line that says what to do."""
    what = trouble(error) if isinstance(error, sqlite3.DatabaseError) else "damaged"
    if what is None:
        return error
    # SQLite opens read-only what it cannot open for writing, as on a full disk.
    unwritable = "readonly database" in str(error) or (
        writing and what != "damaged" and isinstance(error, sqlite3.OperationalError)
    )
    if what == "full" or unwritable:
        return no_space(error, folder)
    if is_gone(folder):
        return gone(folder)
    reason = " ".join(str(error).split())[:200]  # SQLite quotes what it cannot read
    return IndexCorrupt(
        f"the catalog in {str(folder)!r} cannot be read ({reason}); if this stays, "
        f"{repair_command(folder)} saves what there is, or delete the index directory and "
        "index the folder again"
    )


def damaged(what: object, folder: Path) -> Exception:
    """Something that does not fit, in one line that says what to do."""
    if is_gone(folder):
        return gone(folder)
    return IndexCorrupt(
        f"the index in {str(folder)!r} is damaged ({what}); {repair_command(folder)} saves "
        "what there is, or delete the index directory and index the folder again"
    )


def is_gone(folder: Path) -> bool:
    """Whether there is no index any more where one was."""
    return not (folder / MANIFEST).exists() and not (folder / FILE_NAME).exists()


def gone(folder: Path) -> NoIndex:
    """An open index whose folder has been moved or deleted."""
    return NoIndex(
        f"the index is no longer in {str(folder)!r}: it was moved or deleted while it was open; "
        "open it where it is now"
    )


@contextlib.contextmanager
def damage(folder: Path) -> Iterator[None]:
    """SQLite's errors as `refusal` words them."""
    try:
        yield
    except DAMAGE as error:
        raise refusal(error, folder) from None


def no_space(error: Exception, folder: Path) -> OSError:
    """The system's error behind a failed write to the index, in one line."""
    why = no_room(error) if isinstance(error, OSError) else no_room_in(folder)
    full = why is not None or "full" in str(error)
    reason = why or getattr(error, "strerror", None) or str(error)
    return OSError(
        errno.ENOSPC if full else errno.EIO,
        f"the index in {str(folder)!r} cannot be written ({reason}); everything up to the last "
        f"batch is safe: {'make room and ' if full else ''}run again",
    )
