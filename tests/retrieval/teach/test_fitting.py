"""Fits to marks, against slow and obvious ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from retrieval.teach import fitting
from retrieval.teach.fitting import fit_direction, roc_area


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def user(seed: int, good: int, bad: int, dim: int = 12, apart: float = 1.0):
    """A query, good pictures around a wanted direction near it, and bad ones around the query."""
    rng = np.random.default_rng(seed)
    query = unit(rng.standard_normal(dim))
    wanted = unit(query + apart * unit(rng.standard_normal(dim)))
    scatter = 0.3 * rng.standard_normal((good + bad, dim))
    centre = np.where(np.arange(good + bad)[:, None] < good, wanted, query)
    vectors = unit(centre + scatter)
    return query, vectors[:good], vectors[good:]


@given(
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    data=st.data(),
)
def test_roc_area_is_the_share_of_pairs_in_order(scores, data) -> None:
    good = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    values = np.array(scores, float)
    if good.all() or not good.any():
        assert np.isnan(roc_area(values, good))
    else:
        assert roc_area(values, good) == pytest.approx(roc_auc_score(good, values))


@pytest.mark.parametrize(("good", "bad", "dim"), [(3, 4, 12), (1, 9, 12), (20, 30, 5)])
def test_the_logistic_direction_is_the_minimum(good, bad, dim) -> None:
    query, liked, disliked = user(1, good, bad, dim)
    vectors = np.concatenate([liked, disliked])
    signs = np.where(np.arange(good + bad) < good, 1.0, -1.0)
    scale, pull = fitting._TEMPERATURE, fitting._PULL
    bias = fitting._BIAS * np.sqrt(1e3)

    def loss(w: np.ndarray) -> float:
        margin = signs * (vectors @ w[:-1] + bias * w[-1]) / scale
        away = w - np.append(query, 0.0)
        return np.logaddexp(0, -margin).sum() + pull / 2 * away @ away

    best = minimize(loss, np.append(query, 0.0), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(
        fitting._logistic(query, liked, disliked), unit(best[:-1]), atol=1e-5
    )


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6))
def test_held_out_scores_equal_fitting_again_without_each_mark(seed, good, bad) -> None:
    query, liked, disliked = user(seed, good, bad)
    vectors = np.concatenate([liked, disliked])
    is_good = np.arange(len(vectors)) < good
    expected = []
    for i in range(len(vectors)):
        rest = np.arange(len(vectors)) != i
        direction = fitting._rocchio(query, vectors[rest & is_good], vectors[rest & ~is_good])
        expected.append((vectors[i] - vectors.mean(0)) @ direction)
    np.testing.assert_allclose(
        fitting._held_out_scores(query, vectors, is_good), expected, atol=1e-12
    )


def test_marks_that_agree_move_the_query_towards_the_good() -> None:
    query, good, bad = user(2, 8, 8)
    fit = fit_direction(query, good, bad)
    assert not fit.kept_text
    assert fit.after > fit.before + 0.03
    assert np.linalg.norm(fit.target) == pytest.approx(1)
    fresh_good, fresh_bad = user(2, 200, 200)[1:]
    vectors = np.concatenate([fresh_good, fresh_bad])
    is_good = np.arange(400) < 200
    assert roc_area(vectors @ fit.target, is_good) > roc_area(vectors @ query, is_good) + 0.05


def test_the_words_are_kept_when_held_out_marks_do_not_prefer_the_fit() -> None:
    kept = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        query = unit(rng.standard_normal(12))
        noise = unit(rng.standard_normal((20, 12)))  # marks at random
        fit = fit_direction(query, noise[:8], noise[8:])
        kept += fit.kept_text
        if fit.kept_text:
            np.testing.assert_array_equal(fit.target, query / np.linalg.norm(query))
            assert fit.after <= fit.before + 0.03
    assert kept >= 20


def test_one_kind_of_marks() -> None:
    query, good, bad = user(3, 3, 3)
    only_good = fit_direction(query, good, bad[:0])
    assert not only_good.kept_text
    assert np.isnan(only_good.before)
    assert np.isnan(only_good.after)
    assert only_good.target @ good.mean(0) > query @ good.mean(0)
    assert only_good.target @ query > 0.7
    only_bad = fit_direction(query, good[:0], bad)
    assert only_bad.kept_text
    np.testing.assert_allclose(only_bad.target, query)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(0, 7), st.integers(0, 7), st.floats(1e-3, 1e3))
def test_order_and_length_of_the_query_do_not_matter(seed, good, bad, scale) -> None:
    query, liked, disliked = user(seed, good, bad)
    if not good + bad:
        with pytest.raises(ValueError, match="mark at least one picture"):
            fit_direction(query, liked, disliked)
        return
    first = fit_direction(query, liked, disliked)
    second = fit_direction(query * scale, liked[::-1], disliked[::-1])
    assert first.kept_text == second.kept_text
    np.testing.assert_allclose(first.target, second.target, atol=1e-7)
    again = fit_direction(query, liked, disliked)
    assert again.target.tobytes() == first.target.tobytes()


def test_thousands_of_marks_and_contradictions() -> None:
    query, good, bad = user(4, 4000, 6000, dim=32)
    assert np.isfinite(fit_direction(query, good, bad).target).all()
    assert fit_direction(query, good[:6], good[:6]).kept_text  # the same pictures good and bad


@pytest.mark.parametrize("where", ["query", "good", "bad"])
def test_what_is_not_finite_is_refused(where) -> None:
    query, good, bad = user(5, 2, 2)
    values = {"query": query, "good": good, "bad": bad}
    values[where] = np.full_like(values[where], np.nan)
    with pytest.raises(ValueError, match="no finite direction"):
        fit_direction(values["query"], values["good"], values["bad"])
    with pytest.raises(ValueError, match="no finite direction"):
        fit_direction(np.zeros_like(query), good, bad)
