"""Bringing an index up to date with its folder: new, changed, moved, deleted files.

Threads read and decode, the model works in the calling thread, every batch is one transaction.
Killed at any instant and started again, it goes on where it was.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter
from pathlib import Path

import numpy as np

from retrieval.formats import ending
from retrieval.ignore import Ignored
from retrieval.images import (
    MAX_BYTES,
    MAX_PIXELS,
    MEMORY_SHORT,
    FoundFile,
    ImageBytes,
    ImageError,
    TooManyPixels,
    decode_with_size,
    read_stable,
    scan,
)
from retrieval.index import absence, reasons
from retrieval.index.catalog import Entry
from retrieval.index.manifest import EmbeddingModel
from retrieval.index.others import Others
from retrieval.index.writer import Writer

__all__ = ["Progress", "UpdateReport", "update"]

# Rows looked up in one go while scanning.
_SCAN_CHUNK = 1000
# Results without a vector (unchanged content, skipped files) that are committed together.
_FLUSH_ROWS = 500
# Rows deleted in one transaction.
_DELETE_ROWS = 5000
# Images between two looks at whether the pending vectors should become a snapshot.
_PUBLISH_EVERY = 2000
# Seconds between two calls of the progress callback, and those that the current rate looks back.
_TELL_SECONDS = 0.25
_RATE_SECONDS = 10.0
# A file changed this shortly before it was read (ns) may have changed again within the same tick
# of the file system's clock. Its mtime is then no proof: the content is hashed at the next update.
_RACY_NS = 50_000_000
_RACY_COARSE_NS = 2_000_000_000  # FAT and some network shares count in 2 s


@dataclass(frozen=True)
class Progress:
    """How far an update is.

    Attributes:
        stage: "scan" (looking for files), "index" (embedding) or "save".
        done, total: files; total is None while scanning.
        rate: files per second over the last seconds.
        eta: seconds left at that rate, None if unknown.
        skipped: files skipped so far.
    """

    stage: str
    done: int
    total: int | None
    rate: float
    eta: float | None
    skipped: int = 0


@dataclass
class UpdateReport:
    """What an update did, in numbers of files.

    Attributes:
        added, changed, moved, deleted, unchanged: files by what happened to them.
        skipped: files newly found unusable, with the reason in the catalog.
        skipped_total: all unusable files of the folder, earlier ones included.
        left_out: files that are no pictures, by the ending of their names (".mp4"; "" for none).
            Hidden and ignored files are not among them.
        embedded: images that went through the model (copies of one content go once, and what was
            deleted not long ago does not go again).
        total: searchable images afterwards.
        seconds: wall time.
        rate: embedded images per second.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    deleted: int = 0
    unchanged: int = 0
    skipped: int = 0
    skipped_total: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    embedded: int = 0
    total: int = 0
    seconds: float = 0.0
    rate: float = 0.0


@dataclass(frozen=True)
class _Task:
    """A file to look into, and the row of its path if there is one."""

    file: FoundFile
    known: Entry | None


@dataclass(frozen=True)
class _Loaded:
    """What a thread found out about a file."""

    task: _Task
    read_ns: int
    content: ImageBytes | None = None  # without its data
    pixels: np.ndarray | None = None
    width: int = 0
    height: int = 0
    error: str | None = None
    gone: bool = False


def update(
    writer: Writer,
    root: Path | None,
    model: EmbeddingModel,
    *,
    progress: Callable[[Progress], None] | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    on_skip: Callable[[str, str], None] | None = None,
    exclude: Sequence[str] = (),
    prune: bool = False,
    max_pixels: int | None = None,
) -> UpdateReport:
    """Index new and changed files, follow moved ones, drop deleted ones.

    A file with the same size and modification time is not read again. A file that cannot be used
    is recorded with its reason and tried again when it changes. What lies in a folder that cannot
    be read now is kept as it was. Where all images are gone, or more than 100 and a quarter, the
    index is kept, since their disk may not be there. Moved files and ignored ones are not gone.
    Vectors of what is deleted are kept for 30 days, for the return of the same content.

    Args:
        writer: entered.
        root: the photo folder; None is an error that says so.
        model: the index's model.
        progress: called from this thread a few times per second; an exception from it ends the
            update, and what is done stays done.
        batch_size: images per call of the model.
        workers: decoding threads, by default one per core.
        on_skip: called with (relative path, reason) for every newly skipped file.
        exclude: patterns of files to leave out, in .gitignore's syntax, besides those of the
            folder's `.ennignore`; to be given each time. What was indexed of them is deleted.
        prune: delete what is gone, however much it is.
        max_pixels: larger pictures are read at a part of their size, or skipped where their format
            has no such way; by default `images.MAX_PIXELS`. What was skipped for a smaller limit
            is tried again.

    Raises:
        PicturesGone: if too much is gone.
        ValueError: if a pattern is none.
        NotADirectoryError: if root cannot be listed.
        IndexMismatch: if the index belongs to another folder.
        IndexLocked: if another process is writing.
        OSError: if the disk is full; everything up to the last batch is safe.
    """
    if root is None:
        raise ValueError("the index has no photo folder yet; give the folder to index")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
    started = time.monotonic()
    with writer.guard():
        is_new_root = writer.is_new_root(root)
        known = _Seen(writer.catalog.max_id())
        run = _Run(writer, root, model, known, progress, on_skip, max_pixels)
        tasks = run.scan(exclude)
        # Before anything is written or embedded; only reading tells which files have moved.
        gone = run.find_gone(prune, [task.file.size for task in tasks if task.known is None])
        if is_new_root:
            writer.set_root(root)
        if run.others is not None:
            run.others.save()
        run.index(tasks, batch_size, workers or _cores())
        run.delete(run.find_gone(prune) if tasks else gone)
        run.tell("save", len(tasks), len(tasks), force=True)
        writer.publish()
        counts = writer.catalog.counts()
    report = run.report
    report.total, report.skipped_total = counts["indexed"], counts["skipped"]
    report.seconds = time.monotonic() - started
    report.rate = report.embedded / max(run.index_seconds, 1e-9) if report.embedded else 0.0
    return report


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


class _Seen:
    """A set of ids that exist on disk, one bit each."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._bits = bytearray(largest // 8 + 1)

    def add(self, id_: int) -> None:
        if id_ <= self.largest:
            self._bits[id_ >> 3] |= 1 << (id_ & 7)

    def discard(self, id_: int) -> None:
        if id_ <= self.largest:
            self._bits[id_ >> 3] &= ~(1 << (id_ & 7))

    def __contains__(self, id_: int) -> bool:
        # Rows made by this update are of files just found.
        return id_ > self.largest or bool(self._bits[id_ >> 3] >> (id_ & 7) & 1)


class _Run:
    """One update in progress."""

    def __init__(
        self,
        writer: Writer,
        root: Path,
        model: EmbeddingModel,
        seen: _Seen,
        progress: Callable[[Progress], None] | None,
        on_skip: Callable[[str, str], None] | None,
        max_pixels: int,
    ) -> None:
        self.writer = writer
        self.catalog = writer.catalog
        self.root = root
        self.model = model
        self.report = UpdateReport()
        self.index_seconds = 0.0
        self.others: Others | None = None  # read when there are files that only content tells
        self._max_pixels = max_pixels
        # Who allows more pixels than usual allows the bytes that they take uncompressed.
        self._max_bytes = MAX_BYTES
        if max_pixels > MAX_PIXELS:
            self._max_bytes = max(MAX_BYTES, reasons.BYTES_PER_PIXEL * max_pixels)
        self._progress = progress
        self._on_skip = on_skip
        self._seen = seen
        self._ignored: Ignored  # what the scan leaves out
        self._hidden: tuple[str, ...] = ()  # folders that cannot be read now
        self._told = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    # --- reporting -----------------------------------------------------------------------------

    def tell(self, stage: str, done: int, total: int | None, *, force: bool = False) -> None:
        """Call the progress callback, a few times per second at most."""
        now = time.monotonic()
        if self._progress is None or (now - self._told < _TELL_SECONDS and not force):
            return
        self._told = now
        recent = self._recent
        if recent and recent[-1][1] > done:
            recent.clear()  # a new stage
        recent.append((now, done))
        while len(recent) > 2 and now - recent[0][0] > _RATE_SECONDS:
            recent.popleft()
        span = now - recent[0][0]
        rate = (done - recent[0][1]) / span if span > 0 else 0.0
        eta = (total - done) / rate if total is not None and rate > 0 else None
        self._progress(Progress(stage, done, total, rate, eta, self.report.skipped))

    def _skip(self, path: str, reason: str) -> None:
        self.report.skipped += 1
        if self._on_skip is not None:
            self._on_skip(path, reason)

    # --- finding -------------------------------------------------------------------------------

    def scan(self, exclude: Sequence[str]) -> list[_Task]:
        """Compare the folder with the catalog; returns the files that must be read."""
        problems: list[tuple[str, str]] = []
        tasks: list[_Task] = []
        done = 0
        self._ignored = Ignored(self.root, exclude)
        files = scan(
            self.root, lambda *problem: problems.append(problem), self._ignored, self._leave_out
        )
        while chunk := list(islice(files, _SCAN_CHUNK)):
            rows = self.catalog.by_path(list(map(attrgetter("path"), chunk)))
            for file in chunk:
                known = rows.get(file.path)
                unchanged = known is not None and _unchanged(known, file, self._max_pixels)
                if not (file.named or unchanged or self._is_picture(file)):
                    self._leave_out(file.path)
                    continue
                if known is not None:
                    self._seen.add(known.id)
                    if unchanged:
                        self.report.unchanged += known.state == "indexed"
                        continue
                tasks.append(_Task(file, known))
            done += len(chunk)
            self.tell("scan", done, None)
        if problems:
            self._record_problems(problems)
        return tasks

    def _is_picture(self, file: FoundFile) -> bool:
        """Whether a file is a picture whose name does not say so."""
        if self.others is None:
            self.others = Others(self.writer.folder, self.root)
        return not self.others.hold(file)

    def _leave_out(self, path: str) -> None:
        counts, kind = self.report.left_out, ending(path.rpartition("/")[2])
        counts[kind] = counts.get(kind, 0) + 1

    def _record_problems(self, problems: list[tuple[str, str]]) -> None:
        """Note folders and links that cannot be read; they are looked at anew every time."""
        self._hidden = tuple(
            path if path.endswith("/") or not path else path + "/" for path, _ in problems
        )
        rows = self.catalog.by_path([path for path, _ in problems])
        fresh = []
        for path, reason in problems:
            known = rows.get(path)
            if known is not None:
                self._seen.add(known.id)
                if known.state == "skipped" and known.error == reason:
                    continue
            fresh.append((path, reason, known))
        if not fresh:
            return
        with self.catalog.writing():
            for path, reason, known in fresh:
                self._put_skipped(Entry(known.id if known else 0, path, error=reason), known)
        for path, reason, _ in fresh:
            self._skip(path, reason)

    def _put_skipped(self, entry: Entry, known: Entry | None) -> None:
        if known is not None:
            self.writer.keep(known.id)
        self.catalog.put(replace(entry, state="skipped"))
        if known is not None:
            self.catalog.drop_vector(known.id)

    # --- reading and embedding -----------------------------------------------------------------

    def index(self, tasks: list[_Task], batch_size: int, workers: int) -> None:
        """Read, decode and embed; every batch is committed before the next one is embedded."""
        started = time.monotonic()
        batch: list[_Loaded] = []
        plain: list[_Loaded] = []  # results that need no model
        done = 0
        since_publish = 0
        with warnings.catch_warnings():
            # Damaged metadata is no news; damaged pixels are errors.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            for loaded in self._load_all(tasks, workers, batch_size + 2 * workers):
                (batch if loaded.pixels is not None else plain).append(loaded)
                done += 1
                if len(batch) >= batch_size or len(plain) >= _FLUSH_ROWS:
                    since_publish += len(batch)
                    self._commit(plain, batch)
                    plain, batch = [], []
                    if since_publish >= _PUBLISH_EVERY:
                        self.writer.publish(final=False)
                        since_publish = 0
                self.tell("index", done, len(tasks))
            self._commit(plain, batch)
        self.index_seconds = time.monotonic() - started

    def _load_all(self, tasks: list[_Task], workers: int, window: int) -> Iterator[_Loaded]:
        """Results of `_load` in the order of tasks, never more than `window` ahead."""
        waiting: deque[Future[_Loaded]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="enn-decode")
        try:
            for task in tasks:
                waiting.append(pool.submit(self._load, task))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, task: _Task, *, decode: bool = False) -> _Loaded:
        """Read, hash and, unless the content is known already, decode one file."""
        read_ns = time.time_ns()
        path = os.path.join(self.root, task.file.path)
        try:
            content = read_stable(path, max_bytes=self._max_bytes)
        except FileNotFoundError:
            return _Loaded(task, read_ns, gone=True)
        except ImageError as error:
            size, large = task.file.size, task.file.size > self._max_bytes
            reason = reasons.of_bytes(error, size) if large else str(error)
            return _Loaded(task, read_ns, error=reason)
        loaded = _Loaded(task, read_ns, replace(content, data=b""))
        if not decode and (
            self.catalog.by_hash(content.sha256, "indexed") or self.catalog.is_kept(content.sha256)
        ):
            return loaded  # there is a vector of it
        try:
            preprocess = self.model.preprocess
            decoded = decode_with_size(
                content.data,
                draft_size=getattr(preprocess, "draft_size", None),
                max_pixels=self._max_pixels,
                reduce=True,
            )
            pixels = np.asarray(preprocess(decoded.image))
        except TooManyPixels as error:
            reason = reasons.of_pixels(error)
            return replace(loaded, error=reason, width=error.width, height=error.height)
        except ImageError as error:
            return replace(loaded, error=str(error))
        except MemoryError:
            return replace(loaded, error=MEMORY_SHORT)
        except (ValueError, ArithmeticError) as error:
            # Extreme shapes, such as 1 x 60000, can be too much for the preprocessing.
            return replace(loaded, error=f"cannot be prepared for the model: {error}"[:200])
        return replace(loaded, pixels=pixels, width=decoded.width, height=decoded.height)

    def _twin(self, loaded: _Loaded) -> Entry | None:
        """An indexed row of the same content: the file's own, else a moved one, else a copy."""
        if loaded.content is None:
            return None
        known = loaded.task.known
        rows = self.catalog.by_hash(loaded.content.sha256, "indexed")
        if known is not None:
            own = next((row for row in rows if row.id == known.id), None)
            if own is not None:
                return own
        return next((row for row in rows if self._is_gone(row)), rows[0] if rows else None)

    def _is_gone(self, row: Entry) -> bool:
        return row.id not in self._seen and not row.path.startswith(self._hidden)

    # --- writing -------------------------------------------------------------------------------

    def _commit(self, plain: list[_Loaded], batch: list[_Loaded]) -> None:
        """Embed a batch and commit it together with what needs no model."""
        if not plain and not batch:
            return
        vectors = self._embed(batch)
        skips: list[tuple[str, str]] = []
        again: list[_Loaded] = []
        with self.catalog.writing():
            for loaded in plain:
                if not self._store_plain(loaded, skips):
                    again.append(loaded)
            self._store_embedded(batch, vectors, skips)
        for path, reason in skips:
            self._skip(path, reason)
        if again:
            # The row whose vector was to be used has changed since: these need the model after all.
            loads = [self._load(loaded.task, decode=True) for loaded in again]
            self._commit(
                [loaded for loaded in loads if loaded.pixels is None],
                [loaded for loaded in loads if loaded.pixels is not None],
            )

    def _embed(self, batch: list[_Loaded]) -> np.ndarray:
        """Vectors (N, r) of a batch; a row of NaN where the model gives no direction."""
        dim = self.writer.manifest.dim
        if not batch:
            return np.empty((0, dim), np.float32)
        pixels = np.stack([loaded.pixels for loaded in batch if loaded.pixels is not None])
        vectors = np.asarray(self.model.image_vectors(pixels), np.float32)
        if vectors.shape != (len(batch), dim):
            raise ValueError(
                f"the model must give vectors of shape ({len(batch)}, {dim}), got {vectors.shape}"
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        usable = np.isfinite(norms) & (norms > 0.5)
        return np.divide(vectors, norms, out=np.full_like(vectors, np.nan), where=usable)

    def _entry(self, loaded: _Loaded) -> Entry:
        file, known, content = loaded.task.file, loaded.task.known, loaded.content
        return Entry(
            id=known.id if known is not None else 0,
            path=file.path,
            width=loaded.width or None,
            height=loaded.height or None,
            size=content.size if content is not None else file.size,
            mtime_ns=content.mtime_ns if content is not None else file.mtime_ns,
            sha256=content.sha256 if content is not None else None,
            read_ns=loaded.read_ns,
        )

    def _store_plain(self, loaded: _Loaded, skips: list[tuple[str, str]]) -> bool:
        """Commit a result that has no pixels; False if it needs them after all."""
        known = loaded.task.known
        if loaded.gone:
            if known is not None:
                self._seen.discard(known.id)
            return True
        if loaded.error is not None:
            self._store_skip(loaded, loaded.error, skips)
            return True
        twin = self._twin(loaded)
        if twin is None:
            return self._store_kept(loaded)
        entry = replace(self._entry(loaded), width=twin.width, height=twin.height)
        if known is not None and twin.id == known.id:
            self.catalog.put(entry)
            self.report.unchanged += 1
            return True
        if known is None and self._is_gone(twin):
            self.catalog.put(replace(entry, id=twin.id))
            self._seen.add(twin.id)
            self.report.moved += 1
            return True
        vector = self.writer.vector(twin.id)
        if vector is None:
            return False
        self._store_vectors([(entry, vector, known)])
        return True

    def _store_kept(self, loaded: _Loaded) -> bool:
        """Commit a content that was deleted and came back; False if nothing is kept of it."""
        content = loaded.content
        kept = self.catalog.kept(content.sha256, self.writer.manifest.dim) if content else None
        if kept is None:
            return False
        entry = replace(self._entry(loaded), width=kept.width, height=kept.height)
        self._store_vectors([(entry, kept.vector, loaded.task.known)])
        return True

    def _store_embedded(
        self, batch: list[_Loaded], vectors: np.ndarray, skips: list[tuple[str, str]]
    ) -> None:
        stored = []
        for loaded, vector in zip(batch, vectors, strict=True):
            if np.isfinite(vector).all():
                stored.append((self._entry(loaded), vector, loaded.task.known))
            else:
                self._store_skip(loaded, "the model sees no direction in this image", skips)
        self.report.embedded += len(stored)
        self._store_vectors(stored)

    def _store_vectors(self, stored: list[tuple[Entry, np.ndarray, Entry | None]]) -> None:
        """Put rows with their vectors; the third is the row of the same path, if there is one."""
        former: dict[str | None, list[Entry]] = {
            entry.sha256: self.catalog.by_hash(entry.sha256, "deleted")
            for entry, _, known in stored
            if known is None and entry.sha256 is not None
        }
        for entry, vector, known in stored:
            rows = former.get(entry.sha256, []) if known is None else []
            if rows:
                # An image that was deleted and came back has its old id.
                same = next((row for row in rows if row.path == entry.path), rows[0])
                rows.remove(same)
                entry = replace(entry, id=same.id)
                self._seen.add(entry.id)
            self.catalog.put_vector(self.catalog.put(entry), vector)
            if entry.sha256 is not None:
                self.catalog.drop_kept(entry.sha256)
            if known is not None and known.state == "indexed":
                self.report.changed += 1
            else:
                self.report.added += 1

    def _store_skip(self, loaded: _Loaded, reason: str, skips: list[tuple[str, str]]) -> None:
        known = loaded.task.known
        entry = replace(self._entry(loaded), error=reason)
        self._put_skipped(entry, known)
        if known is None or (known.state, known.error) != ("skipped", reason):
            skips.append((entry.path, reason))

    def find_gone(self, prune: bool, new_sizes: Sequence[int] = ()) -> list[tuple[int, str]]:
        """(id, state) of what is no longer on disk; what an unreadable folder hides may be.

        Args:
            prune: whether any number may be gone.
            new_sizes: bytes of new files that are not read yet: as many gone files of the same
                sizes may have moved there.

        Raises:
            PicturesGone: if it is too much.
        """
        if not self._seen.largest:
            return []  # there was nothing before this update
        gone, lost, known = [], [], 0
        for id_, path, state in self.catalog.all_paths():
            away = id_ not in self._seen and not path.startswith(self._hidden)
            if away:
                gone.append((id_, state))
            if state == "indexed" and id_ <= self._seen.largest:
                if away and self._ignored.hides(path):
                    continue
                known += 1
                if away:
                    lost.append(id_)
        if prune or not absence.too_many(len(lost), known):
            return gone
        sizes = Counter(entry.size for entry in self.catalog.by_id(lost).values())
        count = (sizes - Counter(new_sizes)).total()
        if absence.too_many(count, known):
            raise absence.refusal(count, known)
        return gone

    def delete(self, gone: list[tuple[int, str]]) -> None:
        """Delete rows (id, state); the vectors of indexed ones are kept for a while."""
        for start in range(0, len(gone), _DELETE_ROWS):
            with self.catalog.writing():
                for id_, state in gone[start : start + _DELETE_ROWS]:
                    if state == "indexed":
                        self.writer.delete([id_])
                        self.report.deleted += 1
                    else:
                        self.catalog.erase(id_)


def _unchanged(known: Entry, file: FoundFile, max_pixels: int) -> bool:
    """Whether size and times prove that a file is the one that was read, and as it would be now."""
    if known.size != file.size or known.mtime_ns != file.mtime_ns or known.read_ns is None:
        return False
    if known.sha256 is None:
        return False  # it could not even be read; the right to do so may have been given since
    if known.error and reasons.may_be_over(known.error, max_pixels):
        return False
    margin = _RACY_COARSE_NS if file.mtime_ns % 1_000_000_000 == 0 else _RACY_NS
    # A time far in the future is as good a proof as one in the past: a change would set it to now.
    return abs(file.mtime_ns - known.read_ns) > margin
