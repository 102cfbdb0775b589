"""Snapshots: the FAISS files of an index, written once, opened by memory mapping.

`vectors-N.faiss` is a flat inner-product index with the images' ids, in id order. Above a size
where an exact scan would be felt, `ann-N.faiss` (short codes of the same vectors in the same order)
stands beside it and proposes candidates. Both are plain FAISS files.

Their digests lie in the catalog. Each part is compared with its own when it is first read: the ids,
every block of vectors, the ANN whole. What does not fit is neither ranked nor copied.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import xxhash

from enn_core.files.atomic import replacing
from retrieval.index.catalog import UNIT_TOLERANCE
from retrieval.index.manifest import IndexCorrupt, repair_command

__all__ = [
    "BLOCK_ROWS",
    "Digests",
    "Snapshot",
    "SnapshotError",
    "View",
    "build_ann",
    "collect_strays",
    "gather",
    "write",
]

faiss: Any = _faiss  # its type stubs do not know its Python layer

# Rows copied at a time where numpy must compute on the mapped file: FAISS's header leaves the
# vectors unaligned, and this many stay in the cache of one core.
CHUNK_ROWS = 512

# Vectors that the ANN's codes are learned from, and vectors coded at a time.
_TRAIN_ROWS = 20_000
_ADD_ROWS = 65_536
# Vectors copied at a time into a new snapshot.
_GATHER_ROWS = 16_384

BLOCK_ROWS = 256
"""Vectors that have a digest together."""
_BYTES = 16  # of a digest, XXH3 of 128 bits

# Spectra whose norms are remembered, 4 bytes per image each: those of the visitors of a moment.
_REMEMBERED_SPECTRA = 4

_PREFIXES = ("vectors-", "ann-")


class SnapshotError(RuntimeError):
    """A FAISS file that is missing, damaged or does not fit the catalog."""


@dataclass(frozen=True)
class Digests:
    """What the files of a snapshot hold.

    Attributes:
        ids: digest of all ids.
        blocks: those of the blocks of vectors, one after the other.
        ann: that of the ANN's file, b"" if there is none.
        packed: all of these, as the catalog keeps them.
    """

    ids: bytes
    blocks: bytes
    ann: bytes = b""
    packed: bytes = field(init=False)

    def __post_init__(self) -> None:
        packed = self.ids + self.ann.ljust(_BYTES, b"\0") + self.blocks
        object.__setattr__(self, "packed", packed)

    @classmethod
    def of(cls, ids: np.ndarray, vectors: np.ndarray, ann: bytes = b"") -> Digests:
        """Those of (N,) int64 ids and (N, r) float32 vectors."""
        starts = range(0, len(vectors), BLOCK_ROWS)
        blocks = [_digest(vectors[start : start + BLOCK_ROWS]) for start in starts]
        return cls(_digest(np.ascontiguousarray(ids, "<i8")), b"".join(blocks), ann)

    @classmethod
    def unpack(cls, packed: bytes | None) -> Digests | None:
        """From `packed`; None of None."""
        if packed is None:
            return None
        ann = packed[_BYTES : 2 * _BYTES]
        return cls(packed[:_BYTES], packed[2 * _BYTES :], ann if any(ann) else b"")


def _digest(data: Any) -> bytes:
    return xxhash.xxh3_128_digest(data)


class Snapshot:
    """An open snapshot: ids and vectors of every image in it, and perhaps the ANN beside it."""

    def __init__(
        self, folder: Path, name: str, ann: str | None, dim: int, digests: Digests | None = None
    ) -> None:
        """Map the files.

        Args:
            folder: the index directory.
            name, ann: of the files.
            dim: r.
            digests: of what they hold; without, vectors are only held to be of unit norm.

        Raises:
            FileNotFoundError: if a file is gone (a writer may have published a newer snapshot).
            SnapshotError: if the vectors' file is damaged or holds vectors of another length. Of a
                damaged ANN a UserWarning tells.
        """
        self.name = name
        self.ann_name = ann
        self.digests = digests
        self._folder = folder
        self._index = _read(folder / name)
        flat = getattr(self._index, "index", None)
        if flat is None or self._index.d != dim:
            raise SnapshotError(f"{name} holds no vectors of length {dim}")
        self._flat = faiss.downcast_index(flat)
        self.ids: np.ndarray = faiss.vector_to_array(self._index.id_map)
        rows = len(self.ids)
        if rows != self._flat.ntotal or np.any(np.diff(self.ids) <= 0):
            raise SnapshotError(f"{name} is damaged: its ids do not fit its vectors")
        blocks = -(-rows // BLOCK_ROWS)
        if digests is not None and (
            digests.ids != _digest(self.ids) or len(digests.blocks) != blocks * _BYTES
        ):
            raise SnapshotError(f"{name} is damaged, or of another index: its ids are others")
        self.vectors: np.ndarray = faiss.rev_swig_ptr(self._flat.get_xb(), rows * dim).reshape(
            rows, dim
        )
        self.vectors.flags.writeable = False
        self._sound = np.zeros(blocks, bool)
        self._left = blocks
        self._norms: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._norms_lock = threading.Lock()
        self._ann: Any = None
        if ann is not None:
            try:
                self._ann = read_ann(folder / ann, rows, dim, digests)
            except SnapshotError as error:
                # It only proposes: an exact scan answers as well, later.
                warnings.warn(
                    f"{str(folder / ann)!r} is damaged ({error}): searches are exact without it, "
                    f"and slower; {repair_command(folder)} makes it again",
                    stacklevel=2,
                )

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors (N, r) of some rows, checked.

        Raises:
            IndexCorrupt: if a block of theirs is damaged.
        """
        self.check(rows)
        return self.vectors[rows]

    def check(self, rows: np.ndarray | None = None) -> None:
        """See that vectors are what was written; each block is looked at once.

        Args:
            rows: positions of those that are to be read, all by default.

        Raises:
            IndexCorrupt: naming the file and the rows that are damaged.
        """
        if not self._left:
            return
        bad = self.damaged(rows)
        if len(bad):
            first, last = bad[0] * BLOCK_ROWS, min((bad[-1] + 1) * BLOCK_ROWS, len(self))
            count = sum(min(BLOCK_ROWS, len(self) - block * BLOCK_ROWS) for block in bad.tolist())
            raise IndexCorrupt(
                f"{str(self._folder / self.name)!r} is damaged: {len(bad)} of its blocks, between "
                f"rows {first} and {last}, with the vectors of {count} images; "
                f"{repair_command(self._folder)} computes these again"
            )

    def damaged(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Blocks that are not what was written, (B,) int64, among those of some rows or all."""
        blocks = np.arange(len(self._sound))
        if rows is not None:
            blocks = np.unique(np.asarray(rows, np.int64) // BLOCK_ROWS)
        todo = blocks[~self._sound[blocks]]
        sound = np.array([self._is_sound(block) for block in todo.tolist()], bool)
        self._sound[todo[sound]] = True
        self._left = len(self._sound) - int(self._sound.sum())
        return todo[~sound]

    def _is_sound(self, block: int) -> bool:
        vectors = self.vectors[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
        return self.is_written(block, vectors) if self.digests else not len(not_unit(vectors))

    def is_written(self, block: int, vectors: np.ndarray) -> bool:
        """Whether vectors (M, r) are those that a block was written with."""
        if self.digests is None:
            return False
        return _digest(vectors) == self.digests.blocks[block * _BYTES : (block + 1) * _BYTES]

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

        Raises:
            IndexCorrupt: if vectors are damaged.
        """
        self.check()
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
        self.check()
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


@dataclass(frozen=True)
class View:
    """One state of the index, as a reader searches it."""

    generation: int
    snapshot: Snapshot | None
    dead: np.ndarray  # (D,) int64, positions in the snapshot that do not count, ascending
    pending_seq: np.ndarray  # (M,) int64, ascending
    pending_ids: np.ndarray  # (M,) int64, in the same order
    pending_vectors: np.ndarray  # (M, r) float32

    def __len__(self) -> int:
        rows = len(self.snapshot) if self.snapshot is not None else 0
        return rows - len(self.dead) + len(self.pending_ids)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Which of the ids (N,) can be found, (N,) bool."""
        found = np.isin(ids, self.pending_ids)
        if self.snapshot is not None:
            rows = self.snapshot.positions(ids)
            found |= (rows >= 0) & ~np.isin(rows, self.dead)
        return found

    def ids(self) -> np.ndarray:
        """(N,) int64 ids of all images that can be found, ascending."""
        held = [] if self.snapshot is None else [np.delete(self.snapshot.ids, self.dead)]
        return np.sort(np.concatenate([self.pending_ids, *held]))

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, r) vectors and (N,) bool which of them there are; the others hold anything.

        Raises:
            IndexCorrupt: if a vector is not what was written.
        """
        out = np.empty((len(ids), self.pending_vectors.shape[1]), np.float32)
        found = np.zeros(len(ids), bool)
        if self.snapshot is not None:
            rows = self.snapshot.positions(ids)
            found = (rows >= 0) & ~np.isin(rows, self.dead)
            out[found] = self.snapshot.take(rows[found])
        if len(self.pending_ids):
            order = np.argsort(self.pending_ids)
            ordered = self.pending_ids[order]
            place = np.minimum(np.searchsorted(ordered, ids), len(order) - 1)
            pending = ordered[place] == ids
            out[pending] = self.pending_vectors[order[place[pending]]]
            found |= pending
        return out, found


def file_digest(path: Path) -> bytes:
    """That of a whole file; OSError if it cannot be read."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""  # which cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _digest(data)


def not_unit(vectors: np.ndarray) -> np.ndarray:
    """Positions (B,) of vectors (N, r) that are not of unit norm, NaN among them."""
    norms = np.empty(len(vectors), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(vectors), _GATHER_ROWS):
            part = slice(start, start + _GATHER_ROWS)
            norms[part] = np.linalg.norm(vectors[part], axis=1)
        return np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))


def read_ann(path: Path, rows: int, dim: int, digests: Digests | None) -> Any:
    """Open the ANN of a snapshot of so many rows.

    Raises:
        FileNotFoundError: if it is gone.
        SnapshotError: if it is damaged, or another snapshot's.
    """
    # Before FAISS reads it: what it makes of damaged lengths may be a crash.
    if digests is not None and digests.ann != file_digest(path):
        raise SnapshotError("it is not what was written")
    ann = _read(path)
    if ann.d != dim or ann.ntotal != rows:
        raise SnapshotError("it does not fit the vectors")
    return ann


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
        except (RuntimeError, MemoryError) as error:  # the second of a damaged length
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


def write(
    folder: Path, name: str, ids: np.ndarray, blocks: Iterable[np.ndarray], dim: int
) -> Digests:
    """Write a flat snapshot; it is complete on disk when this returns, or not there at all.

    Args:
        folder: the index directory.
        name: file name, `vectors-N.faiss`.
        ids: (N,) int64, ascending.
        blocks: the N vectors in that order, in blocks of (rows, dim) float32.
        dim: r.

    Returns:
        The digests of what was to be written.

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
    flat = faiss.downcast_index(index.index)
    vectors = faiss.rev_swig_ptr(flat.get_xb(), len(ids) * dim).reshape(len(ids), dim)
    digests = Digests.of(ids, vectors)
    _write(index, folder, name)
    return digests


def build_ann(folder: Path, name: str, snapshot: Snapshot) -> bytes:
    """Write the ANN of a flat snapshot: 4-bit codes of pairs of coordinates, in the same order.

    All codes are scanned for every query. Inverted lists would skip most of them, but texts lie far
    from images in every embedding: an eighth of the lists held 96 % of captions' ten best images
    with one model and 58 % with another; the best 1 % by these codes 99.97 % and 94 %
    (benchmarks/ann_recall.py). At a million images the candidates are far enough into the tail.

    Args:
        folder: the index directory.
        name: file name, `ann-N.faiss`.
        snapshot: what it is built for.

    Returns:
        The digest of the file.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    snapshot.check()
    pairs = snapshot.dim // 2 if snapshot.dim % 2 == 0 else snapshot.dim
    index = faiss.index_factory(snapshot.dim, f"PQ{pairs}x4fs", faiss.METRIC_INNER_PRODUCT)
    step = max(1, len(snapshot) // _TRAIN_ROWS)
    index.train(np.ascontiguousarray(snapshot.vectors[::step]))
    for start in range(0, len(snapshot), _ADD_ROWS):
        index.add(np.array(snapshot.vectors[start : start + _ADD_ROWS]))
    digest = xxhash.xxh3_128()
    _write(index, folder, name, digest.update)
    return digest.digest()


def _write(
    index: Any, folder: Path, name: str, saw: Callable[[bytes], object] | None = None
) -> None:
    # Python's file object: any path works, and a full disk is an OSError.
    with replacing(folder / name) as new, open(new, "wb") as file:

        def put(data: bytes) -> int:
            if saw is not None:
                saw(data)
            return file.write(data)

        writer = faiss.PyCallbackIOWriter(put if saw is not None else file.write)
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
