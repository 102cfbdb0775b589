"""Rule "local": projected steps on the last block's Q and Lambda."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.eigen_coordinates import EigenBasis, scores
from retrieval.teach.local_rule import LocalLesson, Turned, learn

DIM = 24


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def lesson(rng, good=5, bad=5, keep=False) -> LocalLesson:
    return LocalLesson(unit(rng, DIM), unit(rng, good, DIM), unit(rng, bad, DIM), keep)


def gap(mapping: Turned, each: LocalLesson) -> float:
    """Mean score of the good pictures above that of the bad ones."""
    q = mapping.map(each.c[None])[0]
    means = [
        scores(q, rows, mapping.delta).mean() if len(rows) else 0 for rows in (each.good, each.bad)
    ]
    return float(means[0] - means[1])


ANCHORS = unit(np.random.default_rng(9), 20, DIM)
NOTHING = Turned(np.eye(DIM), np.ones(DIM, np.float32))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12),
)
def test_the_turn_is_orthonormal_and_the_spectrum_positive(seed, counts):
    rng = np.random.default_rng(seed)
    lessons = [lesson(rng, good, bad) for good, bad in counts]
    learned = learn(lessons, ANCHORS)
    np.testing.assert_allclose(learned.R @ learned.R.T, np.eye(DIM), atol=1e-10)
    assert (learned.delta > 0).all()
    assert np.isfinite(learned.delta).all()
    assert np.log(learned.delta).mean() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("good", "bad"), [(5, 5), (5, 0), (0, 5), (1, 1), (1, 0), (100, 100)])
def test_marked_pictures_move_as_marked(good, bad):
    each = lesson(np.random.default_rng(1), good, bad)
    assert gap(learn([each], ANCHORS), each) > gap(NOTHING, each) + 1e-3


def test_many_lessons_move_together():
    rng = np.random.default_rng(2)
    lessons = [lesson(rng) for _ in range(8)]
    learned = learn(lessons, ANCHORS)
    gains = [gap(learned, each) - gap(NOTHING, each) for each in lessons]
    assert min(gains) > 0


def test_the_order_of_lessons_matters_only_to_rounding():
    rng = np.random.default_rng(3)
    lessons = [lesson(rng) for _ in range(6)]
    first, second = learn(lessons, ANCHORS), learn(lessons[::-1], ANCHORS)
    np.testing.assert_allclose(first.R, second.R, atol=1e-9)
    np.testing.assert_allclose(first.delta, second.delta, atol=1e-6)


def test_the_same_lessons_give_the_same_bits():
    lessons = [lesson(np.random.default_rng(4)) for _ in range(3)]
    first, second = learn(lessons, ANCHORS), learn(lessons, ANCHORS)
    assert first.R.tobytes() == second.R.tobytes()
    assert first.delta.tobytes() == second.delta.tobytes()


def test_kept_and_protected_queries_stay_closer_than_taught_ones():
    rng = np.random.default_rng(5)
    taught, kept = lesson(rng), lesson(rng, keep=True)
    learned = learn([taught, kept], ANCHORS)
    moved = [np.linalg.norm(learned.map(c[None])[0] - c) for c in (taught.c, kept.c)]
    protected = np.linalg.norm(learned.map(ANCHORS) - ANCHORS, axis=1).mean()
    assert moved[1] < moved[0] / 2
    assert protected < moved[0] / 2


def test_nothing_to_learn_changes_nothing():
    rng = np.random.default_rng(6)
    for lessons in ([], [lesson(rng, 0, 0)], [lesson(rng, keep=True)]):
        learned = learn(lessons, ANCHORS)
        np.testing.assert_array_equal(learned.R, np.eye(DIM))
        np.testing.assert_array_equal(learned.delta, np.ones(DIM))


def test_it_is_the_model_with_changed_weights():
    """Invariant 2: scores from the index equal those of images embedded with the new Q, Lambda."""
    rng = np.random.default_rng(7)
    for out, inputs, bias in ((40, 24, False), (24, 60, True), (24, 24, False)):
        weight = rng.normal(size=(out, inputs))
        b = rng.normal(size=out) if bias else None
        basis = EigenBasis.from_weight(weight, b)
        x, t = rng.normal(size=(50, inputs)), unit(rng, out)
        stored, c = basis.vectors(x), basis.query(t[None]).astype(np.float64)
        lessons = [
            LocalLesson(
                c[0] / np.linalg.norm(c), stored[:4].astype(float), stored[4:9].astype(float)
            )
        ]
        anchors = unit(rng, 10, basis.dim)
        learned = learn(lessons, anchors)
        Q, Lambda = basis.Q @ learned.R.T, basis.Lambda * learned.delta
        np.testing.assert_allclose(Q.T @ Q, np.eye(basis.dim), atol=1e-9)
        full = np.concatenate([x, np.ones((50, 1))], axis=1) if bias else x
        z = (full @ basis.P * Lambda) @ Q.T
        expected = z @ t / np.linalg.norm(z, axis=1)
        found = scores(learned.map(c)[0], stored, learned.delta)
        np.testing.assert_allclose(found, expected, atol=2e-6)
