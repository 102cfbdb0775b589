"""Copies of an index that is in use."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from index_cases import TinyTestModel, age, photo, queries, ranking

from retrieval.index.check import check_index
from retrieval.index.eigen_index import EigenIndex, NoIndex
from retrieval.teach.backup import back_up


@pytest.fixture
def model() -> TinyTestModel:
    return TinyTestModel()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(8):
        photo(tmp_path / "photos" / f"{number}.png", number)
    age(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.mark.parametrize("place", ["photos/.enn-index", "elsewhere"])
def test_a_copy_is_the_same_index_of_the_same_photos(tmp_path, model, root, place) -> None:
    with EigenIndex.create(tmp_path / place, model, root=root) as index:
        index.update(root, model)
        photo(root / "late.png", 99)
        index.update(root, model)
        made = back_up(tmp_path / place, tmp_path / "far" / "away" / "copy")
        assert (made.images, made.profiles, made.damage) == (9, [], [])
        with EigenIndex.open(tmp_path / "far" / "away" / "copy") as copy:
            assert copy.root == root
            assert ranking(copy, queries()[0]) == ranking(index, queries()[0])
            assert copy.update(None, model).unchanged == 9


def test_copies_of_a_busy_index_are_whole(tmp_path, model, root) -> None:
    index = EigenIndex.create(tmp_path / "index", model, root=root)
    index.update(root, model)
    done = threading.Event()

    def work() -> None:
        draw = np.random.default_rng(0)
        while not done.is_set():
            with EigenIndex.open(tmp_path / "index") as own:
                own.remove(draw.choice(own.ids(), 2, replace=False))
                own.update(root, model)
                own.compact()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for number in range(12):
            made = back_up(tmp_path / "index", tmp_path / f"copy {number}")
            assert made.images in (6, 8)
            assert check_index(tmp_path / f"copy {number}") == []
            with EigenIndex.open(tmp_path / f"copy {number}") as copy:
                assert len(ranking(copy, queries()[0])) == made.images
    finally:
        done.set()
        worker.join()
    index.close()


def test_nothing_is_left_of_a_copy_that_cannot_be_made(tmp_path, model, root) -> None:
    with pytest.raises(NoIndex, match="no index"):
        back_up(tmp_path, tmp_path / "copy")
    EigenIndex.create(tmp_path / "index", model, root=root).close()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        back_up(tmp_path / "index", tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "index", "photos"]


def test_a_copy_inside_the_index_itself_is_refused(tmp_path, model, root) -> None:
    index = tmp_path / "index"
    with EigenIndex.create(index, model, root=root) as made:
        made.update(root, model)
    before = sorted(path.name for path in index.iterdir())
    for target in (index, index / "copy", index / "deep" / "copy"):
        with pytest.raises(OSError, match="inside the index"):
            back_up(index, target)
    assert sorted(path.name for path in index.iterdir()) == before
