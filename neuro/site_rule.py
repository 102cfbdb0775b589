"""The rule by which labelled scans of a site correct its other scans: a ridge regression.

What is wrong with a predicted age, `age - raw`, is regressed on what the last blocks make of the
scan. The prior is that of orthogonal weight modification: directions in which the training scans
vary are held by the projector `P = (I + n Sigma / alpha)^-1` of their summary statistics, so that
what is learnt lies where the site differs from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuro.population import Population

__all__ = ["MOST_MOVED", "Correction", "Taught"]

MOST_MOVED = 1.0
"""Years (root mean square) by which the training population's ages may move."""

_ALPHA = 1.0
_NOISE = 0.5


@dataclass(frozen=True)
class Taught:
    """Labelled scans.

    Attributes:
        features: (n, d) of `features_of`.
        raw: (n,) ages by the model alone.
        ages: (n,) that were told.
    """

    features: np.ndarray
    raw: np.ndarray
    ages: np.ndarray


@dataclass(frozen=True)
class Correction:
    """Years to add to a raw age, as a function of the scan's features.

    Attributes:
        population: what is protected.
        weights: (d,) of the centred features.
    """

    population: Population
    weights: np.ndarray

    @classmethod
    def fit(cls, population: Population, taught: Taught) -> Correction:
        """The ridge regression, in dual form and float64."""
        rows = taught.features.astype(np.float64) - population.mean
        held = _held(population, rows)
        kernel = np.einsum("nd,md->nm", held, rows)
        unit = population.rest + population.variances.sum()
        kernel = (kernel + kernel.T) / (2 * unit)
        dual = np.linalg.solve(kernel + _NOISE * np.eye(len(rows)), taught.ages - taught.raw)
        return cls(population, np.einsum("n,nd->d", dual, held) / unit)

    def __call__(self, features: Sequence[np.ndarray], raw: np.ndarray) -> np.ndarray:
        """(m,) years for scans of features (m, d) and raw ages (m,)."""
        del raw
        centre = np.einsum("d,d->", self.weights, self.population.mean.astype(np.float64))
        return np.array([np.einsum("d,d->", self.weights, row) - centre for row in features])

    def protected(self) -> float:
        """Root mean square of the correction over the training population, years."""
        along = np.einsum("kd,d->k", self.population.basis.astype(np.float64), self.weights)
        return float(np.sqrt((along**2 * self.population.variances).sum()))


def _held(population: Population, rows: np.ndarray) -> np.ndarray:
    """P times each of the rows (n, d)."""
    basis = population.basis.astype(np.float64)
    n_s = population.count * population.variances
    unit = population.variances.sum() + population.rest
    kept = n_s / (_ALPHA * unit + n_s)
    return rows - np.einsum("nk,kd->nd", np.einsum("nd,kd->nk", rows, basis) * kept, basis)
