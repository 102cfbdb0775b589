"""What is damaged in an index, and putting it right.

Checking only reads. A repair keeps every row and vector whose checksum fits, and computes the
others again from their pictures; what it cannot know it says, and leaves to the next update.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from enn_core.files.digests import Damage
from retrieval.images import MAX_BYTES, ImageError, decode_with_size, read_stable
from retrieval.index import snapshot as snapshots
from retrieval.index.catalog import FILE_NAME, Catalog, Entry, row_sum
from retrieval.index.manifest import FILE_NAME as MANIFEST
from retrieval.index.manifest import (
    EmbeddingModel,
    IndexCorrupt,
    IndexMismatch,
    Manifest,
    NoIndex,
    repair_command,
)
from retrieval.index.schema import FORMAT, IMAGE, KEPT, PENDING, PROTECTED, TOTALS
from retrieval.index.snapshot import Digests, Snapshot, SnapshotError
from retrieval.index.writer import DAMAGE, Writer, index_lock, is_gone

__all__ = ["check_index", "repair_index"]

Progress = Callable[[int, int], None]

_COLUMNS = {"images": IMAGE, "pending": PENDING, "removed": "id", "kept": KEPT}
_BATCH = 500
_MODEL_BATCH = 32
# Numbers of one picture in different batches differ by less than this.
_ROUNDING = 1e-6
# Values next to a computed one that are tried, and combinations of such.
_STEPS = 64
_TRIES = 20_000
_STATE, _CHANGED = 8, 10  # columns of `IMAGE`

_ANEW = "delete the index directory and index the folder again"
_LEFT = "its vector was damaged; `enn search index` computes it again"


@dataclass
class _Findings:
    """What is wrong, and what a repair needs to know of it."""

    folder: Path
    damage: list[Damage] = field(default_factory=list)
    manifest: Manifest | None = None
    restore: bool = False  # the manifest, from the catalog's copy
    hopeless: bool = False  # nothing can be done here
    tables: bool = False  # the definitions of the catalog's tables
    rebuild: bool = False  # the catalog, from its sound rows
    indexed: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    again: set[int] = field(default_factory=set)  # ids whose vectors are to be computed again
    name: str | None = None  # of the snapshot that can be read
    digests: Digests | None = None
    snapshot: Snapshot | None = None
    blocks: list[int] = field(default_factory=list)  # damaged ones of it, of known digests
    held: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # its ids
    no_snapshot: bool = False
    no_ann: bool = False

    def tell(self, name: str, part: str, lost: str, remedy: str | None = None) -> None:
        remedy = repair_command(self.folder) + (f" {remedy}" if remedy else "")
        self.damage.append(Damage(str(self.folder / name), part, lost, remedy))

    def give_up(self, name: str, lost: str, remedy: str = _ANEW) -> None:
        self.damage.append(Damage(str(self.folder / name), "", lost, remedy))
        self.hopeless = True


def check_index(folder: Path) -> list[Damage]:
    """What is damaged in an index; nothing is changed.

    Args:
        folder: the index directory, or a photo folder that has its index inside.

    Raises:
        NoIndex: if there is none.
    """
    return _examine(_inside(folder)).damage


def repair_index(
    folder: Path, load: Callable[[str], EmbeddingModel], progress: Progress | None = None
) -> list[Damage]:
    """Put right what can be; returns what was damaged, and whether it is repaired.

    Pictures whose files are not as they were are left to the next update.

    Args:
        folder: the index directory, or a photo folder that has its index inside.
        load: gives the model of a name; called only if vectors are to be computed again.
        progress: called with the pictures done and their total.

    Raises:
        NoIndex: if there is none.
        IndexLocked: if another process is writing it.
        IndexMismatch: if the model is not the index's.
        OSError: if the index cannot be written.
    """
    folder = _inside(folder)
    with index_lock(folder):
        found = _examine(folder)
        if not found.damage or found.hopeless or found.manifest is None:
            return found.damage
        if found.restore:  # first: what it says may decide how the model is loaded
            found.manifest.write(folder)
        model = load(found.manifest.model) if found.again else None
        if model is not None:
            found.manifest.check(Manifest.of_model(model), "this model")
        try:
            if found.tables:
                _mend_tables(folder / FILE_NAME)
            if found.rebuild:
                _rebuild(found)
        except DAMAGE as error:
            what = f"its sound rows cannot be saved ({_line(error)})"
            found.give_up(FILE_NAME, what)
            return found.damage
        entries = _drop_damaged(found)
    lost: list[str] = []
    with Writer(folder, found.manifest) as writer, writer.guard():
        if model is not None:
            lost = _embed(writer, entries, model, found, progress)
        if not (found.restore and len(found.damage) == 1):
            writer.publish(force=True)
    repaired = [replace(each, repaired=True, remedy="") for each in found.damage]
    left = _examine(folder).damage
    if lost:
        some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        what = f"their pictures are gone or not as they were, and cannot be found now: {some}"
        remedy = "`enn search index` looks at them again"
        left.append(Damage(str(folder), f"{len(lost)} images", what, remedy))
    return repaired + left


def _inside(folder: Path) -> Path:
    folder = Path(folder)
    inside = folder / ".enn-index"
    if is_gone(folder) and inside.is_dir():
        folder = inside
    if is_gone(folder):
        raise NoIndex(f"no index in {str(folder)!r}; build one with `enn search index`")
    return folder


# --- looking -------------------------------------------------------------------------------------


def _examine(folder: Path) -> _Findings:
    found = _Findings(folder)
    problem = _read_manifest(found)
    try:
        catalog = Catalog.open(folder)
    except IndexMismatch as error:
        found.give_up(FILE_NAME, str(error), "update the software")
        return found
    except (*DAMAGE, OSError) as error:
        what = f"it cannot be read ({_line(error)}): no image can be found"
        mended = _mended(folder)
        if mended is None:
            found.give_up(FILE_NAME, what)
            return found
        found.tell(FILE_NAME, "", what, "keeps the rows that can be read")
        found.tables = found.rebuild = True
        catalog = mended
    with closing(catalog):
        if problem and not found.hopeless:
            _find_manifest(found, catalog, problem)
        if not found.hopeless:
            _look_at_rows(found, catalog)
            _look_at_snapshot(found, catalog)
    return found


def _mended(folder: Path) -> Catalog | None:
    """A copy of a catalog with the definitions of its tables made anew; None if that is no help."""
    place = tempfile.mkdtemp(prefix="enn-catalog-")
    try:
        for name in (FILE_NAME, f"{FILE_NAME}-wal"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, Path(place) / name)
        _mend_tables(Path(place) / FILE_NAME)
        catalog = Catalog.open(Path(place))
    except (*DAMAGE, OSError, IndexMismatch):
        shutil.rmtree(place, ignore_errors=True)
        return None
    catalog.forget_on_close(place)
    return catalog


def _mend_tables(file: Path) -> None:
    """Write the definitions of a catalog's tables anew: they are the same in every catalog.

    Raises:
        sqlite3.Error, OSError: it is no catalog of today's format, or cannot be written.
    """
    with tempfile.TemporaryDirectory() as place:
        Catalog.create(Path(place))
        with closing(sqlite3.connect(Path(place) / FILE_NAME)) as new:
            known = new.execute("SELECT type, name, tbl_name, sql, rowid FROM sqlite_master")
            rows = known.fetchall()
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("PRAGMA writable_schema = ON")  # definitions that make no sense are passed over
        if db.execute("SELECT rowid FROM sqlite_master").fetchall() != [row[-1:] for row in rows]:
            raise sqlite3.DatabaseError("its tables are others")
        db.executemany(
            "UPDATE sqlite_master SET type = ?, name = ?, tbl_name = ?, sql = ? WHERE rowid = ?",
            rows,
        )


def _read_manifest(found: _Findings) -> str:
    try:
        found.manifest = Manifest.read(found.folder)
    except IndexMismatch as error:
        found.give_up(MANIFEST, str(error), "update the software")
    except NoIndex:
        return "it is missing"
    except IndexCorrupt:
        return "its content is not what was written"
    return ""


def _find_manifest(found: _Findings, catalog: Catalog, problem: str) -> None:
    try:
        text = catalog.meta("manifest")
        found.manifest = Manifest.from_dict(json.loads(str(text)))
    except (*DAMAGE, ValueError, IndexCorrupt):
        found.give_up(MANIFEST, f"{problem}: which model the vectors are of is not known")
        return
    found.restore = True
    found.tell(MANIFEST, "", f"{problem}; the catalog has a copy", "restores it")


def _look_at_rows(found: _Findings, catalog: Catalog) -> None:
    """The catalog: its structure, its single values and every row."""
    try:
        structure = [str(row[0]) for row in catalog.rows("PRAGMA integrity_check(10)")]
    except DAMAGE as error:
        structure = [_line(error)]
    if structure != ["ok"]:
        found.rebuild = True
        what = f"its structure is damaged ({_line(structure[0])})"
        found.tell(FILE_NAME, "", what, "keeps the rows that can be read")
    for key in PROTECTED:
        try:
            catalog.meta(key)
        except DAMAGE:
            found.rebuild = True
            what = "its value is not what was written"
            if key == "root":
                what += "; give the photo folder to `enn search index`"
            found.tell(FILE_NAME, key.replace("_", " "), what, "makes it again")
    bad: dict[str, list] = {table: [] for table in TOTALS}
    for table in TOTALS:
        count = total = 0
        for row, sound in _rows(catalog, table):
            count += 1
            if table == "pending":
                total += 3 * row[0] + row[1]
            elif table == "removed":
                total += row[0]
            else:
                total += row[-1] if isinstance(row[-1], int) else 0
            if not sound:
                bad[table].append(row)
            elif table == "images" and row[_STATE] == "indexed":
                found.indexed.add(row[0])
            elif table == "pending":
                found.pending.add(row[1])
        try:
            catalog.check_sum(table, count, total)
        except DAMAGE:
            found.rebuild = True
            what = "rows are missing or changed"
            if table == "images":
                what += "; their pictures cannot be found until `enn search index` adds them anew"
            found.tell(FILE_NAME, table, what, "goes on without them")
    if bad["images"]:
        numbers = _some([row[0] for row in bad["images"]])
        what = f"{len(bad['images'])} rows are not what was written: these pictures cannot be found"
        found.tell(FILE_NAME, f"images {numbers}", what, "drops them; the next update adds them")
    if bad["kept"]:
        what = f"{len(bad['kept'])} vectors of deleted pictures, computed again if these return"
        found.tell(FILE_NAME, "kept", what, "drops them")
    if bad["pending"]:
        ids = [row[1] for row in bad["pending"]]
        what = f"the vectors of {len(ids)} images are not what was written"
        found.tell(FILE_NAME, f"pending {_some(ids)}", what, "computes them again")
    found.rebuild |= any(map(bool, bad.values()))
    # Without its pending row an image has no vector, or an older one in the snapshot.
    found.again |= found.indexed & {row[1] for row in bad["pending"]}


def _look_at_snapshot(found: _Findings, catalog: Catalog) -> None:
    """The FAISS files, wholly."""
    folder, dim = found.folder, found.manifest.dim if found.manifest is not None else 0
    name, ann, packed = (_value(catalog, key) for key in ("snapshot", "ann", "digests"))
    # What damaged digests still fit is proved by that.
    found.digests = Digests.unpack(packed) if isinstance(packed, bytes) else None
    removed = {row[0] for row, _ in _rows(catalog, "removed")}
    names = [name] if isinstance(name, str) else []
    if _is_damaged(catalog, "snapshot"):
        names += sorted(path.name for path in folder.glob("vectors-*.faiss"))
    snapshot, problem = None, "its name is lost"
    for name in names:
        try:
            snapshot = Snapshot(folder, name, None, dim, found.digests)
            break
        except (FileNotFoundError, SnapshotError, ValueError) as error:
            problem = "is missing" if isinstance(error, FileNotFoundError) else _line(error)
    if snapshot is None:
        bad = found.indexed - found.pending - found.again
        if names or bad:
            found.no_snapshot = True
            found.again |= bad
            what = f"{problem}: the vectors of {len(bad)} images are lost"
            found.tell(names[0] if names else "vectors", "", what, "computes them again")
        return
    found.name, found.held, found.snapshot = snapshot.name, snapshot.ids, snapshot
    live = found.indexed - found.pending - removed
    if found.digests is None:
        positions = snapshots.not_unit(snapshot.vectors)
        blocks = np.unique(positions // snapshots.BLOCK_ROWS)
    else:
        blocks = snapshot.damaged()
        found.blocks = blocks.tolist()
        positions = np.flatnonzero(
            np.isin(np.arange(len(snapshot)) // snapshots.BLOCK_ROWS, blocks)
        )
    ids = live.intersection(snapshot.ids[positions].tolist())
    if len(blocks):
        found.again |= ids
        part = f"blocks {_some(blocks.tolist())} of {snapshots.BLOCK_ROWS} rows"
        what = f"the vectors of {len(ids)} images are not what was written"
        found.tell(snapshot.name, part, what, "computes them again")
    # Images that have no vector anywhere.
    held = set(snapshot.ids.tolist()) - removed
    bad = found.indexed - found.pending - found.again - held
    if bad:
        found.again |= bad
        found.tell(FILE_NAME, f"images {_some(sorted(bad))}", "they have no vector", "computes it")
    if isinstance(ann, str):
        try:
            snapshots.read_ann(folder / ann, len(snapshot), dim, found.digests)
        except (FileNotFoundError, SnapshotError):
            found.no_ann = True
            what = "it is not what was written; no image is lost with it"
            found.tell(ann, "", what, "makes it again")


def _rows(catalog: Catalog, table: str) -> Iterator[tuple[tuple, bool]]:
    """Every row of a table that can be read, as it is stored, and whether it is sound."""
    checked = table != "removed"
    key, columns = _COLUMNS[table].split(", ")[0], _COLUMNS[table] + (", crc" if checked else "")
    last: object = b"" if table == "kept" else -1
    select = f"SELECT {columns} FROM {table} WHERE {key}"
    while True:
        try:
            rows = catalog.rows(f"{select} > ? ORDER BY {key} LIMIT {_BATCH}", (last,))
            end = len(rows) < _BATCH
        except DAMAGE:
            if not isinstance(last, int):
                return
            rows, end = _one_by_one(catalog, select, last)
        for row in rows:
            sound = not checked or row_sum(*row[:-1]) == row[-1]
            if sound and table in ("pending", "kept"):
                vector = np.frombuffer(row[-2], "<f4")
                sound = not len(snapshots.not_unit(vector[None]))
            yield row, sound
        if end:
            return
        last = rows[-1][0] if len(rows) == _BATCH or not isinstance(last, int) else last + _BATCH


def _one_by_one(catalog: Catalog, select: str, last: int) -> tuple[list[tuple], bool]:
    """The rows of the next keys that can be read, and whether those are the last ones."""
    found: list[tuple] = []
    try:
        largest = catalog.max_id()
    except DAMAGE:
        largest = 0
    for key in range(last + 1, last + 1 + _BATCH):
        try:
            found += catalog.rows(f"{select} = ?", (key,))
        except DAMAGE:
            continue
    return found, last + _BATCH >= largest


def _value(catalog: Catalog, key: str) -> str | bytes | int | None:
    """A value of `meta`, sound or not; None if there is none."""
    try:
        rows = catalog.rows("SELECT value FROM meta WHERE key = ?", (key,))
    except DAMAGE:
        return None
    return rows[0][0] if rows else None


def _is_damaged(catalog: Catalog, key: str) -> bool:
    try:
        catalog.meta(key)
    except DAMAGE:
        return True
    return False


# --- putting right -------------------------------------------------------------------------------


def _rebuild(found: _Findings) -> None:
    """Make the catalog of a folder anew from its sound rows."""
    with tempfile.TemporaryDirectory(dir=found.folder, prefix="repair-") as place:
        Catalog.create(Path(place))
        with (
            closing(Catalog.open(found.folder)) as old,
            closing(Catalog.open(Path(place), write=True)) as new,
        ):
            generation, max_id = _value(old, "generation"), 0
            newest = generation if isinstance(generation, int) else 0
            with new.writing():
                for table in ("images", "pending", "kept"):
                    for rows in _batches(row for row, sound in _rows(old, table) if sound):
                        if table == "pending":  # of images whose rows are lost, too
                            rows = [row for row in rows if row[1] in found.indexed]
                        new.copy_rows(table, rows)
                        if table == "images":
                            newest = max([newest, *(row[_CHANGED] for row in rows)])
                            max_id = max([max_id, *(row[0] for row in rows)])
                gone = found.held[~np.isin(found.held, list(found.indexed))]
                new.copy_rows("removed", [(id_,) for id_ in gone.tolist()])
                steps = (f"format {number}" for number in range(2, FORMAT.number + 1))
                for key in (*PROTECTED, *steps):
                    if not _is_damaged(old, key) and (value := _value(old, key)) is not None:
                        new.set_meta(key, value)
                if found.manifest is not None:
                    new.set_meta("manifest", found.manifest.text())
                digests = found.digests.packed if found.digests is not None else None
                new.set_meta("snapshot", found.name)
                new.set_meta("digests", digests if found.name is not None else None)
                new.set_meta("snapshot_number", _number(found.folder))
                if found.name is None or _is_damaged(old, "ann"):
                    new.set_meta("ann", None)
                held = int(found.held.max()) if len(found.held) else 0
                new.go_on_from(newest, max(max_id, held, _largest(old)))
            new.overwrite(found.folder)


def _largest(catalog: Catalog) -> int:
    try:
        return catalog.max_id()
    except DAMAGE:
        return 0


def _number(folder: Path) -> int:
    """The largest number of a snapshot's file."""
    names = (path.stem.rpartition("-")[2] for path in folder.glob("*-*.faiss"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _drop_damaged(found: _Findings) -> list[Entry]:
    """Leave what must be computed again without a vector, for an update if this is killed."""
    with closing(Catalog.open(found.folder, write=True)) as catalog, catalog.writing():
        entries = list(catalog.by_id(sorted(found.again)).values())
        if found.no_snapshot:
            catalog.set_meta("snapshot", None)
            catalog.set_meta("digests", None)
        if found.no_snapshot or found.no_ann:
            catalog.set_meta("ann", None)
        for entry in entries:
            catalog.put(replace(entry, state="skipped", error=_LEFT, read_ns=None))
            catalog.drop_vector(entry.id)
    return entries


def _embed(
    writer: Writer,
    entries: list[Entry],
    model: EmbeddingModel,
    found: _Findings,
    progress: Progress | None,
) -> list[str]:
    """Give images their vectors anew; returns the paths of those that are not as they were."""
    root, lost, done = writer.root(), [], 0
    for block, part in _by_block(entries, found):
        vectors: dict[int, np.ndarray] = {}
        for batch in _batches(part, _MODEL_BATCH):
            pixels = [_pixels(root, entry, model) if root is not None else None for entry in batch]
            lost += [entry.path for entry, one in zip(batch, pixels, strict=True) if one is None]
            usable = [one for one in pixels if one is not None]
            if usable:
                new = np.asarray(model.image_vectors(np.stack(usable)), np.float32)
                new /= np.linalg.norm(new, axis=1, keepdims=True)
                kept = [e.id for e, one in zip(batch, pixels, strict=True) if one is not None]
                vectors.update(zip(kept, new, strict=True))
            done += len(batch)
            if progress is not None:
                progress(done, len(entries))
        if block is not None and found.snapshot is not None:
            vectors = _as_written(found.snapshot, block, vectors)
        with writer.catalog.writing():
            for entry in part:
                if entry.id in vectors:
                    writer.catalog.put_vector(writer.catalog.put(entry), vectors[entry.id])
    return lost


def _by_block(entries: list[Entry], found: _Findings) -> Iterator[tuple[int | None, list[Entry]]]:
    """Images of each damaged block, then those of none, in parts."""
    rest = {entry.id: entry for entry in entries}
    for block in found.blocks:
        ids = found.held[block * snapshots.BLOCK_ROWS : (block + 1) * snapshots.BLOCK_ROWS]
        yield block, [rest.pop(id_) for id_ in ids.tolist() if id_ in rest]
    for part in _batches(rest.values()):
        yield None, part


def _as_written(
    snapshot: Snapshot, block: int, vectors: dict[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """The vectors of a damaged block to the bit, where its digest proves them; else as computed.

    The same picture in another batch differs by rounding. So what is stored stays where it is that
    near, and of the other numbers what is nearest is tried.

    Args:
        snapshot: that has the block.
        block: its number.
        vectors: as computed, by id.
    """
    start = block * snapshots.BLOCK_ROWS
    ids = snapshot.ids[start : start + snapshots.BLOCK_ROWS].tolist()
    stored = np.array(snapshot.vectors[start : start + len(ids)])
    doubtful: list[tuple[int, int]] = []
    for row, id_ in enumerate(ids):
        if id_ in vectors:
            with np.errstate(over="ignore", invalid="ignore"):
                off = np.flatnonzero(~(np.abs(stored[row] - vectors[id_]) <= _ROUNDING))
            doubtful += [(row, column) for column in off.tolist()]
    choices = [_candidates(stored[at], vectors[ids[at[0]]][at[1]]) for at in doubtful]
    if math.prod(map(len, choices)) <= _TRIES:
        for choice in itertools.product(*choices):
            for at, value in zip(doubtful, choice, strict=True):
                stored[at] = value
            if snapshot.is_written(block, stored):
                return {id_: stored[row] for row, id_ in enumerate(ids) if id_ in vectors}
    return vectors


def _candidates(stored: np.float32, computed: np.float32) -> np.ndarray:
    """What a number may have been: one bit of it is another, or it is nearly what is computed."""
    bits = np.float32(stored).view(np.uint32) ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))
    steps = np.float32(computed).view(np.uint32) + np.arange(-_STEPS, _STEPS + 1)
    near = np.concatenate([bits, steps.astype(np.uint32)]).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        distance = np.abs(near - computed)
    order = np.argsort(distance, kind="stable")
    return near[order[distance[order] <= _ROUNDING]]


def _pixels(root: Path, entry: Entry, model: EmbeddingModel) -> np.ndarray | None:
    """The picture of a row, prepared for the model; None if it is not the one that was indexed."""
    try:
        content = read_stable(str(root / entry.path), max_bytes=max(MAX_BYTES, entry.size or 0))
        if content.sha256 != entry.sha256:
            return None
        preprocess = model.preprocess
        draft = getattr(preprocess, "draft_size", None)
        image = decode_with_size(content.data, draft_size=draft, reduce=True).image
        return np.asarray(preprocess(image))
    except (OSError, ImageError, ValueError, ArithmeticError, MemoryError):
        return None


def _batches(rows: Iterable, size: int = _BATCH) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _line(what: object) -> str:
    return " ".join(str(what).split())[:200]


def _some(numbers: list) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
