"""The index as its users see it: refusing, searching, several at a time."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from index_cases import (
    TinyTestModel,
    assert_like_fresh,
    assert_same_ranking,
    photo,
    queries,
    ranking,
)

from retrieval.eigen_coordinates import scores
from retrieval.index import snapshot as snapshot_module
from retrieval.index import writer as writer_module
from retrieval.index.catalog import Entry
from retrieval.index.eigen_index import (
    EigenIndex,
    IndexCorrupt,
    IndexExists,
    IndexLocked,
    IndexMismatch,
    NoIndex,
)
from retrieval.index.manifest import Manifest

# --- errors ------------------------------------------------------------------------------------


def test_no_index(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(NoIndex, match=r"no index in .* build one"):
            EigenIndex.open(path)


def test_existing_index_is_not_overwritten(index, model) -> None:
    with pytest.raises(IndexExists, match="already"):
        EigenIndex.create(index.path, model)


def test_another_model_is_refused(index, root) -> None:
    other = TinyTestModel(seed=1)
    for attempt in (
        lambda: EigenIndex.open(index.path, model=other),
        lambda: index.update(root, other),
        lambda: index.check_model(other),
    ):
        with pytest.raises(IndexMismatch, match="built with model tiny-test-model-0") as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert "tiny-test-model-1" in str(caught.value)


def test_same_name_other_weights_is_refused(index) -> None:
    other = TinyTestModel(seed=1)
    other.name = "tiny-test-model-0"
    with pytest.raises(IndexMismatch, match="weights"):
        index.check_model(other)


def test_another_precision_is_refused(index, root, model) -> None:
    model.precision = "bf16"
    with pytest.raises(IndexMismatch, match="built in precision f32, this model is in bf16"):
        index.update(root, model)
    # Indexes from before there was a choice.
    file = index.path / "manifest.json"
    content = json.loads(file.read_text())
    assert content.pop("precision") == "f32"
    assert content.pop("sha256")
    file.write_text(json.dumps({**content, "format": 1}))
    assert EigenIndex.open(index.path).manifest["precision"] == "f32"


def test_other_preprocessing_is_refused(index, model) -> None:
    model.preprocess.hash = "something else"
    with pytest.raises(IndexMismatch, match="preprocessing"):
        index.check_model(model)


def test_another_factorisation_of_the_same_weights_is_refused(index, model) -> None:
    basis = model.basis
    flip = np.ones(model.dim)
    flip[3] = -1
    model.basis = replace(basis, Q=basis.Q * flip, P=basis.P * flip)
    with pytest.raises(IndexMismatch, match="factor the same weights differently"):
        index.check_model(model)


def test_another_folder_is_refused_but_a_renamed_one_is_not(root, model, tmp_path) -> None:
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(root, model)
    photo(tmp_path / "other" / "1.png", 1)
    with pytest.raises(IndexMismatch, match="belongs to the folder"):
        index.update(tmp_path / "other", model)
    root.rename(tmp_path / "renamed")
    report = index.update(tmp_path / "renamed", model)
    assert (report.unchanged, report.deleted) == (9, 0)
    assert index.root == tmp_path / "renamed"


def test_folder_and_index_move_together(index, root, model, tmp_path) -> None:
    index.close()
    root.rename(tmp_path / "elsewhere")
    moved = EigenIndex.open(tmp_path / "elsewhere", model=model)
    assert moved.root == tmp_path / "elsewhere"
    assert moved.update(None, model).unchanged == 9


def test_missing_folder_changes_nothing(index, root, model, tmp_path) -> None:
    shutil.move(root / ".enn-index", tmp_path / "kept")
    shutil.move(root, tmp_path / "away")
    index = EigenIndex.open(tmp_path / "kept")
    with pytest.raises(NotADirectoryError, match="give a photo folder"):
        index.update(tmp_path / "typo", model)
    assert len(index) == 9


def test_damaged_files_are_reported_in_one_line(index, tmp_path) -> None:
    index.close()
    for name, damage in {
        "manifest.json": lambda path: path.write_text("{"),
        "catalog.sqlite": lambda path: path.write_bytes(b"garbage" * 1000),
        "vectors-1.faiss": lambda path: path.write_bytes(path.read_bytes()[:-300]),
        "catalog.sqlite ": lambda path: Path(str(path).strip()).unlink(),
        "vectors-1.faiss ": lambda path: Path(str(path).strip()).unlink(),
    }.items():
        copy = tmp_path / f"copy of {name}"
        shutil.copytree(index.path, copy)
        for rest in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
            (copy / rest).unlink(missing_ok=True)
        damage(copy / name)
        with pytest.raises(IndexCorrupt) as caught:
            EigenIndex.open(copy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.zeros(3), np.full(16, np.nan), np.zeros((1, 16))])
def test_unfit_queries(index, bad) -> None:
    with pytest.raises(ValueError, match="q "):
        index.search(bad, 3)
    with pytest.raises(ValueError, match="delta "):
        index.search(queries(1)[0], 3, delta=bad)
    with pytest.raises(ValueError, match="k must"):
        index.search(queries(1)[0], 0)


# --- searching ---------------------------------------------------------------------------------


def fill(index: EigenIndex, vectors: np.ndarray, first: int = 0) -> None:
    """Put vectors into an index as if they were those of images."""
    with index._writer() as writer:
        with writer.catalog.writing():
            for number, vector in enumerate(vectors, first):
                writer.catalog.put_vector(writer.catalog.put(Entry(0, f"{number}.jpg")), vector)
        writer.publish()
    index.refresh()


def unit(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("delta", [None, "signed", "zeros"])
def test_exact_search_against_brute_force(tmp_path, model, monkeypatch, delta) -> None:
    # Part in the snapshot, part pending, some removed in both.
    monkeypatch.setattr(writer_module, "SMALL_SNAPSHOT", 100)
    index = EigenIndex.create(tmp_path / "i", model)
    vectors = unit((2000, 16))
    fill(index, vectors[:1950])
    fill(index, vectors[1950:], 1950)
    assert index.stats()["pending"] == 50
    gone = [1, 7, 400, 1960, 2000]
    index.remove(gone)
    assert index.stats()["pending"] == 48
    if delta == "signed":
        delta = np.linspace(-1, 2, 16).astype(np.float32)
    elif delta == "zeros":
        delta = np.r_[np.zeros(8), np.ones(8)].astype(np.float32)
    for q in queries(4):
        expected = scores(q, vectors, delta)
        expected[np.array(gone) - 1] = -np.inf
        order = np.argsort(-expected, kind="stable")
        for k in (1, 10, 500, 1995, 5000):
            ids, found = index.search_arrays(q, k, delta=delta)
            count = min(k, 1995)
            assert len(set(ids.tolist())) == count
            np.testing.assert_allclose(found, expected[order[:count]], atol=2e-6)
            np.testing.assert_allclose(found, expected[ids - 1], atol=2e-6)
        chosen = [2, 3, 400, 1999, 99999]
        ids, found = index.search_arrays(q, 3, delta=delta, ids=chosen)
        best = sorted((2, 3, 1999), key=lambda id_: -expected[id_ - 1])
        assert ids.tolist() == best


def test_ties_come_in_the_order_of_ids(tmp_path, model) -> None:
    index = EigenIndex.create(tmp_path / "i", model)
    vectors = np.repeat(unit((3, 16)), 100, axis=0)
    fill(index, vectors)
    q = vectors[150]
    for k in (1, 5, 99, 100, 130):
        ids = index.search_arrays(q, k)[0]
        assert ids[:100].tolist() == list(range(101, 201))[: min(k, 100)]


def test_empty_index_answers_nothing(tmp_path, model) -> None:
    index = EigenIndex.create(tmp_path / "i", model)
    assert len(index) == 0
    assert index.search(queries(1)[0], 5) == []
    assert index.ids().tolist() == []
    assert index.vectors([]).shape == (0, 16)
    mean, covariance = index.moments()
    assert not mean.any()
    assert not covariance.any()
    assert index.stats()["images"] == 0


def test_moments(tmp_path, model) -> None:
    index = EigenIndex.create(tmp_path / "i", model)
    vectors = unit((500, 16))
    fill(index, vectors)
    mean, covariance = index.moments()
    np.testing.assert_allclose(mean, vectors.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(vectors.T, bias=True), atol=1e-6)
    assert index.moments() is index.moments()
    index.remove([1])
    np.testing.assert_allclose(index.moments()[0], vectors[1:].mean(0), atol=1e-6)


def test_vectors_of_unknown_ids(index) -> None:
    with pytest.raises(KeyError, match="12345"):
        index.vectors([1, 12345])
    with pytest.raises(KeyError, match="12345"):
        index.entry(12345)


def test_stats_are_plain_json(index, model) -> None:
    stats = json.loads(json.dumps(index.stats()))
    assert (stats["images"], stats["skipped"], stats["dim"]) == (9, 0, 16)
    assert stats["model"] == model.name
    assert stats["bytes"] > 1000
    assert Manifest.from_dict(index.manifest) == Manifest.read(index.path)


# --- readers and the writer --------------------------------------------------------------------


def test_reader_keeps_its_state_until_refresh(index, root, model) -> None:
    with EigenIndex.open(index.path) as reader:
        q = queries(1)[0]
        before = reader.search(q, 9)
        for number in range(4):
            photo(root / f"new {number}.png", 200 + number)
            (root / f"{number}.png").unlink()
            index.update(root, model)
        index.compact()
        assert reader.search(q, 9) == before
        assert len(reader.ids()) == 9
        assert reader.refresh() is True
        assert reader.refresh() is False
        assert_same_ranking(ranking(reader, q), ranking(index, q))


def test_deleted_images_still_have_a_row_for_older_readers(index, root, model) -> None:
    with EigenIndex.open(index.path) as reader:
        (root / "1.png").unlink()
        index.update(root, model)
        for id_, _ in reader.search(queries(1)[0], 9):
            reader.entry(id_)


def test_readers_beside_a_writer(root, model, tmp_path) -> None:
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(root, model)
    stop, problems = threading.Event(), []

    def read() -> None:
        try:
            with EigenIndex.open(tmp_path / "i") as reader:
                while not stop.is_set():
                    reader.refresh()
                    ids, found = reader.search_arrays(queries(1)[0], 50)
                    assert len(ids) == len(reader.ids()) or reader.refresh()
                    assert np.isfinite(found).all()
                    reader.vectors(ids[:5])
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            photo(root / f"t{turn}.png", 300 + turn)
            if turn % 3 == 2:
                (root / f"t{turn - 1}.png").unlink()
            index.update(root, model)
            if turn % 5 == 4:
                index.compact()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_second_writer_is_refused_and_told_who_writes(index, root, model) -> None:
    with (
        index._writer(),
        pytest.raises(IndexLocked, match=rf"written by process {os.getpid()} on .+ since 20"),
    ):
        EigenIndex.open(index.path).update(root, model)
    index.update(root, model)


def test_writer_in_another_process_is_named_and_its_death_frees_the_lock(
    index, root, model
) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from retrieval.index.writer import index_lock\n"
        "with index_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(index.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(IndexLocked, match=f"process {other.pid} "):
            index.update(root, model)
    finally:
        other.kill()
        other.communicate()
    index.update(root, model)


def test_snapshot_replaced_between_two_looks_is_no_damage(index, root, model, monkeypatch) -> None:
    with EigenIndex.open(index.path) as reader:
        photo(root / "a.png", 400)
        index.update(root, model)
        real = snapshot_module.faiss.read_index

        def replaced(name, flags):
            monkeypatch.setattr(snapshot_module.faiss, "read_index", real)
            photo(root / "b.png", 401)
            index.update(root, model)
            return real(name, flags)

        monkeypatch.setattr(snapshot_module.faiss, "read_index", replaced)
        assert reader.refresh() is True
        assert len(reader) == 11


def test_compact_forgets_what_was_deleted(index, root, model, tmp_path) -> None:
    gone = {entry.path: entry.id for entry in index.entries()}["5.png"]
    (root / "5.png").unlink()
    index.update(root, model)
    index.compact(drop_deleted=True)
    with pytest.raises(KeyError):
        index.entry(gone)
    assert index.stats()["deleted"] == 0
    photo(root / "6a.png", 66)
    index.update(root, model)
    assert max(entry.id for entry in index.entries()) > 9
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_large_index_keeps_small_changes_in_the_catalog(tmp_path, model, monkeypatch) -> None:
    monkeypatch.setattr(writer_module, "SMALL_SNAPSHOT", 50)
    index = EigenIndex.create(tmp_path / "i", model)
    vectors = unit((1030, 16))
    fill(index, vectors[:1000])
    name = [name for name in os.listdir(index.path) if name.startswith("vectors")]
    fill(index, vectors[1000:], 1000)
    assert [name for name in os.listdir(index.path) if name.startswith("vectors")] == name
    assert len(index) == 1030
    np.testing.assert_array_equal(index.vectors(range(1, 1031)), vectors)
    index.compact()
    assert [name for name in os.listdir(index.path) if name.startswith("vectors")] != name
    np.testing.assert_array_equal(index.vectors(range(1, 1031)), vectors)


def test_removed_images_return_while_their_file_is_there(index, root, model) -> None:
    assert index.remove([1, 2, 12345]) == 2
    assert len(index) == 7
    assert index.update(root, model).added == 2
    assert sorted(index.ids().tolist()) == list(range(1, 10))


def test_place_that_cannot_hold_an_index(tmp_path, model) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .*--index"):
        EigenIndex.create(tmp_path / "file" / "index", model)


def test_closed_index_says_so(index) -> None:
    index.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        index.entry(1)
