"""The look-up of taught queries against its equation, written slowly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.teach.lookup import (
    OTHER,
    SAME,
    LookedUp,
    Recalled,
    near_pictures,
    near_words,
)

LOW, HIGH = 0.5, 0.65


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def made(rng, count, dim, near=(LOW, HIGH)) -> LookedUp:
    inputs, targets = (unit(rng.normal(size=(count, dim)) + 1) for _ in range(2))
    return LookedUp(inputs, targets, np.tile(near, (count, 1)))


def parts(taught: LookedUp):
    return taught.inputs, taught.targets, taught.near


def slow(taught: LookedUp, x: np.ndarray) -> np.ndarray:
    """x' = unit(x + sum w (b - c) / max(1, sum w)); a taught query's own target near it."""
    length = np.linalg.norm(x)
    cosines = [float(x @ c / length / np.linalg.norm(c)) for c in taught.inputs]
    weights = [
        min(max((cosine - low) / (high - low), 0.0), 1.0)
        for cosine, (low, high) in zip(cosines, taught.near, strict=True)
    ]
    total = max(1.0, sum(weights))
    weights = [weight / total for weight in weights]
    if cosines:
        best = max(cosines)
        own = min(max((best - OTHER) / (SAME - OTHER), 0.0), 1.0)
        nearest = max(i for i, c in enumerate(cosines) if c >= best - (1 - SAME))
        weights = [weight * (1 - own) + own * (i == nearest) for i, weight in enumerate(weights)]
    moved = x / length
    for weight, c, b in zip(weights, taught.inputs, taught.targets, strict=True):
        moved = moved + weight * (b - c)
    return length * moved / np.linalg.norm(moved)


@settings(max_examples=60)
@given(
    st.integers(0, 12),
    st.integers(3, 40),
    st.integers(0, 10_000),
    st.sampled_from([np.float32, np.float64]),
    st.floats(0.1, 8.0),
)
def test_rows_move_as_the_equation_says(count, dim, seed, dtype, length):
    rng = np.random.default_rng(seed)
    taught = made(rng, count, dim)
    rows = unit(rng.normal(size=(5, dim)) + 1)
    if count:
        rows[0] = taught.inputs[0]
        rows[1] = unit(taught.inputs[0] + 0.05 * rows[1])
    rows = (length * rows).astype(dtype)
    found = taught.map(rows)
    assert found.dtype == np.float32
    for row, moved in zip(rows, found, strict=True):
        np.testing.assert_allclose(moved, slow(taught, row.astype(np.float64)), atol=2e-5 * length)


def test_a_taught_query_becomes_its_target_and_what_is_far_stays_to_the_bit():
    rng = np.random.default_rng(1)
    taught = made(rng, 30, 24)
    found = taught.map(taught.inputs)
    np.testing.assert_allclose(found, taught.targets, atol=1e-6)
    far = unit(np.linalg.svd(taught.inputs[:20])[2][20:])[:3].astype(np.float32)
    lone = LookedUp(*(rows[:20] for rows in parts(taught)))
    for length in (1, 1.7, 1e-3):
        np.testing.assert_array_equal(lone.map(length * far), (length * far).astype(np.float32))
    assert not lone.shares(far).any()


def test_a_row_alone_and_among_others_agree_and_nothing_is_no_direction():
    rng = np.random.default_rng(2)
    taught = made(rng, 9, 16)
    rows = np.concatenate([rng.normal(size=(20, 16)) + 1, np.zeros((1, 16))])
    bulk = taught.map(rows)
    for row, found in zip(rows, bulk, strict=True):
        np.testing.assert_allclose(taught.map(row[None])[0], found, atol=1e-6)
    assert not bulk[-1].any()


@given(st.permutations(range(6)), st.integers(0, 50))
@settings(max_examples=20)
def test_the_order_of_lessons_does_not_matter(order, seed):
    rng = np.random.default_rng(seed)
    taught = made(rng, 6, 12)
    order = list(order)
    other = LookedUp(*(rows[order] for rows in parts(taught)))
    rows = rng.normal(size=(8, 12)) + 1
    np.testing.assert_allclose(taught.map(rows), other.map(rows), atol=1e-6)


def test_shares_are_at_most_one_in_all_and_tell_the_map():
    rng = np.random.default_rng(3)
    taught = made(rng, 40, 10)
    rows = unit(rng.normal(size=(30, 10)) + 1)
    shares = taught.shares(rows)
    assert shares.min() >= 0
    assert shares.sum(1).max() <= 1 + 1e-12
    moved = unit(rows + shares @ (taught.targets - taught.inputs))
    np.testing.assert_allclose(taught.map(rows), moved, atol=1e-6)


def test_a_whole_query_gets_its_own_target_whatever_its_words_became():
    rng = np.random.default_rng(4)
    taught = made(rng, 3, 8)
    drifted = unit(taught.inputs[:1] + 0.3 * rng.normal(size=(1, 8)))
    found = taught.map(drifted, asked=taught.inputs[:1])
    np.testing.assert_allclose(found, taught.targets[:1], atol=1e-6)


def test_kinds_are_looked_up_among_their_own():
    rng = np.random.default_rng(5)
    words, pictures, mixed = (made(rng, 2, 8) for _ in range(3))
    taught = Recalled(words, pictures, mixed, (LOW, HIGH))
    c = pictures.inputs[:1]
    np.testing.assert_allclose(taught.recall("picture", c, c), pictures.targets[:1], atol=1e-6)
    np.testing.assert_array_equal(taught.map(c), words.map(c))
    np.testing.assert_array_equal(taught.recall("mixed", c, c), mixed.map(c, c))


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_near_is_a_range_of_cosines_whatever_there_is_to_measure_on(count):
    rng = np.random.default_rng(6)
    rows = unit(rng.normal(size=(count, 16)))
    for low, high in (near_words(rows), near_pictures(unit(np.ones(16)), rows)):
        assert 0 <= low < high <= OTHER


def test_words_are_near_above_what_unrelated_ones_have_in_common():
    rng = np.random.default_rng(7)
    tight = unit(rng.normal(size=(60, 16)) + 0.9)
    loose = unit(rng.normal(size=(60, 16)))
    assert near_words(tight)[0] > near_words(loose)[0] + 0.05
    cosines = (loose @ loose.T)[np.triu_indices(60, 1)]
    assert (cosines > near_words(loose)[0]).mean() < 0.01
