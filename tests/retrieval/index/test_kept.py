"""Vectors of deleted pictures are kept for 30 days and come back by content, the same bits."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from index_cases import TinyTestModel, assert_like_fresh, assert_sound, photo, queries

from retrieval.index.catalog import Catalog
from retrieval.index.eigen_index import EigenIndex

DAY = 24 * 3600


@pytest.fixture
def kept(root, model, tmp_path) -> EigenIndex:
    """An index beside its photos, which can be moved away."""
    index = EigenIndex.create(tmp_path / "index", model)
    index.update(root, model)
    return index


@pytest.fixture
def days_pass(monkeypatch):
    """A function that sets the clock on."""
    now = time.time
    passed = [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + passed[0])

    def days(count: float) -> None:
        passed[0] += count * DAY

    return days


def away(root: Path) -> Path:
    gone = root.rename(root.with_name("away"))
    root.mkdir()
    return gone


def back(root: Path) -> None:
    root.rmdir()
    root.with_name("away").rename(root)


def known(index: EigenIndex) -> tuple[list, bytes]:
    entries = [(e.id, e.path, e.sha256, e.width, e.height) for e in index.entries("indexed")]
    return entries, index.vectors([entry[0] for entry in entries]).tobytes()


@pytest.mark.parametrize("compacted", [False, True])
def test_what_comes_back_is_not_embedded_again(kept, root, model, days_pass, compacted) -> None:
    before, found, embedded = known(kept), kept.search(queries(1)[0], 9), model.images
    away(root)
    assert kept.update(root, model, prune=True).deleted == 9
    assert (len(kept), kept.stats()["kept"]) == (0, 9)
    days_pass(29)
    if compacted:
        kept.compact()
    back(root)
    report = kept.update(root, model)
    assert (report.added, report.embedded, model.images) == (9, 0, embedded)
    assert known(kept) == before  # ids too: what was taught of them still fits
    assert kept.search(queries(1)[0], 9) == found
    assert (kept.stats()["kept"], kept.stats()["kept_until"], kept.stats()["deleted"]) == (
        0,
        None,
        0,
    )


@pytest.mark.parametrize("compacted", [False, True])
def test_after_30_days_it_is(kept, root, model, days_pass, compacted) -> None:
    away(root)
    kept.update(root, model, prune=True)
    until = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 30 * DAY))
    assert kept.stats()["kept_until"] == until
    days_pass(30.1)
    if compacted:
        kept.compact()
        assert (kept.stats()["kept"], kept.stats()["deleted"]) == (0, 0)
    back(root)
    assert kept.update(root, model).embedded == 9
    assert kept.stats()["kept"] == 0


def test_a_clock_that_was_years_ahead_keeps_nothing_for_years(kept, root, model, days_pass) -> None:
    days_pass(4000)
    away(root)
    kept.update(root, model, prune=True)
    days_pass(-4000)
    back(root)
    assert kept.update(root, model).embedded == 9


def test_another_place_and_copies(kept, root, model, tmp_path) -> None:
    away(root)
    kept.update(root, model, prune=True)
    for name in ("one", "two"):
        (root / name).mkdir()
        shutil.copy(root.with_name("away") / "3.png", root / name / "x.png")
    report = kept.update(root, model)
    assert (report.added, report.embedded) == (2, 0)
    assert kept.stats()["kept"] == 8
    assert_sound(kept, root)
    assert_like_fresh(kept, root, tmp_path / "fresh")


def test_an_ordinary_update_keeps_what_is_gone(kept, root, model, tmp_path) -> None:
    (root / "3.png").rename(tmp_path / "3.png")
    (root / "4.png").rename(tmp_path / "4.png")
    assert kept.update(root, model).deleted == 2
    photo(root / "3.png", 777)  # another picture at the same place
    (tmp_path / "4.png").rename(root / "neu.png")
    report = kept.update(root, model)
    assert (report.added, report.embedded) == (2, 1)
    assert_sound(kept, root)


def test_a_file_that_could_not_be_used_for_a_while(kept, root, model) -> None:
    content = (root / "3.png").read_bytes()
    (root / "3.png").write_bytes(b"")  # as a cloud's placeholder
    assert kept.update(root, model).skipped == 1
    (root / "3.png").write_bytes(content)
    report = kept.update(root, model)
    assert (report.added, report.embedded, report.total) == (1, 0, 9)
    assert_sound(kept, root)


def test_removed_by_hand(kept, root, model) -> None:
    kept.remove([1, 2])
    assert kept.update(root, model).embedded == 0
    assert len(kept) == 9


def test_drop_deleted_leaves_nothing(kept, root, model) -> None:
    vector = kept.vectors([1])[0].tobytes()
    file = kept.path / "catalog.sqlite"
    copy = file.with_name("catalog.sqlite.format-1")
    copy.write_bytes(b"of an upgrade")
    away(root)
    kept.update(root, model, prune=True)
    assert vector in file.read_bytes() + b"".join(p.read_bytes() for p in kept.path.glob("*-wal"))
    kept.compact(drop_deleted=True)
    for path in kept.path.iterdir():
        assert vector not in path.read_bytes()
    assert not copy.exists()
    assert kept.stats()["kept"] == 0
    back(root)
    assert kept.update(root, model).embedded == 9


def test_the_vector_of_a_content_is_of_no_other(kept, root, model) -> None:
    """A row that came back with an older version, changed and was deleted again."""
    (root / "3.png").unlink()
    kept.update(root, model)
    photo(root / "3.png", 3)
    with closing(Catalog.open(kept.path, write=True)) as catalog, catalog.writing():
        row = next(iter(catalog.entries("deleted")))
        catalog.put(replace(row, sha256=b"x".hex() * 32))
    assert kept.update(root, model).embedded == 0
    assert_sound(kept, root)


def test_many_in_several_transactions(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("retrieval.index.update._DELETE_ROWS", 7)
    root = tmp_path / "photos"
    for number in range(20):
        photo(root / f"{number}.png", number)
    with EigenIndex.create(tmp_path / "i", model) as index:
        index.update(root, model)
        before = known(index)
        away(root)
        index.update(root, model, prune=True)
        index.update(root, model)
        back(root)
        assert index.update(root, model).embedded == 0
        assert known(index) == before


def test_two_readers_and_an_export(kept, root, model, tmp_path) -> None:
    with EigenIndex.open(kept.path) as reader:
        (root / "3.png").unlink()
        kept.update(root, model)
        reader.refresh()
        assert len(reader) == 8
        assert np.array_equal(reader.ids(), kept.ids())
        assert kept.export_parquet(tmp_path / "x.parquet") == 8


def test_the_tables_of_an_upgrade_are_those_of_a_new_index(v0_1, tmp_path) -> None:
    def tables(file: Path) -> list[tuple]:
        with closing(sqlite3.connect(file)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (3,)
            return db.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()

    old, model = v0_1 / "photos" / ".enn-index", TinyTestModel()
    with EigenIndex.open(old) as reader:  # which changes nothing
        assert (reader.stats()["kept"], reader.stats()["kept_until"]) == (0, None)
    with EigenIndex.open(old, model=model) as index:
        index.update(None, model)
        photos = sorted((v0_1 / "photos").glob("*.png"))
        content = photos[0].read_bytes()
        photos[0].unlink()
        index.update(None, model)
        photos[0].write_bytes(content)
        assert index.update(None, model).embedded == 0
    EigenIndex.create(tmp_path / "new", model).close()
    assert tables(old / "catalog.sqlite") == tables(tmp_path / "new" / "catalog.sqlite")
