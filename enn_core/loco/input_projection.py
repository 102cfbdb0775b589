"""The input side of LOCO: which directions of a layer's input an update may use.

Reconstructed from arXiv 2602.22259 and measurements (docs/learning-rules.md). An update of a layer
is a sum of outer products `error row^T`; multiplied by a projector `P` from the right it changes
the layer's answer only to the part of an input that `P` lets through. If errors do not depend on
the inputs, its variance falls to `tr(P C) / tr(C)`, `C` the second moment of the rows.

* `mean`: `P = I - m m^T / |m|^2`, m the running mean row. The simple control.
* `cluster`: batch means of normalised rows go into a ring buffer, k-means finds their centres, the
  one nearest to the current mean is dropped, and `P = I - U (U^T U)^-1 U^T` removes the others U.
* `low-rank`: `P = D (D^T D)^-1 D^T`, D the mean and the principal directions of a batch's rows.
* `loco`: both: D is orthogonalised against U first, and directions that hardly remain are dropped.
* `none`: the identity, which is node perturbation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["PROJECTIONS", "InputProjection", "Projection"]

Projection = Literal["loco", "cluster", "low-rank", "mean", "none"]
PROJECTIONS: tuple[str, ...] = get_args(Projection)

_MEMORY = 0.99  # of the running mean
_REMAINS = 0.1  # length that a unit direction must keep to count as a new one


class InputProjection:
    """A layer's projector, from the rows it has seen; the identity before the first.

    Args:
        columns: length of a row.
        kind: see the module.
        rank: principal directions that `loco` and `low-rank` keep.
        clusters: centres of `loco` and `cluster`, at least 2.
        buffer: batch means remembered.
        every: batches between two refreshes of centres and principal directions.
    """

    def __init__(
        self,
        columns: int,
        kind: Projection = "loco",
        *,
        rank: int = 110,
        clusters: int = 10,
        buffer: int = 1000,
        every: int = 10,
    ) -> None:
        if kind not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {kind!r}")
        for name, value, least in (
            ("rank", rank, 1),
            ("clusters", clusters, 2),
            ("buffer", buffer, clusters),
            ("every", every, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.kind, self.rank, self.every = kind, rank, every
        self.clusters, self.size = clusters, buffer
        self.seen = 0
        self.mean = torch.zeros(columns)
        self.ring = torch.zeros(0, columns)
        self.centres = torch.zeros(0, columns)
        self.removed: Tensor | None = None  # (columns, k) orthonormal
        self.kept: Tensor | None = None  # (columns, k) orthonormal

    def observe(self, rows: Tensor) -> None:
        """Take a batch's rows (N, columns) into account; call once per update, before `project`."""
        if self.kind == "none":
            return
        now = rows.mean(0)
        self.seen += 1
        self.mean = self.mean.to(rows) if self.seen == 1 else self.mean
        self.mean = self.mean + (now - self.mean) * max(1 - _MEMORY, 1 / self.seen)
        if self.kind == "mean":
            self.removed = _unit(self.mean)[:, None]
            return
        if self.kind in ("loco", "cluster"):
            self._remember(_unit(now))
        if self.seen % self.every != 1 and self.every != 1:
            return
        if self.kind in ("loco", "cluster"):
            self.removed = self._other_centres(now)
        if self.kind in ("loco", "low-rank"):
            self.kept = self._principal(rows, now)

    def project(self, update: Tensor) -> Tensor:
        """`update P`: (out, columns) to (out, columns)."""
        if self.kept is not None:  # lies in the complement of `removed` already
            return (update @ self.kept) @ self.kept.T
        if self.removed is not None:
            return update - (update @ self.removed) @ self.removed.T
        return update

    def matrix(self) -> Tensor:
        """P itself, (columns, columns)."""
        return self.project(torch.eye(len(self.mean)).to(self.mean))

    def _remember(self, row: Tensor) -> None:
        if len(self.ring) < self.size:
            self.ring = torch.cat([self.ring.to(row), row[None]])
        else:
            self.ring[(self.seen - 1) % self.size] = row

    def _other_centres(self, now: Tensor) -> Tensor | None:
        if len(self.ring) < self.clusters:
            return None
        if not len(self.centres):
            picks = torch.linspace(0, len(self.ring) - 1, self.clusters).long()
            self.centres = self.ring[picks]
        self.centres = k_means(self.ring, self.centres)
        nearest = (self.centres - _unit(now)).square().sum(1).argmin()
        others = torch.arange(len(self.centres), device=now.device) != nearest
        return orthonormal(self.centres[others].T, 1e-3)

    def _principal(self, rows: Tensor, now: Tensor) -> Tensor:
        directions = principal(rows - now, self.rank)
        directions = torch.cat([_unit(now)[:, None], directions], 1)
        if self.removed is not None:
            directions = directions - self.removed @ (self.removed.T @ directions)
        return orthonormal(directions, _REMAINS)

    def state_dict(self) -> dict[str, Any]:
        names = ("seen", "mean", "ring", "centres", "removed", "kept")
        return {name: _copy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, _copy(value))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def k_means(rows: Tensor, centres: Tensor, rounds: int = 2) -> Tensor:
    """Lloyd's rounds from given centres; a centre without rows stays.

    Args:
        rows: (N, columns).
        centres: (k, columns).
        rounds: few are enough where the centres come from the last call.
    """
    for _ in range(rounds):
        nearest = torch.cdist(rows, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=len(centres)).to(rows)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


def principal(rows: Tensor, rank: int) -> Tensor:
    """Leading right singular vectors of rows (N, columns): (columns, at most rank) orthonormal.

    Directions in which the rows do not extend are left out. In float64: `eigh` of a float32 matrix
    of low rank may not converge.
    """
    x = rows.double()
    values, vectors = torch.linalg.eigh(x @ x.T if len(x) < x.shape[1] else x.T @ x)
    real = values > max(float(values[-1]) * 1e-6, 1e-30)
    values, vectors = values[real].flip(0)[:rank], vectors[:, real].flip(1)[:, :rank]
    if len(x) < x.shape[1]:
        vectors = x.T @ vectors / values.sqrt()
    return vectors.to(rows)


def orthonormal(directions: Tensor, remains: float) -> Tensor:
    """Orthonormal basis (n, at most k) of columns (n, k), by their singular vectors.

    The span is Gram-Schmidt's; directions along which the columns have a singular value below
    `remains` are dropped, whatever the order of the columns.
    """
    values, vectors = torch.linalg.eigh(directions.T.double() @ directions.double())
    new = values >= remains**2
    basis = directions.double() @ (vectors[:, new] / values[new].sqrt())
    return basis.to(directions)


def _unit(row: Tensor) -> Tensor:
    return row / row.norm().clamp(min=1e-12)
