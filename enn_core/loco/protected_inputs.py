"""Protecting inputs: projectors on what a layer's inputs have not used yet.

An update times `P` from the right leaves what the layer answers to protected inputs: exactly with a
hard projector, nearly with a soft one. Both follow from the inputs' second moment `C`:

* soft, orthogonal weight modification (Zeng et al., arXiv 1810.01256): `P = (I + C / alpha)^-1`, by
  the recursion `P <- P - P X^T (alpha I + X P X^T)^-1 X P` over blocks of rows X: the same matrix;
* hard, gradient projection memory (Saha et al., arXiv 2103.09762): `P = I - B B^T`, B the fewest
  principal directions that hold a given share of the inputs' energy, added to those held before.

`enn_core.lessons.RecursiveProjector` is the soft one for single vectors, to the same bits on any
number of threads; this one takes batches, on any device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["HardProjector", "SoftProjector"]


class SoftProjector:
    """`P = (I + sum x x^T / alpha)^-1` (columns, columns), in float64; the identity at first.

    Args:
        columns: length of a row.
        alpha: above 0, in the unit of squared inputs; small holds inputs tightly.
    """

    def __init__(self, columns: int, alpha: float) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        self.alpha = alpha
        self.P = torch.eye(columns, dtype=torch.float64)

    def add(self, rows: Tensor, weight: float = 1.0) -> None:
        """Protect rows (N, columns), each counted `weight` times."""
        x = rows.double() * weight**0.5
        if len(x) > x.shape[1]:
            x = torch.linalg.qr(x, mode="r").R  # same second moment, fewer rows
        self.P = self.P.to(x.device)
        seen = self.P @ x.T  # (columns, N)
        inner = self.alpha * torch.eye(len(x)).to(x) + x @ seen
        # The inverse's Cholesky factor keeps P symmetric: it loses half of a square.
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), seen.T, upper=False)
        self.P = self.P - half.T @ half

    def project(self, update: Tensor) -> Tensor:
        """`update P`: (out, columns) to (out, columns)."""
        return update @ self.P.to(update)

    def used(self) -> float:
        """Share of the input dimensions taken, 0 to 1: `1 - tr(P) / columns`."""
        return 1.0 - float(self.P.trace()) / len(self.P)

    def state_dict(self) -> dict[str, Tensor]:
        return {"P": self.P}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.P = state["P"].clone()


class HardProjector:
    """`P = I - B B^T` with orthonormal B (columns, k); the identity at first.

    Args:
        columns: length of a row.
        share: of the rows' energy (squared length) that B must hold, above 0, at most 1.
        rank: most directions in B; all of them by default.
    """

    def __init__(self, columns: int, share: float, rank: int | None = None) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if rank is not None and not 0 < rank <= columns:
            raise ValueError(f"rank must be from 1 to {columns} input columns, got {rank}")
        self.share, self.rank = share, columns if rank is None else rank
        self.B = torch.zeros(columns, 0, dtype=torch.float64)

    def add(self, rows: Tensor, weight: float = 1.0) -> None:
        """Protect rows (N, columns) of one task; their number and `weight` do not matter."""
        x = rows.double()
        self.B = self.B.to(x.device)
        rest = x - (x @ self.B) @ self.B.T
        values, vectors = torch.linalg.eigh(rest.T @ rest)
        values = values.flip(0).clamp(min=0)
        total = x.square().sum()
        held = total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])
        enough = int((held < self.share * total * (1 - 1e-12)).sum())
        enough = min(enough, self.rank - self.B.shape[1], int((values > 1e-12 * total).sum()))
        self.B = torch.linalg.qr(torch.cat([self.B, vectors.flip(1)[:, :enough]], 1))[0]

    @property
    def P(self) -> Tensor:
        return torch.eye(len(self.B)).to(self.B) - self.B @ self.B.T

    def project(self, update: Tensor) -> Tensor:
        """`update P`: (out, columns) to (out, columns)."""
        basis = self.B.to(update)
        return update - (update @ basis) @ basis.T

    def used(self) -> float:
        """Share of the input dimensions taken, 0 to 1."""
        return self.B.shape[1] / len(self.B)

    def state_dict(self) -> dict[str, Tensor]:
        return {"B": self.B}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.B = state["B"].clone()
