"""What the training scans looked like to the last block: kept so that teaching leaves it alone.

Features are the last block's output of every member, averaged over a coarse grid of places. Of
them a model file holds summary statistics alone: the mean and a covariance of low rank. No scan can
be had back from these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["GRID", "RANK", "Population", "summarise"]

GRID = (2, 2, 2)
"""Places along i, j, k over which the last block's output is averaged. The finer grid of the heads
teaches no better, and the mean alone holds the training scans less well: docs/decisions.md."""

RANK = 32
"""Directions of the population's covariance that are kept."""


@dataclass(frozen=True)
class Population:
    """Summary statistics of the training scans' features.

    Attributes:
        mean: (d,) of the features.
        basis: (k, d) orthonormal directions in which the population varies most.
        variances: (k,) along them.
        rest: sum of the variances in all other directions.
        beside: variance along one such direction, as scans lie; years that move beside the basis
            are measured with it.
        count: scans.
    """

    mean: np.ndarray
    basis: np.ndarray
    variances: np.ndarray
    rest: float
    beside: float
    count: int

    def to_tensors(self) -> dict[str, Tensor]:
        """For a weights file; half precision where millions of numbers are."""
        numbers = torch.tensor([self.rest, self.beside, self.count], dtype=torch.float64)
        return {
            "mean": torch.from_numpy(self.mean).float(),
            "basis": torch.from_numpy(self.basis).half().contiguous(),
            "variances": torch.from_numpy(self.variances).double(),
            "numbers": numbers,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Population:
        """The inverse of `to_tensors`.

        Raises:
            ValueError: a tensor is missing, or of a shape that does not fit.
        """
        try:
            mean, basis, variances, numbers = (
                tensors[name].float().numpy() if name == "basis" else tensors[name].double().numpy()
                for name in ("mean", "basis", "variances", "numbers")
            )
        except KeyError as error:
            raise ValueError(f"statistics of the training scans lack {error}") from None
        fits = mean.ndim == 1 and basis.shape == (*variances.shape, *mean.shape)
        if not (fits and numbers.shape == (3,) and (variances >= 0).all()):
            raise ValueError("statistics of the training scans do not fit each other")
        rest, beside, count = (float(number) for number in numbers)
        return cls(mean.astype(np.float32), basis, variances, rest, beside, int(count))


def summarise(features: np.ndarray | Sequence[np.ndarray], rank: int = RANK) -> Population:
    """Statistics of the features (n, d) of n training scans.

    Raises:
        ValueError: fewer than 3 scans.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or len(rows) < 3:
        raise ValueError(f"got features of shape {rows.shape}; give 3 scans or more")
    mean = rows.mean(0)
    rows = rows - mean
    # By the Gram matrix: there are far more features than scans.
    values, vectors = np.linalg.eigh(rows @ rows.T / len(rows))
    order = np.argsort(values)[::-1][: min(rank, len(rows) - 1)]
    kept = values[order]
    basis = (vectors[:, order] / np.sqrt(np.maximum(kept, 1e-30) * len(rows))).T @ rows
    others = np.maximum(np.delete(values, order), 0)
    rest = float(others.sum())
    beside = float((others**2).sum()) / rest if rest > 0 else 0.0
    return Population(
        mean.astype(np.float32), basis.astype(np.float32), kept, rest, beside, len(rows)
    )
