"""The rule by which labelled scans of a site correct its other scans: a protected ridge regression.

What is wrong with a predicted age, `age - raw`, is regressed on what the last blocks make of the
scan, and on that times the raw age: the last heads get other weights, which may rise or fall with
age, in closed form. The prior is that of orthogonal weight modification: directions in which the
training scans vary are held by the projector `P = (I + n Sigma / alpha)^-1` of their summary
statistics. So what is learnt lies where the site differs from them: an offset shared by all scans
of the site, and what of their errors the rest of their features explains; scans like those of the
training hardly move.

>>> import numpy as np
>>> from neuro.age.population import summarise
>>> known = np.random.default_rng(0).normal(size=(40, 6)) * [3, 2, 1, 0.1, 0.1, 0.1]
>>> site = known[:4] + [0, 0, 0, 0, 0, 2]
>>> taught = Taught(site, np.full(4, 50.0), np.full(4, 58.0))
>>> correction = Correction.fit(summarise(known, rank=3), taught)
>>> raw = np.full(2, 50.0)
>>> correction(known[4:6] + [0, 0, 0, 0, 0, 2], raw).round(1)  # another two scans of the site
array([7.8, 7.9])
>>> correction(known[4:6], raw).round(1)                       # the same people elsewhere
array([-0. ,  0.1])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuro.age.population import Population

__all__ = ["MOST_MOVED", "Correction", "Taught"]

MOST_MOVED = 3.0
"""Years (root mean square) by which ages of scans like those of the training may move at most."""

# Both chosen on synthetic sites of other strengths than those reported: docs/decisions.md.
# Of the total variance: the smaller, the tighter the training scans' directions are held.
_ALPHA = 0.1
# In units of what a training scan has beside the held directions: the larger, the less is learnt.
_RIDGE = 2.5
# Variance of what rises with age beside what does not.
_WITH_AGE = 0.5
_MIDDLE, _SPREAD = 50.0, 15.0  # of adults' ages, years: the unit of "with age"


@dataclass(frozen=True)
class Taught:
    """Labelled scans.

    Attributes:
        features: (n, d) of `features_of`.
        raw: (n,) ages by the model alone.
        ages: (n,) that were told.
    """

    features: npt.NDArray[np.floating]
    raw: npt.NDArray[np.float64]
    ages: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Correction:
    """Years to add to a raw age, linear in the scan's features.

    Attributes:
        population: what is protected.
        weights: (2, d) of the centred features, and of these times the raw age in spreads from the
            middle; float64.
    """

    population: Population
    weights: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, population: Population, taught: Taught) -> Correction:
        """The ridge regression, in dual form; the same scans in the same order give the same bits.

        Sums are made by `einsum`, never by BLAS, whose bits depend on the number of threads.
        """
        rows = taught.features.astype(np.float64) - population.mean
        basis = population.basis.astype(np.float64)
        total = float(population.variances.sum()) + population.rest
        seen = population.count * population.variances
        held = seen / (_ALPHA * total + seen)
        along = np.einsum("nd,kd->nk", rows, basis)
        kernel = np.einsum("nd,md->nm", rows, rows) - np.einsum("nk,k,mk->nm", along, held, along)
        unit = float(((1 - held) * population.variances).sum()) + population.rest
        if not unit > 0:
            raise ValueError("the training scans are all alike; nothing can be told from them")
        z = _old(taught.raw)
        kernel = (kernel + kernel.T) / (2 * unit) * (1 + _WITH_AGE * z[:, None] * z)
        dual = _solve(kernel + _RIDGE * np.eye(len(rows)), taught.ages - taught.raw)
        duals = np.stack([dual, _WITH_AGE * z * dual])
        moved = np.einsum("an,nd->ad", duals, rows)
        moved -= np.einsum("ak,kd->ad", np.einsum("an,nk->ak", duals, along) * held, basis)
        return cls(population, moved / unit)

    def __call__(
        self, features: Sequence[np.ndarray] | np.ndarray, raw: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """(m,) years for scans of features (m, d) and raw ages (m,)."""
        centre = np.einsum("ad,d->a", self.weights, self.population.mean.astype(np.float64))
        said = [np.einsum("ad,d->a", self.weights, row) - centre for row in features]
        parts = np.array(said, np.float64).reshape(-1, 2)
        return parts[:, 0] + _old(raw) * parts[:, 1]

    def protected(self) -> float:
        """Root mean square over scans like those of the training, from their statistics; years.

        As if their ages, of this middle and spread, told nothing of their features: what is learnt
        lies beside the directions that tell age.
        """
        basis = self.population.basis.astype(np.float64)
        along = np.einsum("kd,ad->ak", basis, self.weights)
        size, held = (np.einsum("ad,ad->", each, each) for each in (self.weights, along))
        within = np.einsum("ak,ak,k->", along, along, self.population.variances)
        return float(np.sqrt(within + max(0.0, float(size - held)) * self.population.beside))


def _old(raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (np.asarray(raw, np.float64) - _MIDDLE) / _SPREAD


def _solve(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The solution for a positive definite matrix, by a Cholesky factor made without BLAS."""
    n = len(matrix)
    lower = np.zeros_like(matrix)
    half = np.zeros(n)
    for i in range(n):
        for j in range(i):
            inner = np.einsum("k,k->", lower[i, :j], lower[j, :j])
            lower[i, j] = (matrix[i, j] - inner) / lower[j, j]
        lower[i, i] = np.sqrt(matrix[i, i] - np.einsum("k,k->", lower[i, :i], lower[i, :i]))
        half[i] = (wanted[i] - np.einsum("k,k->", lower[i, :i], half[:i])) / lower[i, i]
    solved = np.zeros(n)
    for i in reversed(range(n)):
        inner = np.einsum("k,k->", lower[i + 1 :, i], solved[i + 1 :])
        solved[i] = (half[i] - inner) / lower[i, i]
    return solved
