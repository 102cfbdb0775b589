"""The eigen-index: a directory that answers "which images are closest to this query?".

    manifest.json        the model it belongs to; never changes
    catalog.sqlite       ids, paths, hashes, states, and what changed since the last snapshot
    vectors-N.faiss      the vectors, memory-mapped
    ann-N.faiss          candidates for more than 200,000 vectors
    others.bin           a cache: files of the folder that were opened and are no pictures
    write.lock           held by the one writer

Many readers may work beside one writer. A reader sees one state until `refresh()`; the files under
it may be replaced meanwhile. Every change is on disk before it is reported, and a writer that is
killed loses at most its running batch.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from enn_core.files.atomic import sync_folder
from enn_core.files.closing import Closing
from retrieval import eigen_coordinates as eigen
from retrieval.index import writer as writing
from retrieval.index.catalog import Catalog, Entry
from retrieval.index.manifest import (
    EmbeddingModel,
    IndexCorrupt,
    IndexExists,
    IndexLocked,
    IndexMismatch,
    Manifest,
    NoIndex,
    PicturesGone,
)
from retrieval.index.parquet import ROWS, export_parquet, import_parquet
from retrieval.index.snapshot import Digests, Snapshot, SnapshotError, View
from retrieval.index.writer import Writer

if TYPE_CHECKING:
    from retrieval.index.update import Progress, UpdateReport

__all__ = [
    "EigenIndex",
    "Entry",
    "IndexCorrupt",
    "IndexExists",
    "IndexLocked",
    "IndexMismatch",
    "NoIndex",
    "PicturesGone",
    "default_index_dir",
]

# Spread of log delta up to which the ANN's candidates hold under a changed spectrum: at 0.35 they
# hold 99.8 % of the ten best of clustered vectors, at 0.7 only 87 %.
_ANN_LOG_SPREAD = 0.35

DEFAULT_NAME = ".enn-index"


def default_index_dir(folder: str | os.PathLike[str]) -> Path:
    """Where the index of a photo folder lies unless told otherwise: hidden inside it."""
    return Path(folder) / DEFAULT_NAME


class EigenIndex(Closing):
    """A reader of an index directory, which also starts its updates.

    Searching is safe from several threads. The vectors are the images' eigen-coordinates
    (`retrieval.eigen_coordinates`); a query comes in the same coordinates.
    """

    ann_from: int = writing.ANN_FROM
    """Number of vectors from which the next snapshot gets an ANN beside it."""
    ann_candidates: int = 2000
    """Fewest candidates of the ANN that are ranked again exactly."""

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest, catalog: Catalog) -> None:
        """Use `open` or `create`."""
        self.path = Path(path).absolute()
        self._manifest = manifest
        self._catalog = catalog
        self._retired: list[Catalog] = []
        self._refreshing = threading.Lock()
        self._moments: tuple[View, tuple[np.ndarray, np.ndarray]] | None = None
        self._samples: tuple[View, dict[int, np.ndarray]] | None = None
        self._fits: tuple[dict[str, Any], eigen.EigenBasis] | None = None  # of a model that does
        self._stamp: tuple = ()  # files may have changed since the catalog was opened
        self._view = self._load_view(None)

    # --- opening -------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, model: EmbeddingModel | None = None
    ) -> EigenIndex:
        """Open an index for reading; nothing in the directory is changed.

        Args:
            path: the index directory, or a photo folder that has its index inside.
            model: if given, refused unless it is the model that the index was built with.

        Raises:
            NoIndex: if there is none.
            IndexMismatch: if the model or its preprocessing is another one.
            IndexCorrupt: if files are damaged.
        """
        folder = Path(path)
        if not (folder / "manifest.json").exists() and default_index_dir(folder).is_dir():
            folder = default_index_dir(folder)
        manifest = Manifest.read(folder)
        if model is not None:
            manifest.check(Manifest.of_model(model), "this model")
        with writing.damage(folder):
            catalog = Catalog.open(folder)
        try:
            index = cls(folder, manifest, catalog)
        except BaseException:
            catalog.close()
            raise
        if model is not None:
            index._fits = model.fingerprint(), model.basis
        return index

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        model: EmbeddingModel | Manifest,
        *,
        root: str | os.PathLike[str] | None = None,
    ) -> EigenIndex:
        """Make an empty index and open it.

        Args:
            path: a directory that is new or empty of an index.
            model: the model that its vectors will come from.
            root: the photo folder; may also be given by the first update.

        Raises:
            IndexExists: if there is an index already.
            IndexLocked: if another process is just creating it.
            OSError: if the directory cannot be written.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise writing.not_writable(error, folder) from None
        with writing.index_lock(folder):
            if (folder / "manifest.json").exists():
                raise IndexExists(
                    f"there is an index in {str(folder)!r} already; update it, or give another "
                    "directory"
                )
            manifest = model if isinstance(model, Manifest) else Manifest.of_model(model)
            with writing.damage(folder):
                Catalog.create(folder)
                with contextlib.closing(Catalog.open(folder, write=True)) as catalog:
                    if root is not None:
                        writing.set_root(catalog, folder, Path(root))
                    with catalog.writing():
                        catalog.set_meta("manifest", manifest.text())
            # Last: a directory without a manifest is no index, whatever else lies in it.
            manifest.write(folder)
            sync_folder(folder)
        return cls.open(folder, model=None if isinstance(model, Manifest) else model)

    def close(self) -> None:
        """Close the catalog; the vectors are unmapped when nobody uses them any more."""
        for catalog in (self._catalog, *self._retired):
            catalog.close()

    def refresh(self) -> bool:
        """Take over what a writer has published since; cheap if there is nothing.

        Returns:
            Whether there was something new.
        """
        with self._refreshing:
            if self._catalog.detached:
                if self._catalog_stamp() == self._stamp:
                    return False
                self._reopen_catalog()
            before, self._view = self._view, self._load_view(self._view)
            return self._view is not before

    def _reopen_catalog(self) -> None:
        stamp = self._catalog_stamp()
        with writing.damage(self.path):
            catalog = Catalog.open(self.path)
        # Another thread may still be reading from the old one.
        self._retired.append(self._catalog)
        if len(self._retired) > 2:
            self._retired.pop(0).close()
        self._catalog, self._stamp = catalog, stamp

    def _catalog_stamp(self) -> tuple:
        """Changes when the catalog's files do; for catalogs that are read without locks."""
        stamp = []
        for name in ("catalog.sqlite", "catalog.sqlite-wal"):
            with contextlib.suppress(OSError):
                info = os.stat(self.path / name)
                stamp.append((name, info.st_size, info.st_mtime_ns, info.st_ino))
        return tuple(stamp)

    def _load_view(self, previous: View | None) -> View:
        problem: Exception | None = None
        for _ in range(5):
            try:
                return self._load_once(previous)
            except writing.DAMAGE as error:
                raise writing.refusal(error, self.path) from None
            except FileNotFoundError as error:
                # A writer published a newer snapshot between the two looks: look again.
                problem = error
                if self._catalog.detached:
                    self._reopen_catalog()
            except SnapshotError as error:
                problem = error
                break
        raise writing.damaged(problem, self.path) from None

    def _load_once(self, previous: View | None) -> View:
        catalog, dim = self._catalog, self.dim
        with catalog.reading():
            generation = catalog.generation
            if previous is not None and previous.generation == generation:
                return previous
            stored = catalog.snapshot()
            current = catalog.pending_ids()
            known = previous.pending_seq if previous is not None else np.empty(0, np.int64)
            last = int(known[-1]) if len(known) else -1
            _, new_vectors = catalog.pending_vectors(last, dim)
            removed = catalog.removed_ids()
        snapshot = previous.snapshot if previous is not None else None
        if stored is None:
            snapshot = None
        elif snapshot is None or (snapshot.name, snapshot.ann_name) != stored[:2]:
            name, ann, digests = stored
            snapshot = Snapshot(self.path, name, ann, dim, Digests.unpack(digests))
        pending_seq, pending_ids = np.array(current, np.int64).reshape(-1, 2).T
        vectors = new_vectors
        if previous is not None and len(known):
            kept = np.isin(known, pending_seq, assume_unique=True)
            vectors = np.concatenate([previous.pending_vectors[kept], new_vectors])
        if len(vectors) != len(pending_ids):
            raise SnapshotError("pending vectors do not fit their ids")
        dead = np.empty(0, np.int64)
        if snapshot is not None:
            dead = np.unique(snapshot.positions(np.concatenate([removed, pending_ids])))
            dead = dead[dead >= 0]
        return View(generation, snapshot, dead, pending_seq, pending_ids, vectors)

    # --- what it holds -------------------------------------------------------------------------

    @property
    def manifest(self) -> dict[str, Any]:
        """What the index was built with: model, weights, preprocess, dim, created, format."""
        return self._manifest.as_dict()

    @property
    def dim(self) -> int:
        """r, length of the stored vectors."""
        return self._manifest.dim

    @property
    def root(self) -> Path | None:
        """The photo folder that paths are relative to."""
        return self._ask(lambda catalog: writing.read_root(catalog, self.path))

    def check_model(self, model: EmbeddingModel) -> None:
        """Refuse a model that the index was not built with.

        Raises:
            IndexMismatch: in one line, what differs and what to do.
        """
        asked = model.fingerprint(), model.basis
        if self._fits != asked:
            self._manifest.check(Manifest.of_model(model), "this model")
            self._fits = asked

    def __len__(self) -> int:
        """Number of searchable images."""
        return len(self._view)

    def entry(self, id_: int) -> Entry:
        """What the catalog knows of one file.

        Raises:
            KeyError: if that id was never given, or was compacted away.
            IndexCorrupt: if it cannot be read.
        """
        entries = self.entries_of([id_])
        if id_ not in entries:
            raise KeyError(f"no image has id {id_}")
        return entries[id_]

    def entries(self, state: str | None = None) -> Iterator[Entry]:
        """Catalog rows in id order, as this reader's state has them; by default all not deleted."""
        if state not in (None, "indexed", "skipped", "deleted"):
            raise ValueError(f"state must be indexed, skipped or deleted, got {state!r}")
        with writing.damage(self.path):
            yield from self._catalog.entries(state, self._view.generation)

    def entries_of(self, ids: Sequence[int] | np.ndarray) -> dict[int, Entry]:
        """Catalog rows by id, as this reader's state has them; ids without a row are left out.

        So are rows that were changed more than once since, or compacted away: only `refresh` tells
        what became of them.
        """
        view, wanted = self._view, [int(id_) for id_ in ids]
        found = self._ask(lambda catalog: catalog.by_id(wanted, view.generation))
        if len(found) < len(wanted):
            lost = np.array([id_ for id_ in wanted if id_ not in found], np.int64)
            lost = lost[view.holds(lost)]
            if len(lost) and self._ask(lambda catalog: catalog.generation) == view.generation:
                what = f"its catalog has no row of image {lost[0]}"
                raise writing.damaged(what, self.path)
        return found

    def _ask(self, question: Callable[[Catalog], Any]) -> Any:
        """What the catalog answers, with SQLite's errors as ours."""
        try:
            return question(self._catalog)
        except writing.DAMAGE as error:
            raise writing.refusal(error, self.path) from None

    def skipped(self) -> list[Entry]:
        """Files that are not searchable, with the reason in `error`."""
        return list(self.entries("skipped"))

    def file(self, id_: int) -> Path:
        """Full path of an image.

        Raises:
            KeyError: if there is no such id.
            ValueError: if the index has no photo folder.
        """
        root = self.root
        if root is None:
            raise ValueError("the index does not know its photo folder; run an update with it")
        return root / self.entry(id_).path

    def ids(self) -> npt.NDArray[np.int64]:
        """(N,) ids of all searchable images, ascending."""
        return self._view.ids()

    def vectors(self, ids: Sequence[int] | np.ndarray) -> npt.NDArray[np.float32]:
        """Stored vectors, (N, r), unit norm.

        Raises:
            KeyError: if an id is not searchable.
            IndexCorrupt: if a vector is not what was written.
        """
        wanted = np.asarray(ids, np.int64).reshape(-1)
        vectors, found = self._view.find(wanted)
        if not found.all():
            raise KeyError(f"no searchable image has id {int(wanted[~found][0])}")
        return vectors

    def moments(self, sample: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
        """Mean (r,) and covariance (r, r) of the stored vectors, float64.

        Kept until the next change. Above `sample` images an even choice of them stands for all.
        """
        view = self._view
        if self._moments is not None and self._moments[0] is view:
            return self._moments[1]
        ids = self.ids()
        ids = ids[:: max(1, -(-len(ids) // sample))]
        total, products = np.zeros(self.dim), np.zeros((self.dim, self.dim))
        for start in range(0, len(ids), 8192):
            block = view.find(ids[start : start + 8192])[0].astype(np.float64)
            total += block.sum(0)
            products += block.T @ block
        count = max(len(ids), 1)
        mean = total / count
        result = mean, products / count - np.outer(mean, mean)
        self._moments = view, result
        return result

    def sample(self, count: int) -> npt.NDArray[np.float32]:
        """Stored vectors of an even choice of at most `count` images, (N, r), in id order.

        Kept until the next change.
        """
        view, kept = self._view, self._samples
        if kept is None or kept[0] is not view:
            kept = self._samples = view, {}
        if count not in kept[1]:
            ids = self.ids()
            chosen = ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64)]
            kept[1][count] = view.find(chosen)[0]
        return kept[1][count]

    def stats(self) -> dict[str, Any]:
        """Counts, sizes and origin, fit for JSON."""
        view = self._view
        counts = self._ask(Catalog.counts)
        root = self.root
        return {
            "path": str(self.path),
            "root": str(root) if root is not None else None,
            "model": self._manifest.model,
            "weights": self._manifest.weights,
            "preprocess": self._manifest.preprocess,
            "dim": self.dim,
            "precision": self._manifest.precision,
            "created": self._manifest.created,
            "format": self._manifest.format,
            "images": len(view),
            **counts,
            **self._ask(writing.kept_stats),
            "pending": len(view.pending_ids),
            "ann": view.snapshot is not None and view.snapshot.has_ann,
            "bytes": writing.size_of(self.path),
        }

    # --- searching -----------------------------------------------------------------------------

    def search(
        self,
        q: npt.ArrayLike,
        k: int = 20,
        *,
        delta: npt.ArrayLike | None = None,
        ids: Sequence[int] | np.ndarray | None = None,
    ) -> list[tuple[int, float]]:
        """The k images that score best: by inner product, or exactly under a changed spectrum.

        Args:
            q: (r,) query in eigen-coordinates.
            k: number of results, fewer if there are not so many.
            delta: (r,) changed spectrum over base spectrum; score = (delta*q).v / |delta*v|.
            ids: if given, only these images are ranked; unknown ids are passed over.

        Returns:
            (id, score), best first, equal scores in the order of their ids.

        Raises:
            ValueError: if q, delta or k do not fit.
            IndexCorrupt: if vectors that are to be ranked are not what was written.
        """
        found, scores = self.search_arrays(q, k, delta=delta, ids=ids)
        return list(zip(found.tolist(), scores.tolist(), strict=True))

    def search_arrays(
        self,
        q: npt.ArrayLike,
        k: int = 20,
        *,
        delta: npt.ArrayLike | None = None,
        ids: Sequence[int] | np.ndarray | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """`search` with (K,) ids and (K,) scores as arrays."""
        query = self._row(q, "q")
        ratio = self._row(delta, "delta") if delta is not None else None
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        view = self._view
        if ids is not None:
            chosen = np.unique(np.asarray(ids, np.int64).reshape(-1))
            vectors, found = view.find(chosen)
            parts = [(chosen[found], _score(query, vectors[found], ratio))]
        else:
            parts = [(view.pending_ids, _score(query, view.pending_vectors, ratio))]
            if view.snapshot is not None and len(view.snapshot):
                parts.append(self._search_snapshot(view, view.snapshot, query, k, ratio))
        all_ids = np.concatenate([part[0] for part in parts])
        all_scores = np.concatenate([part[1] for part in parts])
        if len(all_ids) > 4 * k:
            # Everything that ties with the k-th best stays in.
            bound = -np.partition(-all_scores, k - 1)[k - 1]
            keep = all_scores >= bound
            all_ids, all_scores = all_ids[keep], all_scores[keep]
        order = np.lexsort((all_ids, -all_scores))[:k]
        return all_ids[order], all_scores[order]

    def _search_snapshot(
        self, view: View, snapshot: Snapshot, q: np.ndarray, k: int, delta: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of the rows of the snapshot among which the k best are."""
        rows = self._candidates(view, snapshot, q, k, delta)
        if rows is None:
            if delta is None:
                rows, scores = snapshot.exact(q, k, view.dead)
                return snapshot.ids[rows], scores
            # A fast scan in float32 finds them, with a margin for its rounding.
            rough = snapshot.scan(q, delta)
            rough[view.dead] = -np.inf
            count = min(k + 100, len(rough) - len(view.dead))
            rows = np.sort(np.argpartition(-rough, max(count - 1, 0))[:count])
        return snapshot.ids[rows], _score(q, snapshot.take(rows), delta)

    def _candidates(
        self, view: View, snapshot: Snapshot, q: np.ndarray, k: int, delta: np.ndarray | None
    ) -> np.ndarray | None:
        """Positions that the ANN proposes, or None where only a full scan will do."""
        if not snapshot.has_ann or (delta is not None and _log_spread(delta) > _ANN_LOG_SPREAD):
            return None
        # Deleted images still have their codes: ask for as many more.
        wanted = max(self.ann_candidates, 10 * k) + min(len(view.dead), len(snapshot) // 10)
        if wanted > len(snapshot) // 4:
            return None
        # Under a changed spectrum the unchanged query proposes better than the changed one, which
        # sees the numerator of the score alone; both together do best.
        directions = [q] if delta is None else [q, q * delta]
        rows = np.unique(np.concatenate([snapshot.propose(each, wanted) for each in directions]))
        rows = rows[~np.isin(rows, view.dead)]
        return rows if len(rows) >= k else None

    def _row(self, values: npt.ArrayLike, name: str) -> np.ndarray:
        row = np.asarray(values, np.float32)
        if row.shape != (self.dim,):
            raise ValueError(
                f"{name} must have shape ({self.dim},), got {row.shape}: is it from the model "
                f"{self._manifest.model} that the index was built with?"
            )
        if not np.isfinite(row).all():
            raise ValueError(f"{name} holds NaN or infinity")
        return row

    # --- changing ------------------------------------------------------------------------------

    def _writer(self) -> Writer:
        return Writer(self.path, self._manifest, ann_from=self.ann_from)

    def update(
        self,
        root: str | os.PathLike[str] | None,
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
        """Bring the index up to date with the photo folder; see `retrieval.index.update.update`."""
        from retrieval.index.update import update

        self.check_model(model)
        try:
            with self._writer() as writer:
                return update(
                    writer,
                    writer.root() if root is None else Path(root),
                    model,
                    progress=progress,
                    batch_size=batch_size,
                    workers=workers,
                    on_skip=on_skip,
                    exclude=exclude,
                    prune=prune,
                    max_pixels=max_pixels,
                )
        finally:
            self.refresh()

    def remove(self, ids: Sequence[int] | np.ndarray) -> int:
        """Take images out of the index; a file that still exists returns at the next update.

        Their vectors are kept for 30 days, as those of deleted files are.

        Returns:
            How many there were.
        """
        with self._writer() as writer:
            found = [entry for id_ in ids if (entry := writer.catalog.entry(int(id_))) is not None]
            found = [entry for entry in found if entry.state != "deleted"]
            with writer.guard(), writer.catalog.writing():
                writer.delete(entry.id for entry in found)
            writer.publish()
        self.refresh()
        return len(found)

    def compact(self, *, drop_deleted: bool = False) -> None:
        """Rewrite the files without what was deleted more than 30 days ago; its ids are forgotten.

        Args:
            drop_deleted: drop what was deleted since, too.
        """
        with self._writer() as writer, writer.guard():
            writer.compact(drop_deleted=drop_deleted)
        self.refresh()

    def export_parquet(self, path: str | os.PathLike[str]) -> int:
        """Write ids, paths and vectors; see `retrieval.index.parquet.export_parquet`."""
        self.refresh()
        return export_parquet(self.manifest, self._blocks(), path)

    def _blocks(self) -> Iterator[tuple[list[Entry], np.ndarray]]:
        ids = self.ids()
        for start in range(0, len(ids), ROWS):
            part = ids[start : start + ROWS]
            rows = self.entries_of(part)
            # A writer may be at work: what it deleted since is left out.
            kept = [id_ for id_ in part.tolist() if id_ in rows and rows[id_].state == "indexed"]
            if kept:
                yield [rows[id_] for id_ in kept], self.vectors(kept)

    def import_parquet(self, path: str | os.PathLike[str]) -> int:
        """Add ids, paths and vectors; see `retrieval.index.parquet.import_parquet`."""
        try:
            with self._writer() as writer:
                return import_parquet(writer, path)
        finally:
            self.refresh()


def _log_spread(delta: np.ndarray) -> float:
    """How unlike a constant a spectrum change is; infinite with a zero or a change of sign."""
    if not (np.all(delta > 0) or np.all(delta < 0)):
        return np.inf
    return float(np.std(np.log(np.abs(delta))))


def _score(q: np.ndarray, vectors: np.ndarray, delta: np.ndarray | None) -> np.ndarray:
    if not len(vectors):
        return np.empty(0, np.float32)
    return np.asarray(eigen.scores(q, vectors, delta), np.float32)
