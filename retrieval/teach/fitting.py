"""What a user's marks say about a query: the direction that ranks the good above the bad.

The fit lives in eigen-coordinates, on the vectors that the index ranks. Two estimates are averaged:
Rocchio's, shrunk by how many marks there are, and logistic regression pulled towards the query.
The first is better when few pictures are good, the second when many are. Held-out marks of the
user's own then decide whether the fit replaces the words at all. The constants were chosen on
training images (docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ALPHA", "Fit", "fit_direction", "roc_area"]

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


@dataclass(frozen=True, eq=False)
class Fit:
    """Where a query should point.

    Attributes:
        target: (r,) float64, unit norm.
        kept_text: the target is the query itself: the words alone order the user's own held-out
            marks as well as the fit does (better, while there are fewer than ten), or no picture
            is marked good (bad ones alone do not say what is wanted).
        before, after: area under the ROC curve of the held-out marks by the words alone and by
            the fit, 0..1; NaN for marks of one kind and for less than four.
    """

    target: npt.NDArray[np.float64]
    kept_text: bool
    before: float
    after: float


def fit_direction(c: npt.ArrayLike, good: npt.ArrayLike, bad: npt.ArrayLike) -> Fit:
    """Fit the direction of a query to marks.

    Args:
        c: (r,) eigen-coordinates of the query.
        good: (n, r) stored vectors of the pictures marked good.
        bad: (m, r) those marked bad.

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
