"""Snapshots: the FAISS files of an index, written once, opened by memory mapping.

`vectors-N.faiss` is a flat inner-product index with the images' ids, in id order. Above a size
where an exact scan would be felt, `ann-N.faiss` (short codes of the same vectors in the same order)
stands beside it and proposes candidates. Both are plain FAISS files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from enn_core.files.atomic import replacing

__all__ = ["Snapshot", "SnapshotError", "build_ann", "collect_strays", "gather", "write"]

faiss: Any = _faiss  # its type stubs do not know its Python layer

# Rows copied at a time where numpy must compute on the mapped file: FAISS's header leaves the
# vectors unaligned, and this many stay in the cache of one core.
CHUNK_ROWS = 512

# Vectors that the ANN's codes are learned from, and vectors coded at a time.
_TRAIN_ROWS = 20_000
_ADD_ROWS = 65_536
# Vectors copied at a time into a new snapshot.
_GATHER_ROWS = 16_384

# Spectra whose norms are remembered, 4 bytes per image each: those of the visitors of a moment.
_REMEMBERED_SPECTRA = 4

_PREFIXES = ("vectors-", "ann-")


class SnapshotError(RuntimeError):
    """A FAISS file that is missing, damaged or does not fit the catalog."""


class Snapshot:
    """An open snapshot: ids and vectors of every image in it, and perhaps the ANN beside it."""

    def __init__(self, folder: Path, name: str, ann: str | None, dim: int) -> None:
        """Map the files.

        Raises:
            FileNotFoundError: if a file is gone (a writer may have published a newer snapshot).
            SnapshotError: if a file is damaged or holds vectors of another length.
        """
        self.name = name
        self.ann_name = ann
        self._index = _read(folder / name)
        flat = getattr(self._index, "index", None)
        if flat is None or self._index.d != dim:
            raise SnapshotError(f"{name} holds no vectors of length {dim}")
        self._flat = faiss.downcast_index(flat)
        self.ids: np.ndarray = faiss.vector_to_array(self._index.id_map)
        rows = len(self.ids)
        if rows != self._flat.ntotal or np.any(np.diff(self.ids) <= 0):
            raise SnapshotError(f"{name} is damaged: its ids do not fit its vectors")
        self.vectors: np.ndarray = faiss.rev_swig_ptr(self._flat.get_xb(), rows * dim).reshape(
            rows, dim
        )
        self.vectors.flags.writeable = False
        self._norms: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._norms_lock = threading.Lock()
        self._ann: Any = None
        if ann is not None:
            self._ann = _read(folder / ann)
            if self._ann.d != dim or self._ann.ntotal != rows:
                raise SnapshotError(f"{ann} does not fit {name}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_ann(self) -> bool:
        return self._ann is not None

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Row of each id, -1 where the snapshot does not hold it."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        found = np.searchsorted(self.ids, ids)
        found[found == len(self.ids)] = 0
        return np.where(self.ids[found] == ids, found, -1)

    def exact(self, q: np.ndarray, k: int, dead: np.ndarray) -> tuple[np.ndarray, ...]:
        """The k best rows by inner product, ties at the end of the list included.

        Args:
            q: (r,) float32.
            k: number of results.
            dead: (D,) positions that do not count.

        Returns:
            positions and scores; at least k of them if there are, more on ties.
        """
        scores = self._products(np.ascontiguousarray(q, np.float32))
        scores[dead] = -np.inf
        k = min(k, len(scores) - len(dead))
        if k < 1:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        rows = np.flatnonzero(scores >= -np.partition(-scores, k - 1)[k - 1])
        return rows, scores[rows]

    def _products(self, q: np.ndarray) -> np.ndarray:
        """(N,) inner products with q (r,), in this thread: memory is what the scan waits for.

        FAISS's own search shares the work between threads, which in one process with torch's
        costs more than it saves: 40 against 17 ms for 100,000 vectors after a text was encoded.
        """
        scores = np.empty(len(self), np.float32)
        faiss.fvec_inner_products_ny(
            faiss.swig_ptr(scores),
            faiss.swig_ptr(q),
            self._flat.get_xb(),
            self.dim,
            len(self),
        )
        return scores

    @property
    def dim(self) -> int:
        return self._index.d

    def propose(self, q: np.ndarray, count: int) -> np.ndarray:
        """Positions of the `count` rows that the ANN finds closest to q (r,), in any order."""
        query = np.ascontiguousarray(q[None], dtype=np.float32)
        _, rows = self._ann.search(query, min(count, len(self)))
        return rows[0][rows[0] >= 0]

    def scan(self, q: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """Scores (N,) of every row under a changed spectrum, in float32.

        The norms under a spectrum are computed once: later scans cost as much as an unchanged one.

        Args:
            q: (r,) float32.
            delta: (r,) float32; only its direction matters.
        """
        # Scaled, so that squares neither over- nor underflow.
        ratio = delta / max(float(np.abs(delta).max()), np.finfo(np.float32).tiny)
        weighted = np.ascontiguousarray(q * ratio, np.float32)
        norms = self._known_norms(ratio)
        if norms is None:
            scores, norms = self._scan_with_norms(weighted, ratio)
            self._remember_norms(ratio, norms)
        else:
            scores = self._products(weighted)
        np.divide(scores, norms, out=scores, where=norms > 0)
        scores[norms == 0] = 0
        return scores

    def _scan_with_norms(self, q: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inner products with q and norms under a spectrum, (N,) each, in one pass."""
        squares = ratio * ratio
        rows = min(CHUNK_ROWS, len(self))
        block, squared = np.empty((2, rows, self.dim), np.float32)
        scores, norms = np.empty((2, len(self)), np.float32)
        for start in range(0, len(self), CHUNK_ROWS):
            part = self.vectors[start : start + CHUNK_ROWS]
            count = len(part)
            np.copyto(block[:count], part)
            np.multiply(block[:count], block[:count], out=squared[:count])
            np.sqrt(squared[:count] @ squares, out=norms[start : start + count])
            np.matmul(block[:count], q, out=scores[start : start + count])
        return scores, norms

    def _known_norms(self, ratio: np.ndarray) -> np.ndarray | None:
        with self._norms_lock:
            norms = self._norms.get(ratio.tobytes())
            if norms is not None:
                self._norms.move_to_end(ratio.tobytes())
            return norms

    def _remember_norms(self, ratio: np.ndarray, norms: np.ndarray) -> None:
        with self._norms_lock:
            self._norms[ratio.tobytes()] = norms
            while len(self._norms) > _REMEMBERED_SPECTRA:
                self._norms.popitem(last=False)


def _read(path: Path, *, map_file: bool = True) -> Any:
    """Open a FAISS file, by memory mapping or as a copy that can be changed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        name = os.fspath(path)
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            # FAISS takes UTF-8 names only; the kernel knows the open file by another one.
            name = f"/proc/self/fd/{descriptor}"
        try:
            return faiss.read_index(name, faiss.IO_FLAG_MMAP_IFC if map_file else 0)
        except RuntimeError as error:
            if not path.exists():  # deleted by a writer since it was opened above
                raise FileNotFoundError(errno.ENOENT, "deleted", str(path)) from None
            reason = str(error).strip().splitlines()[-1][:200]
            raise SnapshotError(f"{path.name} is damaged: {reason}") from None
    finally:
        os.close(descriptor)


def gather(source: np.ndarray, old: np.ndarray, new: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of the vectors at positions (N,) in (old, new), (M, dim) and (K, dim)."""
    for start in range(0, len(source), _GATHER_ROWS):
        part = source[start : start + _GATHER_ROWS]
        block = np.empty((len(part), new.shape[1]), np.float32)
        from_old = part < len(old)
        block[from_old] = old[part[from_old]]
        block[~from_old] = new[part[~from_old] - len(old)]
        yield block


def write(folder: Path, name: str, ids: np.ndarray, blocks: Iterable[np.ndarray], dim: int) -> None:
    """Write a flat snapshot; it is complete on disk when this returns, or not there at all.

    Args:
        folder: the index directory.
        name: file name, `vectors-N.faiss`.
        ids: (N,) int64, ascending.
        blocks: the N vectors in that order, in blocks of (rows, dim) float32.
        dim: r.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
    start = 0
    for block in blocks:
        stop = start + len(block)
        index.add_with_ids(
            np.ascontiguousarray(block, np.float32), np.ascontiguousarray(ids[start:stop], np.int64)
        )
        start = stop
    _write(index, folder, name)


def build_ann(folder: Path, name: str, snapshot: Snapshot) -> None:
    """Write the ANN of a flat snapshot: 4-bit codes of pairs of coordinates, in the same order.

    All codes are scanned for every query. Inverted lists would skip most of them, but texts lie far
    from images in every embedding: an eighth of the lists held 96 % of captions' ten best images
    with one model and 58 % with another; the best 1 % by these codes 99.97 % and 94 %
    (benchmarks/ann_recall.py). At a million images the candidates are far enough into the tail.

    Args:
        folder: the index directory.
        name: file name, `ann-N.faiss`.
        snapshot: what it is built for.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    pairs = snapshot.dim // 2 if snapshot.dim % 2 == 0 else snapshot.dim
    index = faiss.index_factory(snapshot.dim, f"PQ{pairs}x4fs", faiss.METRIC_INNER_PRODUCT)
    step = max(1, len(snapshot) // _TRAIN_ROWS)
    index.train(np.ascontiguousarray(snapshot.vectors[::step]))
    for start in range(0, len(snapshot), _ADD_ROWS):
        index.add(np.array(snapshot.vectors[start : start + _ADD_ROWS]))
    _write(index, folder, name)


def _write(index: Any, folder: Path, name: str) -> None:
    # Python's file object: any path works, and a full disk is an OSError.
    with replacing(folder / name) as new, open(new, "wb") as file:
        writer = faiss.PyCallbackIOWriter(file.write)
        faiss.write_index(index, writer)
        del writer


def collect_strays(folder: Path, keep: Iterable[str | None]) -> None:
    """Delete snapshot files that are not current: older ones and what a killed writer left."""
    current = set(keep)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIXES) and entry.name not in current:
                # A reader on Windows may still hold it; the next writer tries again.
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
