"""Indexes and search profiles that version 0.1 wrote."""

from __future__ import annotations

import numpy as np
import pytest
from index_cases import (
    TinyTestModel,
    assert_like_fresh,
    assert_same_ranking,
    assert_sound,
    queries,
    ranking,
)
from teaching_cases import open_profile

from retrieval.index.eigen_index import EigenIndex
from retrieval.teach.teacher import Teacher


@pytest.fixture
def photos(v0_1):
    return v0_1 / "photos"


def test_an_index_opens_and_answers_as_it_did(photos, expected):
    want = expected["index"]
    model = TinyTestModel()
    with EigenIndex.open(photos, model=model) as index:
        assert {entry.path: entry.id for entry in index.entries("indexed")} == want["ids"]
        assert [[entry.path, entry.error] for entry in index.skipped()] == want["skipped"]
        assert [entry.path for entry in index.entries("deleted")] == want["deleted"]
        assert {k: v for k, v in index.manifest.items() if k != "probe"} == {
            k: v for k, v in want["manifest"].items() if k != "probe"
        }
        assert index.root == photos
        assert_same_ranking(ranking(index, queries()[0]), [tuple(row) for row in want["ranking"]])
        assert_sound(index, photos)


def test_an_index_goes_on(photos, expected, tmp_path):
    model = TinyTestModel()
    with EigenIndex.open(photos, model=model) as index:
        report = index.update(None, model)
        assert (report.embedded, report.added, report.deleted, report.total) == (0, 0, 0, 24)
        (photos / "7.png").unlink()
        index.update(None, model)
        assert index.ids().tolist() == sorted(
            id_ for path, id_ in expected["index"]["ids"].items() if path != "7.png"
        )
        assert_like_fresh(index, photos, tmp_path / "fresh")


def test_an_exported_index_is_imported(v0_1, expected, tmp_path):
    from retrieval.index.parquet import import_parquet
    from retrieval.index.writer import Writer

    with EigenIndex.create(tmp_path / "new", TinyTestModel()) as index:
        with Writer(index.path, index._manifest) as writer:
            assert import_parquet(writer, v0_1 / "index.parquet") == 24
        index.refresh()
        want = [tuple(row) for row in expected["index"]["ranking"]]
        assert_same_ranking(ranking(index, queries()[0]), want)


def test_a_profile_knows_what_it_was_taught(photos, expected):
    want = expected["profile"]
    with open_profile(photos, "me") as searcher:
        assert [[h.entry, h.query, h.active] for h in searcher.history()] == want["history"]
        for query, marks in want["marks"].items():
            found = sorted(searcher.teacher.marks(query, searcher.index).items())
            assert [list(mark) for mark in found] == marks
        rows = np.random.default_rng(5).normal(size=(2, 16))
        np.testing.assert_allclose(searcher.teacher.map(rows), want["map"], atol=1e-5)
        hits = searcher.search("a red thing", k=24)
        assert [hit.id for hit in hits] == [id_ for id_, _ in want["ranking"]]
        np.testing.assert_allclose(
            [hit.score for hit in hits], [score for _, score in want["ranking"]], atol=1e-5
        )
        searcher.teach("a new thing", list(expected["index"]["ids"].values())[:2], force=True)
        assert [h.entry for h in searcher.history()] == [1, 2, 3, 5]


def test_exported_lessons_are_the_profile(v0_1, tmp_path):
    model = TinyTestModel()
    rows = np.random.default_rng(5).normal(size=(2, 16))
    with Teacher.open(model, "me") as me, Teacher.open(model, "you") as you:
        assert you.import_(v0_1 / "lessons.json") == 3
        assert you.map(rows).tobytes() == me.map(rows).tobytes()
        assert [(h.query, h.active) for h in you.history()] == [
            (h.query, h.active) for h in me.history()
        ]
