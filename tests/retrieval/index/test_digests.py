"""What is stored has digests: damage is told, never ranked, never copied on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from index_cases import TinyTestModel, age, assert_same_ranking, photo, queries, ranking

from retrieval.index import snapshot as snapshots
from retrieval.index import writer
from retrieval.index.catalog import Catalog, RowDamaged
from retrieval.index.eigen_index import EigenIndex
from retrieval.index.manifest import IndexCorrupt, IndexMismatch, NoIndex

Q = queries(1)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An index with a snapshot, an ANN, pending, removed and kept rows."""
    folder = tmp_path_factory.mktemp("made")
    root, model = folder / "photos", TinyTestModel()
    for number in range(20):
        photo(root / f"{number}.png", number)
    (root / "broken.png").write_bytes(b"no picture")
    age(root)
    with pytest.MonkeyPatch.context() as patch, EigenIndex.create(folder / "index", model) as index:
        index.ann_from = 16
        index.update(root, model)
        patch.setattr(writer, "SMALL_SNAPSHOT", 0)
        patch.setattr(writer, "PENDING_SHARE", 10.0)
        photo(root / "new.png", 100)
        photo(root / "3.png", 101)
        (root / "4.png").unlink()
        age(root)
        index.update(root, model)
        assert index.stats()["pending"] == 2
        assert index.stats()["kept"] == 1
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made / "index", tmp_path / "index")
    return tmp_path / "index"


def seen(folder: Path) -> list:
    """All that a reader shows of an index."""
    with EigenIndex.open(folder) as index:
        index.ann_candidates = 1
        deltas = (None, np.linspace(0.2, 3, len(Q)))
        return [
            [ranking(index, Q, delta) for delta in deltas],
            index.search(Q, 4, ids=index.ids()[:5]),
            list(index.entries()),
            list(index.entries("deleted")),
            index.root,
            index.manifest,
            index.vectors(index.ids()).tobytes(),
        ]


def flip(path: Path, choice: random.Random, count: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["vectors-1.faiss", "catalog.sqlite", "manifest.json"])
def test_a_flipped_bit_changes_no_answer(folder, name) -> None:
    good, path, told = seen(folder), folder / name, 0
    content = path.read_bytes()
    for seed in range(60):
        flip(path, random.Random(seed), 1 + seed % 3)
        problem = ""
        try:
            found = seen(folder)
        except (IndexCorrupt, IndexMismatch) as error:
            problem = str(error)
        told += bool(problem)
        assert "\n" not in problem
        assert problem or found == good, f"seed {seed} of {name} is silently wrong"
        for other in folder.glob("catalog.sqlite-*"):
            other.unlink()
        path.write_bytes(content)
    assert told >= (10 if name == "catalog.sqlite" else 40)


def damage_vectors(folder: Path, data: bytes = bytes(64), at: int = 400) -> None:
    file = folder / "vectors-1.faiss"
    content = bytearray(file.read_bytes())
    content[at : at + len(data)] = data
    file.write_bytes(content)


def test_a_damaged_block_is_neither_ranked_nor_copied(folder, made) -> None:
    damage_vectors(folder)
    before = (folder / "vectors-1.faiss").read_bytes()
    told = (
        r"vectors-1.faiss' is damaged: 1 of its blocks, between rows 0 and 20, .* 20 images; `enn"
    )
    model = TinyTestModel()
    with EigenIndex.open(folder) as index:
        for use in (
            lambda: index.search(Q),
            lambda: index.search(Q, delta=np.linspace(0.5, 2, 16)),
            lambda: index.search(Q, ids=index.ids()),
            lambda: index.vectors(index.ids()[:1]),
            index.moments,
            lambda: index.sample(3),
            index.compact,
        ):
            with pytest.raises(IndexCorrupt, match=told) as caught:
                use()
            assert "\n" not in str(caught.value)
        # What is not in the snapshot is there as ever.
        pending = index._view.pending_ids
        assert index.vectors(pending).shape == (2, 16)
        (made / "photos" / "5.png").touch()
        with pytest.raises(IndexCorrupt, match=told):
            index._writer().__enter__().publish(force=True)
    assert (folder / "vectors-1.faiss").read_bytes() == before
    del model


def test_blocks_are_looked_at_when_they_are_read(tmp_path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(700, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    digests = snapshots.write(tmp_path, "vectors-1.faiss", np.arange(1, 701), [vectors], 16)
    damage_vectors(tmp_path, at=300 * 64 + 200)
    one = snapshots.Snapshot(tmp_path, "vectors-1.faiss", None, 16, digests)
    for rows in ([0, 255], [699], [512, 0]):
        assert one.take(np.array(rows)).tobytes() == vectors[rows].tobytes()
    with pytest.raises(IndexCorrupt, match=r"1 of its blocks, between rows 256 and 512, .* of 256"):
        one.take(np.array([0, 300]))
    with pytest.raises(IndexCorrupt):
        one.exact(vectors[0], 3, np.empty(0, np.int64))
    assert one.damaged().tolist() == [1]
    sound = snapshots.Snapshot(tmp_path, "vectors-1.faiss", None, 16, None)
    with pytest.raises(IndexCorrupt, match="damaged"):  # zeros have no unit norm, digests or not
        sound.check()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 0.5])
def test_what_is_no_unit_vector_is_never_ranked(v0_1, value) -> None:
    """In files without digests, too: a value in a snapshot, and one in the catalog."""
    folder = v0_1 / "photos" / ".enn-index"
    shutil.copytree(folder, v0_1 / "other")
    file = folder / "vectors-1.faiss"
    content = bytearray(file.read_bytes())
    with EigenIndex.open(folder) as index:
        index.search(Q)
        row = index._view.snapshot.vectors[3].tobytes()  # type: ignore[union-attr]
    at = content.index(row)
    content[at : at + 4] = np.float32(value).tobytes()
    file.write_bytes(content)
    with EigenIndex.open(folder) as index:
        with pytest.raises(IndexCorrupt, match="damaged"):
            index.search(Q)
        with pytest.raises(IndexCorrupt, match="not of unit norm"):
            index.update(None, TinyTestModel())
    other = v0_1 / "other"
    with closing(sqlite3.connect(other / "catalog.sqlite")) as db, db:
        (vector,) = db.execute("SELECT vector FROM pending").fetchone()
        db.execute("UPDATE pending SET vector = ?", (np.float32(value).tobytes() + vector[4:],))
    with pytest.raises(IndexCorrupt, match="pending vectors holds a vector of norm"):
        EigenIndex.open(other)


def test_the_snapshot_of_another_index_is_refused(folder, made, tmp_path) -> None:
    root, model = tmp_path / "others", TinyTestModel()
    for number in range(20):
        photo(root / f"{number}.png", 500 + number)
    age(root)
    with EigenIndex.create(tmp_path / "foreign", model) as index:
        index.ann_from = 16
        index.update(root, model)
    shutil.copy(tmp_path / "foreign" / "vectors-1.faiss", folder)
    with pytest.raises(IndexCorrupt, match="damaged"):  # the ids of both are 1 to 21
        seen(folder)


@pytest.mark.parametrize("damage", ["flip", "zeros", "cut"])
def test_without_its_ann_an_index_searches_exactly(folder, damage) -> None:
    path = folder / "ann-1.faiss"
    with EigenIndex.open(folder) as index:
        index.ann_candidates = 10**6  # more than a quarter of all: no ANN is asked
        exact = [index.search(Q, 5), index.search(Q, 5, delta=np.linspace(0.5, 2, len(Q)))]
    if damage == "flip":
        flip(path, random.Random(0), 1)
    elif damage == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="ann-1.faiss' is damaged") as told:
        index = EigenIndex.open(folder)
    assert "--repair" in str(told[0].message)
    with index:
        index.ann_candidates = 1
        assert not index.stats()["ann"]
        assert [index.search(Q, 5), index.search(Q, 5, delta=np.linspace(0.5, 2, len(Q)))] == exact


@pytest.mark.parametrize("name", ["vectors-1.faiss", "catalog.sqlite"])
def test_zeros_are_refused(folder, name) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    start = min(200, len(content) // 4)
    content[start : start + 8192] = bytes(len(content[start : start + 8192]))
    path.write_bytes(content)
    with pytest.raises(IndexCorrupt):
        seen(folder)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE images SET path = 'other.png' WHERE id = 2",
        "UPDATE images SET sha256 = zeroblob(32) WHERE id = 2",
        "UPDATE pending SET vector = zeroblob(64)",
        "UPDATE meta SET value = 'vectors-9.faiss' WHERE key = 'snapshot'",
        "UPDATE meta SET value = '/somewhere' WHERE key = 'root'",
        "UPDATE meta SET value = value - 1 WHERE key = 'generation'",
        "DELETE FROM meta WHERE key = 'snapshot'",
        "DELETE FROM sums WHERE name = 'meta.snapshot'",
        "UPDATE sums SET rows = rows + 1 WHERE name = 'removed'",
        "UPDATE sums SET total = total + 1 WHERE name = 'pending'",
    ],
)
def test_a_changed_row_is_refused(folder, change) -> None:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as db, db:
        assert db.execute(change).rowcount > 0
    with pytest.raises(IndexCorrupt, match=r"does not fit its checksum|missing or changed"):
        seen(folder)


@pytest.mark.parametrize("table", ["images", "pending", "removed", "kept"])
def test_a_lost_row_is_noticed(folder, table) -> None:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as db, db:
        names = [
            row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='trigger'")
        ]
        for name in names:
            db.execute(f"DROP TRIGGER {name}")
        db.execute(f"DELETE FROM {table} WHERE rowid = (SELECT max(rowid) FROM {table})")
    if table in ("pending", "removed"):
        with pytest.raises(IndexCorrupt, match=f"rows of its {table} are missing or changed"):
            EigenIndex.open(folder)
    elif table == "images":
        with EigenIndex.open(folder) as index, pytest.raises(IndexCorrupt, match="no row of image"):
            index.entries_of(index.ids())
        with closing(Catalog.open(folder)) as catalog, pytest.raises(RowDamaged, match="missing"):
            list(catalog.all_paths())


def test_an_older_index_gets_digests(tmp_path) -> None:
    here = Path(__file__).parents[2] / "fixtures"
    photos = tmp_path / "photos"
    shutil.copytree(here / "v0.1" / "photos", photos)
    shutil.copytree(here / "index-2" / "index", photos / ".enn-index")
    shutil.copy(here / "index-2" / "new.png", photos)
    (photos / "7.png").unlink()
    (photos / "5.png").unlink(missing_ok=True)
    expected = json.loads((here / "index-2" / "expected.json").read_text())
    want = [tuple(row) for row in expected["ranking"]]
    model = TinyTestModel()
    before = (photos / ".enn-index" / "vectors-2.faiss").read_bytes()
    with EigenIndex.open(photos, model=model) as index:
        assert {entry.path: entry.id for entry in index.entries("indexed")} == expected["ids"]
        assert index.stats()["kept"] == expected["kept"]
        assert index._view.snapshot.digests is None  # type: ignore[union-attr]
        assert_same_ranking(ranking(index, Q), want)
        index._writer().__enter__().__exit__(None, None, None)
    assert (photos / ".enn-index" / "vectors-2.faiss").read_bytes() == before
    with EigenIndex.open(photos, model=model) as index:
        assert index._view.snapshot.digests is not None  # type: ignore[union-attr]
        assert_same_ranking(ranking(index, Q), want)
        assert index.update(photos, model).embedded == 0
        assert_same_ranking(ranking(index, Q), want)


def test_a_reader_shows_one_state_until_it_refreshes(folder, made, tmp_path) -> None:
    root, model = tmp_path / "photos", TinyTestModel()
    shutil.copytree(made / "photos", root)
    with EigenIndex.open(folder) as own, own._writer() as one, one.catalog.writing():
        one.catalog.set_meta("root", str(root))
    with EigenIndex.open(folder) as reader, EigenIndex.open(folder) as other:
        ids = reader.ids()
        before = list(reader.entries()), reader.entries_of(ids), reader.vectors(ids).tobytes()
        photo(root / "1.png", 300)
        (root / "2.png").unlink()
        (root / "5.png").rename(root / "moved.png")
        photo(root / "more.png", 301)
        age(root)
        other.update(root, model)
        after = list(reader.entries()), reader.entries_of(ids), reader.vectors(ids).tobytes()
        assert after == before
        assert other.entries_of(ids) != before[1]
        for id_ in ids.tolist():
            assert reader.entry(id_) == before[1][id_]
        new = int(other.ids()[-1])
        with pytest.raises(KeyError):
            reader.entry(new)
        assert reader.refresh()
        assert list(reader.entries()) == list(other.entries())
        # Changed twice since: what it was is not known any more, and nothing else is shown.
        known = reader.entries_of(reader.ids())
        for seed in (310, 311):
            photo(root / "1.png", seed)
            os.utime(root / "1.png", (seed, seed))
            other.update(root, model)
        now = reader.entries_of(reader.ids())
        assert all(known[id_] == entry for id_, entry in now.items())
        assert len(now) == len(known) - 1


def test_a_folder_that_goes_away_says_so(folder, made) -> None:
    reader = EigenIndex.open(folder)
    moved = folder.rename(folder.with_name("moved"))
    line = f"^the index is no longer in '{re.escape(str(folder))}': it was moved or deleted"
    with pytest.raises(NoIndex, match=line):
        reader.update(made / "photos", TinyTestModel())
    assert not folder.exists()
    with EigenIndex.open(moved) as index:
        index.compact()
    with pytest.raises(NoIndex, match=line):
        reader.refresh()
    reader.close()
