"""What a user's marks say about a query: the direction that ranks the good above the bad.

The fit lives in eigen-coordinates, on the vectors that the index ranks. Two estimates are averaged:
Rocchio's, shrunk by how many marks there are, and logistic regression pulled towards the query.
The first is better when few pictures are good, the second when many are.

Where many marks are there and most are good, as in an album of what is looked for, both are centred
on the collection, in its own scale, and the words fade. Everywhere else, and for profiles under a
former rule, directions are taken from the origin, and held-out marks of the user's own decide
whether the fit replaces the words at all. The constants were chosen on images that the model never
saw (docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.teach.marks import TeachError

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex

__all__ = ["ALPHA", "Collection", "Fit", "fit_direction", "fit_marks", "roc_area"]

ALPHA = 0.01
"""Ridge of the map that absorbs the taught pairs (`enn_core.lessons.RidgeAdapter`)."""

# Rocchio: step of the good and of the bad mean, half of it at five marks.
_GOOD, _BAD, _HALF = 2.0, 0.6, 5.0
# Logistic regression: scale of a cosine, pull to the query, and the constant input of the bias.
_TEMPERATURE, _PULL, _BIAS = 0.5, 10.0, 0.2
_SHARE = 2.0  # of Rocchio's direction, against one of the logistic
# By how much a fit has to order held-out marks better than the words do (area under the ROC). Few
# marks are mostly ties: they only must not speak against it.
_MARGIN, _MARGIN_OF_FEW = 0.03, -0.05
_MANY, _FEWEST = 10, 4  # marks; below the fewest, holding one out says nothing

# Centred on the collection: steps to the good and from the bad mean, half of them at five marks;
# how fast the words fade with the excess of good marks; the regression's pull and how it eases.
_STEP_GOOD, _STEP_BAD = 4.0, 0.6
_FADE, _PULL_CENTRED, _EASE = 12.0, 0.8, 1.2
_FREE_BIAS = 1e-6
# Marks, and the share of good ones among them, from which on they are centred.
_CENTRED_FROM, _MOSTLY_GOOD = 20, 0.6
_FEWEST_AROUND = 50  # pictures of a collection that marks are centred on
_LEAST_SCALE = 1e-6  # of a collection that is more than one picture


@dataclass(frozen=True, eq=False)
class Fit:
    """Where a query should point.

    Attributes:
        target: (r,) float64, unit norm.
        kept_text: the target is the query itself: the words alone order the user's own held-out
            marks as well as the fit does (better, while there are fewer than ten), or no picture
            is marked good (bad ones alone do not say what is wanted).
        before, after: area under the ROC curve of the held-out marks by the words alone and by
            the fit, 0..1; NaN for marks of one kind, for less than four, and where they were not
            needed to decide.
    """

    target: npt.NDArray[np.float64]
    kept_text: bool
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Collection:
    """Where the vectors of a collection lie.

    Attributes:
        mean: (r,) of the stored vectors.
        covariance: (r, r).
    """

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


def _is_centred(good: int, bad: int) -> bool:
    """Whether so many marks are centred on the collection that they are of."""
    return good + bad >= _CENTRED_FROM and good >= _MOSTLY_GOOD * (good + bad)


def _around(index: EigenIndex) -> Collection | None:
    """What marks are centred on; None in a collection too small to say where pictures lie."""
    return Collection(*index.moments()) if len(index) >= _FEWEST_AROUND else None


def fit_marks(
    c: np.ndarray, good: np.ndarray, bad: np.ndarray, index: EigenIndex | None = None
) -> Fit | None:
    """`fit_direction` of the marks that there are, None without any.

    Args:
        c, good, bad: as `fit_direction`.
        index: where the pictures are, to centre marks on where that helps; None never does.

    Raises:
        TeachError: as `fit_direction` raises ValueError.
    """
    if not len(good) + len(bad):
        return None
    around = None
    if index is not None and _is_centred(len(good), len(bad)):
        around = _around(index)
    try:
        return fit_direction(c.astype(np.float64), good, bad, around)
    except ValueError as error:
        raise TeachError(str(error)) from None


def fit_direction(
    c: npt.ArrayLike,
    good: npt.ArrayLike,
    bad: npt.ArrayLike,
    collection: Collection | None = None,
) -> Fit:
    """Fit the direction of a query to marks.

    Args:
        c: (r,) eigen-coordinates of the query.
        good: (n, r) stored vectors of the pictures marked good.
        bad: (m, r) those marked bad.
        collection: that they are of; None fits from the origin, whatever the number of marks.

    Raises:
        ValueError: if there are no marks, shapes do not fit, or a value is not finite.
    """
    query = np.asarray(c, np.float64)
    liked = np.asarray(good, np.float64).reshape(-1, len(query))
    disliked = np.asarray(bad, np.float64).reshape(-1, len(query))
    length = np.linalg.norm(query)
    if not len(liked) + len(disliked):
        raise ValueError("no marks to learn from; mark at least one picture good or bad")
    values = (query, liked, disliked)
    if not all(np.isfinite(each).all() for each in values) or length == 0:
        raise ValueError("the query or a marked picture has no finite direction")
    query = query / length
    before = after = float("nan")
    if not len(liked):
        return Fit(query, True, before, after)
    if collection is not None and _is_centred(len(liked), len(disliked)):
        scale = float(np.trace(collection.covariance))
        if scale > _LEAST_SCALE:
            target = _centred(query, liked, disliked, collection, 1 / scale)
            return Fit(target, False, before, after)
    if len(disliked) and len(liked) + len(disliked) >= _FEWEST:
        vectors = np.concatenate([liked, disliked])
        is_good = np.arange(len(vectors)) < len(liked)
        before = roc_area(vectors @ query, is_good)
        after = roc_area(_held_out_scores(query, vectors, is_good), is_good)
        margin = _MARGIN if len(vectors) >= _MANY else _MARGIN_OF_FEW
        if after - before <= margin:
            return Fit(query, True, before, after)
    target = _rocchio(query, liked, disliked)
    if len(disliked):
        target = _unit(_SHARE * target + _logistic(query, liked, disliked))
    return Fit(target, False, before, after)


def _centred(
    query: np.ndarray, good: np.ndarray, bad: np.ndarray, collection: Collection, scale: float
) -> np.ndarray:
    """unit(2 r / sd(r) + k / sd(k)): Rocchio's r and logistic regression's k, each by its spread.

    r = t c + s [4 / (n + 5) sum_good (v - mean) - .6 / (m + 5) sum_bad (v - mean)] and
    k = t c / sd(c) + s sum_i a_i (v_i - mean), with s = 1 / tr(covariance), t = 1 / (1 + 12 e) and
    e the share of good marks above a half.
    """

    def spread(direction: np.ndarray) -> float:
        return max(float(np.sqrt(max(direction @ collection.covariance @ direction, 0))), 1e-12)

    excess = max(0.0, len(good) / (len(good) + len(bad)) - 0.5)
    words = 1 / (1 + _FADE * excess)
    liked, disliked = good - collection.mean, bad - collection.mean
    step = _STEP_GOOD / (len(good) + _HALF) * liked.sum(0)
    step = step - _STEP_BAD / (len(bad) + _HALF) * disliked.sum(0)
    r = words * query + scale * step
    if not len(bad):
        return _unit(r)
    marked = np.concatenate([liked, disliked])
    signs = np.where(np.arange(len(marked)) < len(good), 1.0, -1.0)
    start = words * query / spread(query)
    inputs = np.sqrt(scale) * marked
    pull = _PULL_CENTRED - _EASE * excess
    k = start + np.sqrt(scale) * _pulled_logistic(inputs, marked @ start, signs, pull)
    return _unit(2 * r / spread(r) + k / spread(k))


def _pulled_logistic(
    inputs: np.ndarray, offset: np.ndarray, signs: np.ndarray, pull: float
) -> np.ndarray:
    """(d,) w of min sum log(1 + exp(-y (offset + w.x + bias))) + pull/2 |w|^2, by Newton's method.

    Args:
        inputs: (n, d).
        offset: (n,).
        signs: (n,) 1 or -1.
        pull: towards 0; the bias is free.
    """
    count, dim = inputs.shape
    wide = count > dim
    basis = inputs if wide else inputs @ inputs.T  # w = beta, or inputs^T beta
    features = np.concatenate([basis, np.ones((count, 1))], axis=1)
    penalty = np.zeros((features.shape[1],) * 2)
    penalty[:-1, :-1] = pull * (np.eye(dim) if wide else basis)
    penalty[-1, -1] = _FREE_BIAS
    beta = np.zeros(features.shape[1])

    def loss(values: np.ndarray) -> float:
        margin = signs * (offset + features @ values)
        return float(np.logaddexp(0, -margin).sum() + values @ penalty @ values / 2)

    best = loss(beta)
    for _ in range(50):
        margin = signs * (offset + features @ beta)
        wrong = 0.5 * (1 - np.tanh(margin / 2))
        gradient = penalty @ beta - features.T @ (signs * wrong)
        curvature = (features.T * (wrong * (1 - wrong))) @ features + penalty
        curvature[np.diag_indices_from(curvature)] += 1e-9
        step = np.linalg.solve(curvature, gradient)
        while (now := loss(beta - step)) > best and np.abs(step).max() > 1e-12:
            step /= 2
        if now > best:
            break
        beta, gain, best = beta - step, best - now, now
        if gain <= 1e-12 * (1 + abs(best)):
            break
    return beta[:-1] if wide else inputs.T @ beta[:-1]


def roc_area(scores: np.ndarray, is_good: np.ndarray) -> float:
    """Share of (good, bad) pairs in the right order, ties counting half; NaN without pairs."""
    good, bad = scores[is_good], np.sort(scores[~is_good])
    if not len(good) or not len(bad):
        return float("nan")
    below = np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")
    return float(below.mean() / (2 * len(bad)))


def _unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def _rocchio(query: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    step = _GOOD / (len(good) + _HALF) * good.sum(0) - _BAD / (len(bad) + _HALF) * bad.sum(0)
    return _unit(query + step)


def _held_out_scores(query: np.ndarray, vectors: np.ndarray, is_good: np.ndarray) -> np.ndarray:
    """(N,) score of each mark by Rocchio's direction without that mark.

    Scores are taken from the mean of the marks: directions that lack different marks differ in
    their products with what all pictures share.
    """
    counts = {True: int(is_good.sum()), False: int((~is_good).sum())}
    sums = {kind: vectors[is_good == kind].sum(0) for kind in counts}
    steps = {True: _GOOD, False: -_BAD}
    whole = {kind: steps[kind] / (counts[kind] + _HALF) * sums[kind] for kind in counts}
    centred = vectors - vectors.mean(0)
    scores = np.empty(len(vectors))
    for kind in counts:
        rows = is_good == kind
        less = steps[kind] / (counts[kind] - 1 + _HALF) * (sums[kind] - vectors[rows])
        scores[rows] = np.einsum(
            "nr,nr->n", centred[rows], _unit(query + whole[not kind] + less), optimize=False
        )
    return scores


def _logistic(query: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Unit w of min sum log(1 + exp(-y (w.v + d) / t)) + pull/2 |w - query|^2, by Newton's method.

    w = query + V^T beta / t: one unknown per mark, and the bias d as a constant input.
    """
    count = len(good) + len(bad)
    vectors = np.concatenate([good, bad])
    signs = np.where(np.arange(count) < len(good), 1.0, -1.0)
    # The bias is one more coordinate, pulled towards 0 a thousand times less than the others.
    inputs = np.concatenate([vectors, np.full((count, 1), _BIAS * np.sqrt(1e3))], axis=1)
    wide = len(inputs) > inputs.shape[1]  # more marks than coordinates: solve for w itself
    basis = np.eye(inputs.shape[1]) if wide else inputs
    start = np.append(query, 0.0)
    features = inputs @ basis.T / _TEMPERATURE
    pull = _PULL * (basis @ basis.T)
    offset = inputs @ start / _TEMPERATURE
    beta = np.zeros(len(basis))

    def loss(values: np.ndarray) -> float:
        margin = signs * (offset + features @ values)
        return float(np.logaddexp(0, -margin).sum() + values @ pull @ values / 2)

    best = loss(beta)
    for _ in range(50):
        margin = signs * (offset + features @ beta)
        wrong = 0.5 * (1 - np.tanh(margin / 2))
        gradient = pull @ beta - features.T @ (signs * wrong)
        curvature = (features.T * (wrong * (1 - wrong))) @ features + pull
        curvature[np.diag_indices_from(curvature)] += 1e-9 * np.trace(curvature) / len(curvature)
        step = np.linalg.solve(curvature, gradient)
        while (now := loss(beta - step)) > best and np.abs(step).max() > 1e-12:
            step /= 2
        if now > best:
            break
        beta, gain, best = beta - step, best - now, now
        if gain <= 1e-12 * (1 + abs(best)):
            break
    return _unit((start + basis.T @ beta)[:-1])
