"""Invariants 2 and 4 of a profile: replay, order, undo, and what teaching amounts to."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from teaching_cases import PICTURES, bits, open_profile

from enn_core.lessons.adapter import RidgeAdapter
from retrieval.eigen_coordinates import scores
from retrieval.teach.fitting import ALPHA
from retrieval.teach.knowledge import Adapted

QUERIES = ["a dog", "two dogs", "2:car - person", "snow"]
RULES = pytest.mark.parametrize("rule", ["lookup", "adapter", "local"])

marks = st.dictionaries(st.integers(1, PICTURES), st.booleans(), min_size=1, max_size=6)
lesson = st.tuples(st.just("teach"), st.sampled_from(QUERIES), marks)
action = st.one_of(
    lesson,
    lesson,
    st.tuples(st.just("undo"), st.integers(0, 20)),
    st.tuples(st.just("forget"), st.sampled_from(QUERIES)),
    st.tuples(st.just("reopen")),
)
hypothesis_settings = settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def teach(searcher, query, signs, rule):
    good = [id_ for id_, sign in signs.items() if sign]
    bad = [id_ for id_, sign in signs.items() if not sign]
    return searcher.teach(query, good, bad, rule=rule, force=True)


@RULES
@hypothesis_settings
@given(actions=st.lists(action, min_size=1, max_size=9))
def test_after_anything_a_profile_equals_one_that_was_taught_what_is_left(
    gallery, profiles, rule, actions
):
    """Teach, undo anything, forget, close and open: the same as teaching what is active, in order.

    Replays give the same bits, marks the same values.
    """
    with tempfile.TemporaryDirectory() as folder:
        searcher = open_profile(gallery, path=Path(folder) / "one")
        taught: dict[int, tuple[str, dict[int, bool], bool]] = {}
        for kind, *arguments in actions:
            if kind == "teach":
                done = teach(searcher, *arguments, rule)
                taught[done.entry] = (*arguments, True)
            elif kind == "undo":
                active = [entry for entry, each in taught.items() if each[2]]
                if active:
                    chosen = active[arguments[0] % len(active)]
                    assert searcher.undo(chosen).entry == chosen
                    taught[chosen] = (*taught[chosen][:2], False)
            elif kind == "forget":
                gone = [entry for entry, each in taught.items() if each[0] == arguments[0]]
                assert searcher.forget(arguments[0]) == len(gone)
                for entry in gone:
                    del taught[entry]
            else:
                before = bits(searcher.teacher)
                searcher.close()
                searcher = open_profile(gallery, path=Path(folder) / "one")
                assert bits(searcher.teacher) == before
        assert [(e.entry, e.active) for e in searcher.history()] == [
            (entry, each[2]) for entry, each in taught.items()
        ]
        with open_profile(gallery, path=Path(folder) / "two") as fresh:
            for query, signs, active in taught.values():
                if active:
                    teach(fresh, query, signs, rule)
            assert bits(fresh.teacher) == bits(searcher.teacher)
            for query in QUERIES:
                assert fresh.teacher.marks(query) == searcher.teacher.marks(query)
        searcher.close()


@RULES
@hypothesis_settings
@given(lessons=st.permutations(QUERIES), seed=st.integers(0, 1000))
def test_the_order_of_queries_does_not_matter(gallery, profiles, rule, lessons, seed):
    rng = np.random.default_rng(seed)
    signs = {
        query: {int(id_): bool(rng.integers(2)) for id_ in rng.choice(PICTURES, 6, False) + 1}
        for query in QUERIES
    }
    results = []
    for order in (QUERIES, lessons):
        with (
            tempfile.TemporaryDirectory() as folder,
            open_profile(gallery, path=Path(folder) / "one") as searcher,
        ):
            for query in order:
                teach(searcher, query, signs[query], rule)
            rows = searcher.teacher.map(np.eye(16))
            results.append((rows, searcher.teacher.delta))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    if rule == "local":
        np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-6)


@hypothesis_settings
@given(lessons=st.lists(st.tuples(st.sampled_from(QUERIES), marks), min_size=1, max_size=5))
def test_the_adapter_is_the_closed_form_on_the_stored_pairs(gallery, profiles, lessons):
    with (
        tempfile.TemporaryDirectory() as folder,
        open_profile(gallery, path=Path(folder) / "one") as searcher,
    ):
        for query, signs in lessons:
            teach(searcher, query, signs, "adapter")
        held = searcher.teacher._state.current.values()
        A, B = (
            np.stack([event.arrays[name].astype(np.float64) for event in held], axis=1)
            for name in ("c", "b")
        )
        c = searcher.query_vector("a dog", taught=False).astype(np.float64)
        power = searcher.teacher.mapping.adapter.power

        def kernel(x, y):
            sizes = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
            return sizes * (x.T @ y / sizes) ** power

        weights = np.linalg.solve(kernel(A, A) + ALPHA * np.eye(A.shape[1]), kernel(A, c[:, None]))
        Mc = c + (B - A) @ weights[:, 0]
        cosines = A.T @ c / np.linalg.norm(A, axis=0)
        share = np.clip((cosines.max() - 0.98) / (1 - 1e-6 - 0.98), 0, 1)
        if share:  # the query was taught itself, or is nearly one that was: its own target
            own, target = (rows[:, cosines.argmax()] for rows in (A, B))
            own_weights = np.linalg.solve(
                kernel(A, A) + ALPHA * np.eye(A.shape[1]), kernel(A, own[:, None])
            )
            Mc += share * (target - own - (B - A) @ own_weights[:, 0])
        expected = Mc * np.linalg.norm(c) / np.linalg.norm(Mc)
        np.testing.assert_allclose(searcher.query_vector("a dog"), expected, atol=1e-6)
        # Invariant 2: it is the model whose text side gives M c instead of c.
        basis, index = searcher.model.basis, searcher.index
        t = basis.Q @ Mc
        t /= np.linalg.norm(t)
        ids = index.ids()
        z = index.vectors(ids).astype(np.float64) @ basis.Q.T  # unit, as the images' embeddings
        found = dict(index.search(searcher.query_vector("a dog"), len(ids)))
        cosines = (z @ t) * np.linalg.norm(c)
        np.testing.assert_allclose([found[int(id_)] for id_ in ids], cosines, atol=2e-6)


@pytest.mark.parametrize("length", [1, 1.7])
def test_a_query_near_a_taught_one_gets_a_share_of_its_target(length):
    """All of it at the taught query, none from a cosine of 0.98 on, linear between."""
    taught, target, across = np.eye(5)[:3]
    adapter = RidgeAdapter(5, alpha=1.0).with_pairs(taught[None], target[None])
    mapping = Adapted(adapter, taught[None], target[None])
    missed = target - adapter.apply(taught)
    assert np.linalg.norm(missed) > 0.05
    for cosine, share in ((1, 1), (0.995, 0.75), (0.99, 0.5), (0.985, 0.25), (0.98, 0), (0.9, 0)):
        row = length * (cosine * taught + np.sqrt(1 - cosine**2) * across)
        expected = adapter.apply(row) + share * length * missed
        expected *= length / np.linalg.norm(expected)
        np.testing.assert_allclose(mapping.map(row[None])[0], expected, atol=1e-4)


def test_searching_uses_what_the_local_rule_learned(searcher):
    searcher.teach("a dog", [1, 2, 3], [4, 5], rule="local", force=True)
    ids = searcher.index.ids()
    stored = searcher.index.vectors(ids)
    expected = scores(searcher.query_vector("a dog"), stored, searcher.teacher.delta)
    hits = searcher.search("a dog", k=len(ids))
    assert [hit.id for hit in hits] == ids[np.argsort(-expected, kind="stable")].tolist()
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], atol=2e-6)
