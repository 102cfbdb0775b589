"""The catalog file itself."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.index.catalog import Catalog, Entry, decode_path, encode_path


@pytest.fixture
def catalog(tmp_path: Path):
    Catalog.create(tmp_path)
    catalog = Catalog.open(tmp_path, write=True)
    yield catalog
    catalog.close()


@given(st.binary(max_size=30))
def test_any_file_name_survives(raw: bytes) -> None:
    name = os.fsdecode(raw)
    stored = encode_path(name)
    assert decode_path(stored) == name
    assert isinstance(stored, bytes) == (not _is_utf8(raw))


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def test_rows_come_back_as_they_went(catalog: Catalog) -> None:
    entry = Entry(
        0, "süb/a.jpg", 640, 480, 2**40, 1_700_000_000_123_456_789, "ab" * 32, "indexed", None, 7
    )
    with catalog.writing():
        id_ = catalog.put(entry)
    found = catalog.entry(id_)
    assert found is not None
    assert found == Entry(**{**entry.__dict__, "id": id_})
    assert catalog.by_path(["süb/a.jpg", "none"]) == {"süb/a.jpg": found}
    assert catalog.by_hash("ab" * 32) == [found]
    assert catalog.by_id([id_, 99]) == {id_: found}
    assert list(catalog.all_paths()) == [(id_, "süb/a.jpg", "indexed")]


def test_ids_are_never_used_again(catalog: Catalog) -> None:
    with catalog.writing():
        first = catalog.put(Entry(0, "a"))
        catalog.erase(first)
        second = catalog.put(Entry(0, "b"))
    assert second > first
    assert catalog.max_id() == second


def test_one_live_row_per_path(catalog: Catalog) -> None:
    with catalog.writing():
        first = catalog.put(Entry(0, "a"))
        catalog.mark_deleted(first)
        second = catalog.put(Entry(0, "a"))
    assert catalog.by_path(["a"])["a"].id == second
    with pytest.raises(sqlite3.IntegrityError), catalog.writing():
        catalog.put(Entry(0, "a"))
    assert catalog.counts() == {"indexed": 1, "skipped": 0, "deleted": 1}


def test_a_failed_transaction_leaves_nothing(catalog: Catalog) -> None:
    generation = catalog.generation

    def interrupted() -> None:
        with catalog.writing():
            catalog.put_vector(catalog.put(Entry(0, "a")), np.zeros(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert catalog.generation == generation
    assert list(catalog.entries()) == []
    assert catalog.pending_count() == 0


def test_pending_vectors(catalog: Catalog) -> None:
    one, two, three = np.eye(4, dtype=np.float32)[:3]
    with catalog.writing():
        for id_, vector in ((5, one), (3, two), (9, two)):
            catalog.put_vector(id_, vector)
        catalog.put_vector(3, three)
        catalog.drop_vector(9)
    ids = dict(catalog.pending_ids())
    sequence, vectors = catalog.pending_vectors(-1, 4)
    assert [ids[seq] for seq in sequence.tolist()] == [5, 3]
    assert vectors.tolist() == [one.tolist(), three.tolist()]
    assert catalog.pending_vectors(int(sequence[0]), 4)[1].tolist() == [three.tolist()]
    assert catalog.removed_ids().tolist() == [9]
    pending = catalog.pending_vector(3, 4)
    assert pending is not None
    assert pending.tolist() == three.tolist()
    assert catalog.pending_vector(9, 4) is None
    with pytest.raises(ValueError, match="reshape"):
        catalog.pending_vectors(-1, 5)
    with catalog.writing():
        catalog.commit_snapshot("v", None, None, 1)
    assert (catalog.pending_count(), catalog.removed_count()) == (0, 0)


def test_readers_see_a_state_while_a_writer_writes(catalog: Catalog, tmp_path: Path) -> None:
    reader = Catalog.open(tmp_path)
    with reader.reading():
        assert list(reader.entries()) == []
        with catalog.writing():
            catalog.put(Entry(0, "a"))
        assert list(reader.entries()) == []
    assert [entry.path for entry in reader.entries()] == ["a"]
    reader.close()


def test_entries_in_batches(catalog: Catalog) -> None:
    with catalog.writing():
        for number in range(25):
            state = "skipped" if number % 5 == 0 else "indexed"
            catalog.put(Entry(0, f"{number}", state=state))
    assert len(list(catalog.entries(batch=7))) == 25
    assert [entry.path for entry in catalog.entries("skipped", batch=2)] == [
        str(number) for number in range(0, 25, 5)
    ]
    assert len(list(catalog.all_paths(batch=5))) == 25


def test_missing_file(tmp_path: Path) -> None:
    for write in (False, True):
        with pytest.raises(sqlite3.DatabaseError, match="missing"):
            Catalog.open(tmp_path, write=write)
