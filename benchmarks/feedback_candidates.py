"""Candidates for learning more from the same marks: fits, checks that guard them, and a look-up.

What the package ships is among them by its own code; the others are here alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from feedback_methods import (
    Answers,
    Method,
    Ranking,
    Scene,
    Task,
    logistic,
    ours,
    ours_unguarded,
    rocchio,
    unit,
)

from enn_core.lessons.adapter import RidgeAdapter
from retrieval.teach.fitting import ALPHA, Collection, _held_out_scores, fit_direction, roc_area
from retrieval.teach.guard import encode_protected
from retrieval.teach.knowledge import Adapted
from retrieval.teach.lookup import LookedUp, near_words

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, "Moments"], np.ndarray]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (r,) and covariance (r, r) of a collection."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Moments:
        return cls(vectors.mean(0), np.cov(vectors.T, bias=True))


def plain(fit: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Fit:
    return lambda c, good, bad, moments: fit(c, good, bad)


def fit_s(c: np.ndarray, good: np.ndarray, bad: np.ndarray, moments: Moments) -> np.ndarray:
    """Fit S: centred on the collection; the words fade where most marks are good."""
    if not len(good):
        return unit(c)
    mean, covariance = moments.mean, moments.covariance
    scale = 1 / np.trace(covariance)
    excess = max(0.0, len(good) / (len(good) + len(bad)) - 0.5)
    words = 1 / (1 + 12 * excess)
    pull = 0.8 - 1.2 * excess
    liked, disliked = good - mean, bad - mean
    step = 4 / (len(good) + 5) * liked.sum(0)
    if len(bad):
        step = step - 0.6 / (len(bad) + 5) * disliked.sum(0)
    r = words * c + scale * step
    if not len(bad):
        return unit(r)
    spread = np.sqrt(c @ covariance @ c)
    marked = np.concatenate([liked, disliked])
    signs = np.where(np.arange(len(marked)) < len(good), 1.0, -1.0)
    kernel = scale * marked @ marked.T
    alpha = _kernel_logistic(kernel, words * (marked @ c) / spread, signs, pull)
    k = words * c / spread + scale * alpha @ marked
    return unit(2 * r / np.sqrt(r @ covariance @ r) + k / np.sqrt(k @ covariance @ k))


def _kernel_logistic(
    kernel: np.ndarray, offset: np.ndarray, signs: np.ndarray, pull: float
) -> np.ndarray:
    """(n,) dual weights of logistic regression with a free bias, by Newton's method."""
    count = len(signs)
    features = np.concatenate([kernel, np.ones((count, 1))], axis=1)
    penalty = np.zeros((count + 1, count + 1))
    penalty[:count, :count] = pull * kernel
    penalty[count, count] = 1e-6
    weights = np.zeros(count + 1)

    def loss(values: np.ndarray) -> float:
        margin = signs * (offset + features @ values)
        return float(np.logaddexp(0, -margin).sum() + values @ penalty @ values / 2)

    best = loss(weights)
    for _ in range(30):
        margin = signs * (offset + features @ weights)
        wrong = 0.5 * (1 - np.tanh(margin / 2))
        gradient = penalty @ weights - features.T @ (signs * wrong)
        curvature = (features.T * (wrong * (1 - wrong))) @ features + penalty
        curvature[np.diag_indices_from(curvature)] += 1e-9
        step = np.linalg.solve(curvature, gradient)
        while (now := loss(weights - step)) > best and np.abs(step).max() > 1e-10:
            step /= 2
        if now > best:
            break
        weights, gain, best = weights - step, best - now, now
        if gain < 1e-10:
            break
    return weights[:count]


def facts(
    c: np.ndarray, good: np.ndarray, bad: np.ndarray, b: np.ndarray, moments: Moments
) -> np.ndarray:
    """What a gate may look at: log of the good marks, gain in held-out order, cosine, share."""
    gain = 0.0
    if len(good) > 1 and len(bad) > 1:
        marked = np.concatenate([good, bad])
        is_good = np.arange(len(marked)) < len(good)
        held = leave_one_out(c, marked, is_good, moments)
        gain = roc_area(held, is_good) - roc_area(marked @ c, is_good)
    share = len(good) / max(1, len(good) + len(bad))
    return np.array([1.0, np.log1p(len(good)), gain, float(unit(c) @ b), share])


def leave_one_out(
    c: np.ndarray, marked: np.ndarray, is_good: np.ndarray, moments: Moments
) -> np.ndarray:
    """(n,) score of each mark, from the mean of the marks, by fit S without it."""
    centre = marked.mean(0)
    found = np.empty(len(marked))
    for i in range(len(marked)):
        rest = np.arange(len(marked)) != i
        b = fit_s(c, marked[rest & is_good], marked[rest & ~is_good], moments)
        found[i] = (marked[i] - centre) @ b
    return found


PROTOTYPE = np.array([2.137, -0.730, -1.722, -2.241, 0.0])
"""Weights of the prototype's gate, in the order of `facts`."""


def gated(weights: np.ndarray, most: float, fit: Fit = fit_s, other: Fit | None = None) -> Fit:
    """A fit that is taken where its chance of harm is small, else another one or the words."""

    def choose(c: np.ndarray, good: np.ndarray, bad: np.ndarray, moments: Moments) -> np.ndarray:
        b = fit(c, good, bad, moments)
        if 1 / (1 + np.exp(-facts(c, good, bad, b, moments) @ weights)) < most:
            return b
        return unit(c) if other is None else other(c, good, bad, moments)

    return choose


def checked(fit: Fit = fit_s) -> Fit:
    """A fit where the shipped one passes its own check."""

    def choose(c: np.ndarray, good: np.ndarray, bad: np.ndarray, moments: Moments) -> np.ndarray:
        if fit_direction(c, good, bad).kept_text:
            return unit(c)
        return fit(c, good, bad, moments)

    return choose


def new(c: np.ndarray, good: np.ndarray, bad: np.ndarray, moments: Moments) -> np.ndarray:
    """What profiles under the rule "lookup" learn by."""
    return fit_direction(c, good, bad, Collection(moments.mean, moments.covariance)).target


def trusted(c: np.ndarray, good: np.ndarray, bad: np.ndarray, moments: Moments) -> np.ndarray:
    """S from six good marks on, or where held-out marks are ordered clearly better; else words."""
    if len(good) + len(bad) < 10:
        return ours(c, good, bad)
    b = fit_s(c, good, bad, moments)
    clearly = facts(c, good, bad, b, moments)[2] >= 0.2
    return b if len(good) >= 6 or clearly else unit(c)


def mixed(share: float) -> Fit:
    """Part of fit S and the rest of the shipped one, where that passes its check."""

    def choose(c: np.ndarray, good: np.ndarray, bad: np.ndarray, moments: Moments) -> np.ndarray:
        shipped = fit_direction(c, good, bad)
        if shipped.kept_text:
            return unit(c)
        return unit(share * fit_s(c, good, bad, moments) + (1 - share) * shipped.target)

    return choose


def nearest_mark(c: np.ndarray, good: np.ndarray, bad: np.ndarray, moments: Moments) -> np.ndarray:
    """Not 1-NN itself, which is no direction: the good mark nearest to the words, beside them."""
    if not len(good):
        return unit(c)
    return unit(unit(c) + good[np.argmax(good @ c)])


def held_out_gain(c: np.ndarray, good: np.ndarray, bad: np.ndarray) -> float:
    """The shipped check's own number."""
    marked = np.concatenate([good, bad])
    is_good = np.arange(len(marked)) < len(good)
    return roc_area(_held_out_scores(unit(c), marked, is_good), is_good) - roc_area(
        marked @ unit(c), is_good
    )


def absorbed(fit: Fit, how: str) -> Method:
    """Targets of a fit, by the ridge of former profiles, or looked up."""

    def method(scene: Scene, tasks: Sequence[Task]) -> Answers:
        moments = Moments.of(scene.vectors)
        near = near_words(encode_protected(scene.model))
        targets, seconds = [], []
        for task in tasks:
            started = time.perf_counter()
            marks = scene.vectors[task.good], scene.vectors[task.bad]
            targets.append(fit(task.c, *marks, moments))
            seconds.append(time.perf_counter() - started)
        a, b = np.stack([task.c for task in tasks]), np.stack(targets)

        def ranking(rows: slice) -> Ranking:
            if how == "look-up":
                return Ranking(LookedUp(a[rows], b[rows], np.tile(near, (len(a[rows]), 1))).map)
            adapter = RidgeAdapter.of_pairs(a.shape[1], a[rows], b[rows], alpha=ALPHA)
            return Ranking(Adapted(adapter, a[rows], b[rows]).map)

        alone: list[Ranking | None] = [ranking(slice(i, i + 1)) for i in range(len(a))]
        kept = [bool(np.allclose(unit(t.c), x)) for t, x in zip(tasks, b, strict=True)]
        return Answers(alone, ranking(slice(None)), seconds, kept, bytes=4 * b.size)

    return method


SHIPPED, LOOKED_UP = "shipped: our fit, ridge", "our fit, look-up"
NEW = "new: S where most marks are good, look-up"

CANDIDATES: dict[str, Method] = {
    SHIPPED: absorbed(plain(ours), "ridge"),
    LOOKED_UP: absorbed(plain(ours), "look-up"),
    NEW: absorbed(new, "look-up"),
    "S from six good marks, look-up": absorbed(trusted, "look-up"),
    "our fit without its check, look-up": absorbed(plain(ours_unguarded), "look-up"),
    "S, look-up": absorbed(fit_s, "look-up"),
    "S, prototype's gate .25, look-up": absorbed(gated(PROTOTYPE, 0.25), "look-up"),
    "S where our fit passes its check, look-up": absorbed(checked(), "look-up"),
    "half S, half our fit, look-up": absorbed(mixed(0.5), "look-up"),
    "Rocchio, look-up": absorbed(plain(rocchio), "look-up"),
    "logistic, look-up": absorbed(plain(logistic(0.5, 10.0, 0.2)), "look-up"),
    "words and nearest good mark, look-up": absorbed(nearest_mark, "look-up"),
}
