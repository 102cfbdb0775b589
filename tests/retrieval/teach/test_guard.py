"""The guard: what it compares, and when it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.teach import guard
from retrieval.teach.guard import Marks, agreements, best, overlap, protected_queries, verdict
from retrieval.teach.knowledge import Unchanged
from retrieval.teach.local_rule import Turned


def unit(rng, count, dim=8):
    rows = rng.normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_shipped_queries_are_about_two_hundred_different_ones():
    queries = protected_queries()
    assert 180 <= len(queries) <= 220
    assert len(set(queries)) == len(queries)
    assert all(query == " ".join(query.split()) and len(query) < 60 for query in queries)


def test_the_best_are_those_of_a_full_sort():
    rng = np.random.default_rng(0)
    queries, sample = unit(rng, 5), unit(rng, 300)
    chosen = best(Unchanged(), queries, sample)
    for row, q in zip(chosen, queries, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-(sample @ q))[:20])


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (4, 1), (60, 12), (100, 20)])
def test_in_small_collections_fewer_are_compared(size, count):
    rng = np.random.default_rng(0)
    chosen = best(Unchanged(), unit(rng, 3), unit(rng, size))
    assert chosen.shape == (3, size)
    assert chosen.sum(1).tolist() == [count] * 3


def test_overlap_is_the_share_that_stays():
    before = np.array([[True, True, False, False], [True, True, False, False]])
    after = np.array([[True, True, False, False], [False, True, True, False]])
    assert overlap(before, before) == 1
    assert overlap(before, after) == 0.75
    assert overlap(before, ~before) == 0
    assert overlap(before[:0], before[:0]) == 1


def test_agreement_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    good, bad, c = unit(rng, 4), unit(rng, 6), unit(rng, 1)[0]
    sample = unit(rng, 50)
    pairs = [[(g @ c > b @ c) for b in bad] for g in good]
    against_all = [[(g @ c > s @ c) for s in sample] for g in good]
    none = np.empty((0, 8), np.float32)
    found = agreements(
        Unchanged(),
        [Marks(c, good, bad), Marks(c, good, none), Marks(c, none, none), Marks(c, good, good)],
        sample,
    )
    assert found[0] == pytest.approx(np.mean(pairs))
    assert found[1] == pytest.approx(np.mean(against_all))
    assert np.isnan(found[2])
    assert found[3] == pytest.approx(0.5)
    assert agreements(Unchanged(), [], sample) == []


def test_agreement_sees_turns_and_the_spectrum():
    c = np.eye(8, dtype=np.float32)[0]
    good, bad = np.eye(8, dtype=np.float32)[1:2], np.eye(8, dtype=np.float32)[2:3]
    turn = np.eye(8)
    turn[[0, 1]] = turn[[1, 0]]
    marks = [Marks(c, good, bad)]
    assert agreements(Turned(turn, np.ones(8, np.float32)), marks, good) == [1.0]
    mixed = np.array([[0.6, 0.8, 0, 0, 0, 0, 0, 0], [0.8, 0, 0.6, 0, 0, 0, 0, 0]], np.float32)
    tilted = np.ones(8, np.float32)
    tilted[1], tilted[2] = 0.1, 10
    marks = [Marks(c, mixed[:1], mixed[1:])]
    assert agreements(Unchanged(), marks, good) == [0.0]
    assert agreements(Turned(np.eye(8), tilted), marks, good) == [1.0]


def test_the_verdict_has_numbers_and_one_line():
    assert verdict(1.0, [], queries=200) is None
    assert verdict(guard.LEAST_OVERLAP, [(0.9, 0.85)], queries=200) is None
    assert verdict(1.0, [(float("nan"), float("nan"))], queries=200) is None
    refused = verdict(0.5, [(0.9, 0.4), (float("nan"), 0.5)], queries=200)
    assert "50%" in refused
    assert "0.50" in refused
    assert "200" in refused
    assert "\n" not in refused
    # One query that is turned upside down is not averaged away by others that stay.
    steady = [(0.9, 0.9)] * 50
    assert verdict(1.0, [*steady, (0.95, 0.8)], queries=200) is None
    refused = verdict(1.0, [*steady, (0.95, 0.3)], queries=200)
    assert "a query taught earlier" in refused
    assert "0.65" in refused
