"""What a user's marks say about a query: the direction that ranks the good above the bad.

The fit lives in eigen-coordinates, on the vectors that the index ranks. It is pulled towards the
words of the query, since ten marks cannot outvote a trained model in hundreds of dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ALPHA", "ANCHOR_WEIGHT", "Fit", "fit_direction"]

ALPHA = 0.1
"""Ridge of the map that absorbs the taught pairs."""
ANCHOR_WEIGHT = 0.1
"""Weight of one protected query, relative to a taught one."""

_TEMPERATURE = 0.05
_PULL = 1.0
_ROCCHIO_GOOD, _ROCCHIO_BAD = 0.5, 0.15


@dataclass(frozen=True, eq=False)
class Fit:
    """Where a query should point.

    Attributes:
        target: (r,) float64, unit norm.
        kept_text: the words alone agree with the user's own held-out marks at least as well, so
            the target is the query itself.
        before, after: area under the ROC curve of the held-out marks by the words alone and by
            the fit, 0..1; NaN where there are too few marks to hold any out.
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
    target = _direction(query, liked, disliked)
    return Fit(target, False, float("nan"), float("nan"))


def _direction(query: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    if not len(good) or not len(bad):
        target = query.copy()
        if len(good):
            target += _ROCCHIO_GOOD * good.mean(0)
        if len(bad):
            target -= _ROCCHIO_BAD * bad.mean(0)
        return target / np.linalg.norm(target)
    vectors = np.concatenate([good, bad])
    signs = np.concatenate([np.ones(len(good)), -np.ones(len(bad))])
    return _logistic(query, vectors, signs)


def _logistic(query: np.ndarray, vectors: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Unit minimiser of sum log(1 + exp(-y w.v / t)) + pull / 2 |w - query|^2, by Newton's method.

    The solution is query + V^T beta: n unknowns instead of r.
    """
    gram = vectors @ vectors.T / _TEMPERATURE**2
    offset = vectors @ query / _TEMPERATURE
    beta = np.zeros(len(vectors))
    for _ in range(50):
        margin = signs * (offset + gram @ beta)
        wrong = 0.5 * (1 - np.tanh(margin / 2))
        gradient = _PULL * beta - signs * wrong
        curvature = np.maximum(wrong * (1 - wrong), 1e-12)
        step = np.linalg.solve(_PULL * np.eye(len(beta)) + curvature[:, None] * gram, gradient)
        beta -= step
        if np.abs(step).max() <= 1e-12:
            break
    target = query + vectors.T @ beta / _TEMPERATURE
    return target / np.linalg.norm(target)
