"""The recursive projector: how to change a linear map and leave what it does to earlier inputs.

Orthogonal weight modification (Zeng et al., arXiv 1810.01256): `P <- P - P a a^T P / (alpha +
a^T P a)` shrinks every direction that was seen. In closed form `P = (I + sum a a^T / alpha)^-1`.

>>> import numpy as np
>>> from enn_core.feedback import RecursiveProjector
>>> projector, M = RecursiveProjector(2, alpha=1e-6), np.eye(2)
>>> for a, b in [([1.0, 0.0], [0.0, 1.0]), ([1.0, 1.0], [1.0, 1.0])]:
...     M = M + np.outer(np.subtract(b, M @ a), projector.add(a))
>>> (M @ [1.0, 0.0]).round(3), (M @ [1.0, 1.0]).round(3)
(array([0., 1.]), array([1., 1.]))
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["RecursiveProjector"]


class RecursiveProjector:
    """Projector (dim, dim) on what inputs have not used yet; starts as the identity.

    Products are summed by `einsum`, never by BLAS: the same inputs give the same bits, whatever the
    number of threads.
    """

    def __init__(self, dim: int, alpha: float = 1.0) -> None:
        """Start from the identity.

        Args:
            dim: length of an input, at least 1.
            alpha: above 0; small holds earlier inputs tightly, large lets all of them drift.

        Raises:
            ValueError: if a value is out of range.
        """
        check_size(dim, alpha)
        self.alpha = float(alpha)
        self.P: npt.NDArray[np.float64] = np.eye(dim)

    def add(self, a: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Take an input (dim,) into account.

        Returns:
            (dim,) gain `k = P a / (alpha + a^T P a)` with the projector before `a`. A map that
            should turn `a` into `b` changes by `outer(b - M a, k)`.

        Raises:
            ValueError: if `a` has another shape, or is not finite.
        """
        row = check_row(a, len(self.P), "a")
        direction = np.einsum("ij,j->i", self.P, row)
        size = self.alpha + max(float(np.einsum("i,i->", row, direction)), 0.0)
        if not np.isfinite(size):
            raise ValueError("a is too large to learn from; scale it to about unit length")
        scaled = direction / np.sqrt(size)
        self.P -= np.outer(scaled, scaled)  # of one vector twice: stays exactly symmetric
        return direction / size


def check_size(dim: int, alpha: float) -> None:
    """Raise ValueError unless there is a direction to learn and a ridge that holds it."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha}")


def check_row(values: npt.ArrayLike, dim: int, name: str) -> npt.NDArray[np.float64]:
    """The values as a contiguous float64 row (dim,); ValueError on another shape or NaN."""
    row = np.ascontiguousarray(values, np.float64)
    if row.shape != (dim,):
        raise ValueError(f"{name} must have shape ({dim},), got {row.shape}")
    if not np.isfinite(row).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return row
