"""Fits to marks, against slow and obvious ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from retrieval.teach import fitting
from retrieval.teach.fitting import Collection, fit_direction, roc_area


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


# --- centred on the collection -------------------------------------------------------------------


def crowd(rng, count=300, dim=12):
    """A collection whose pictures share a direction, a query, and what is good for it."""
    vectors = rng.normal(size=(count, dim)) * np.linspace(1, 0.2, dim) + 2 * np.eye(dim)[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = vectors @ rng.normal(size=dim)
    c = rng.normal(size=dim)
    return vectors, c / np.linalg.norm(c), wanted > np.quantile(wanted, 0.7)


def collection_of(vectors) -> Collection:
    return Collection(vectors.mean(0), np.cov(vectors.T, bias=True))


def slow_centred(c, good, bad, around):
    """The equations, each sum as it stands, and a general minimiser."""
    mean, cov = around.mean, around.covariance
    s = 1 / np.trace(cov)
    e = max(0.0, len(good) / (len(good) + len(bad)) - 0.5)
    t, pull = 1 / (1 + 12 * e), 0.8 - 1.2 * e
    r = t * c
    r = r + s * 4 / (len(good) + 5) * sum(v - mean for v in good)
    r = r - s * 0.6 / (len(bad) + 5) * sum(v - mean for v in bad)
    marked = [(v - mean, 1) for v in good] + [(v - mean, -1) for v in bad]
    start = t * c / np.sqrt(c @ cov @ c)

    def loss(values):
        w, bias = values[:-1], values[-1]
        margins = [y * (start @ v + np.sqrt(s) * w @ v + bias) for v, y in marked]
        return sum(np.logaddexp(0, -m) for m in margins) + pull / 2 * w @ w + 5e-7 * bias**2

    found = minimize(loss, np.zeros(len(c) + 1), method="BFGS", options={"gtol": 1e-8})
    k = start + np.sqrt(s) * found.x[:-1]
    b = 2 * r / np.sqrt(r @ cov @ r) + k / np.sqrt(k @ cov @ k)
    return b / np.linalg.norm(b)


@pytest.mark.parametrize(("good", "bad"), [(6, 4), (8, 20), (20, 5), (3, 30), (10, 1)])
def test_the_centred_fit_is_its_equations(good, bad):
    rng = np.random.default_rng(good)
    vectors, c, is_good = crowd(rng)
    around = collection_of(vectors)
    liked, disliked = vectors[is_good][:good], vectors[~is_good][:bad]
    found = fitting._centred(c, liked, disliked, around, 1 / np.trace(around.covariance))
    np.testing.assert_allclose(found, slow_centred(c, liked, disliked, around), atol=2e-4)


def test_more_marks_than_coordinates_give_the_same_regression():
    rng = np.random.default_rng(3)
    inputs, offset = rng.normal(size=(40, 8)), rng.normal(size=40)
    signs = np.where(rng.random(40) < 0.5, 1.0, -1.0)
    wide = fitting._pulled_logistic(inputs, offset, signs, 0.7)
    padded = np.concatenate([inputs, np.zeros((40, 60))], axis=1)
    narrow = fitting._pulled_logistic(padded, offset, signs, 0.7)
    np.testing.assert_allclose(narrow[:8], wide, atol=1e-6)
    assert not narrow[8:].any()


@pytest.mark.parametrize(
    ("good", "bad"), [(3, 2), (9, 0), (1, 8), (18, 1), (11, 9), (5, 20), (12, 7)]
)
def test_few_marks_and_mostly_bad_ones_are_fitted_from_the_origin_as_before(good, bad):
    rng = np.random.default_rng(5)
    vectors, c, is_good = crowd(rng)
    marks = vectors[is_good][:good], vectors[~is_good][:bad]
    with_it, without = (fit_direction(c, *marks, a) for a in (collection_of(vectors), None))
    np.testing.assert_array_equal(with_it.target, without.target)
    assert with_it.kept_text == without.kept_text


@pytest.mark.parametrize(("good", "bad"), [(12, 8), (20, 0), (60, 5)])
def test_many_marks_of_which_most_are_good_are_centred(good, bad):
    rng = np.random.default_rng(5)
    vectors, c, is_good = crowd(rng)
    around = collection_of(vectors)
    marks = vectors[is_good][:good], vectors[~is_good][:bad]
    fit = fit_direction(3 * c, *marks, around)
    wanted = fitting._centred(c, *marks, around, 1 / np.trace(around.covariance))
    np.testing.assert_allclose(fit.target, wanted, atol=1e-12)
    assert not fit.kept_text


def test_a_collection_of_one_picture_and_thousands_of_marks_are_no_trouble():
    rng = np.random.default_rng(6)
    vectors, c, is_good = crowd(rng, count=4000)
    same = Collection(vectors[0], np.zeros((12, 12)))
    marks = vectors[is_good][:18], vectors[~is_good][:8]
    found, origin = (fit_direction(c, *marks, a).target for a in (same, None))
    np.testing.assert_array_equal(found, origin)
    around = collection_of(vectors)
    for liked, disliked in ((1000, 500), (2, 2500), (1000, 0)):
        fit = fit_direction(c, vectors[is_good][:liked], vectors[~is_good][:disliked], around)
        assert np.linalg.norm(fit.target) == pytest.approx(1)
