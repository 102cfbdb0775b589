"""Above a size the index proposes candidates from short codes and ranks them exactly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_cases import TinyTestModel

from retrieval.eigen_coordinates import scores
from retrieval.index import snapshot as snapshot_module
from retrieval.index import writer as writer_module
from retrieval.index.catalog import Entry
from retrieval.index.eigen_index import EigenIndex

DIM = 48
ROWS = 12_000


def clustered(rows: int, seed: int) -> np.ndarray:
    """Unit vectors around 60 centres, with spectra that fall as those of real embeddings do."""
    centres = np.random.default_rng(0).normal(size=(60, DIM))
    rng = np.random.default_rng(seed)
    spectrum = 1 / np.sqrt(1 + np.arange(DIM))
    vectors = (centres[rng.integers(0, 60, rows)] + rng.normal(size=(rows, DIM))) * spectrum
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Small(EigenIndex):
    ann_from = 5_000
    ann_candidates = 200


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(ROWS, 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory, vectors: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("ann") / "built"
    with Small.create(folder, TinyTestModel(dim=DIM)) as index:
        put(index, vectors)
    return folder


@pytest.fixture
def index(tmp_path: Path, built: Path) -> EigenIndex:
    shutil.copytree(built, tmp_path / "i")
    return Small.open(tmp_path / "i")


def put(index: EigenIndex, vectors: np.ndarray, first: int = 0) -> None:
    with index._writer() as writer:
        with writer.catalog.writing():
            for number, vector in enumerate(vectors, first):
                writer.catalog.put_vector(writer.catalog.put(Entry(0, f"{number}.jpg")), vector)
        writer.publish()
    index.refresh()


def recall(index: EigenIndex, known: dict[int, np.ndarray], delta=None, k: int = 10) -> float:
    ids = np.array(sorted(known))
    stored = np.stack([known[id_] for id_ in ids])
    hits = 0
    tests = clustered(60, 2)
    for q in tests:
        best = set(ids[np.argsort(-scores(q, stored, delta))[:k]].tolist())
        found = index.search(q, k, delta=delta)
        # Whatever is proposed, its score is exact.
        for id_, score in found:
            assert score == pytest.approx(float(scores(q, known[id_][None], delta)[0]), abs=2e-6)
        hits += len(best & {id_ for id_, _ in found})
    return hits / (k * len(tests))


def numbered(vectors: np.ndarray) -> dict[int, np.ndarray]:
    return dict(enumerate(vectors, 1))


def test_recall_and_exact_scores(index, vectors) -> None:
    assert index.stats()["ann"] is True
    assert recall(index, numbered(vectors)) >= 0.97


@pytest.mark.parametrize("spread", [0.7, 2.0, 8.0])
def test_recall_under_a_changed_spectrum(index, vectors, spread: float) -> None:
    delta = np.exp(np.random.default_rng(3).normal(size=DIM) * np.log(spread) / 2)
    assert recall(index, numbered(vectors), delta.astype(np.float32)) >= 0.95


def test_the_candidates_really_come_from_the_ann(index, vectors, monkeypatch) -> None:
    def forbidden(*_, **__):
        raise AssertionError("a full scan")

    monkeypatch.setattr(snapshot_module.Snapshot, "exact", forbidden)
    monkeypatch.setattr(snapshot_module.Snapshot, "scan", forbidden)
    assert len(index.search(vectors[5], 10)) == 10
    assert len(index.search(vectors[5], 10, delta=np.linspace(1, 2, DIM))) == 10
    for query in (
        lambda: index.search(vectors[5], ROWS),
        lambda: index.search(vectors[5], 10, delta=np.geomspace(0.1, 10, DIM)),
        lambda: index.search(vectors[5], 10, delta=np.linspace(-1, 2, DIM)),
    ):
        with pytest.raises(AssertionError, match="a full scan"):
            query()


def test_queries_far_from_all_images(index, vectors) -> None:
    # As texts are: inverted lists lose most of their best images.
    known, hits = numbered(vectors), 0
    tests = np.random.default_rng(6).normal(size=(60, DIM)).astype(np.float32)
    for q in tests:
        truth = scores(q, vectors)
        best = set((np.argsort(-truth)[:10] + 1).tolist())
        hits += len(best & {id_ for id_, _ in index.search(q, 10)})
    assert len(known) == ROWS
    assert hits / 600 >= 0.97


def test_deleted_added_and_changed(index, vectors) -> None:
    known = numbered(vectors)
    gone = list(range(1, 3000, 2))
    for id_ in gone:
        del known[id_]
    index.remove(gone)
    more = clustered(900, 4)
    put(index, more, ROWS)
    known.update(enumerate(more, ROWS + 1))
    # An id whose vector changes must not be found by its old one.
    with index._writer() as writer:
        with writer.catalog.writing():
            writer.catalog.put_vector(2, -vectors[1])
        writer.publish()
    index.refresh()
    known[2] = -vectors[1]
    assert len(index) == len(known)
    assert recall(index, known) >= 0.97
    assert 2 not in {id_ for id_, _ in index.search(vectors[1], 5)}
    assert index.search(-vectors[1], 1)[0][0] == 2
    assert not {id_ for id_, _ in index.search(vectors[0], 50)} & set(gone)
    ann = faiss.read_index(str(next(index.path.glob("ann-*"))))
    assert ann.ntotal == len(known)


@pytest.mark.parametrize("dim", [7, 16])
def test_any_length_of_vectors(tmp_path, dim: int) -> None:
    index = Small.create(tmp_path / "k", TinyTestModel(dim=dim))
    short = clustered(ROWS, 7)[:, :dim]
    short = short / np.linalg.norm(short, axis=1, keepdims=True)
    put(index, short)
    assert index.stats()["ann"] is True
    assert index.search(short[40], 1)[0][0] == 41


def test_pending_and_removed_beside_the_ann(index, vectors, monkeypatch) -> None:
    monkeypatch.setattr(writer_module, "SMALL_SNAPSHOT", 100)
    known = numbered(vectors)
    more = clustered(50, 5)
    put(index, more, ROWS)
    known.update(enumerate(more, ROWS + 1))
    index.remove([1, 2, 3, ROWS + 1])
    for id_ in (1, 2, 3, ROWS + 1):
        del known[id_]
    assert index.stats()["pending"] == 49
    assert index.search(more[5], 1)[0][0] == ROWS + 6
    assert recall(index, known) >= 0.97


def test_growing_and_shrinking_past_the_limit(tmp_path, vectors) -> None:
    index = Small.create(tmp_path / "j", TinyTestModel(dim=DIM))
    put(index, vectors[:4000])
    assert index.stats()["ann"] is False
    put(index, vectors[4000:], 4000)
    assert index.stats()["ann"] is True
    index.remove(range(1, ROWS - 3000))
    assert index.stats()["ann"] is False
    assert not [name for name in os.listdir(index.path) if name.startswith("ann")]
    index.remove(range(1, ROWS + 1))
    assert len(index) == 0
    assert index.search(vectors[0], 3) == []
    assert not [name for name in os.listdir(index.path) if name.endswith(".faiss")]


def test_default_limit_is_where_a_scan_is_felt() -> None:
    assert EigenIndex.ann_from == writer_module.ANN_FROM == 200_000
