"""The ridge adapter: one linear map that absorbs every taught pair (a, b) and leaves the rest.

With the taught inputs and their targets as columns of A and B, the map is

    M = I + (B - A) (A^T P0 A + alpha I)^-1 A^T P0,

the minimiser of `sum |M a - b|^2 + weight * sum |M p - p|^2 + alpha |M - I|^2` over the pairs and
the protected anchors p; `P0 = (I + weight / alpha * sum p p^T)^-1`, the identity without anchors.
Pairs are absorbed one by one as by `RecursiveProjector`, of which only the shrunk directions are
kept: a pair costs two rows, never a matrix.

>>> import numpy as np
>>> from enn_core.feedback import RidgeAdapter
>>> adapter = RidgeAdapter(3, alpha=1e-6).with_pair([1, 0, 0], [0, 1, 0])
>>> adapter.apply([[1, 0, 0], [0, 0, 2]]).round(3)
array([[0., 1., 0.],
       [0., 0., 2.]])
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from enn_core.feedback.projector import check_row, check_size

__all__ = ["RidgeAdapter"]

# Products of many rows go through BLAS in pieces of this many multiplications, which it computes
# in the calling thread: waking others costs more than it saves (0.5 against 20 ms for 200 rows and
# 50 pairs on a busy machine).
_PIECE = 200_000
_PIECE_PAIRS = 32


class RidgeAdapter:
    """The map of the pairs taught so far; immutable.

    All state is float64 and summed by `einsum`, never by BLAS: the same pairs in the same order
    give the same bits, whatever the number of threads. Another order gives the same map to
    rounding.
    """

    def __init__(
        self,
        dim: int,
        *,
        alpha: float,
        anchors: npt.ArrayLike | None = None,
        anchor_weight: float = 0.0,
    ) -> None:
        """The identity, with nothing taught yet.

        Args:
            dim: length of a row.
            alpha: ridge, above 0; the smaller, the more exactly a pair is met.
            anchors: (m, dim) rows that should stay where they are.
            anchor_weight: weight of an anchor relative to a pair, at least 0.

        Raises:
            ValueError: if a value is out of range or not finite, or shapes do not fit.
        """
        check_size(dim, alpha)
        if not 0 <= anchor_weight < np.inf:
            raise ValueError(f"anchor_weight must be at least 0 and finite, got {anchor_weight}")
        self.dim = dim
        self.alpha = float(alpha)
        self._shrunk = np.empty((0, dim))  # P = I - shrunk^T shrunk: the anchors', then the pairs'
        self._moves = np.empty((0, dim))  # M = I + moves^T shrunk[-n:]
        if anchors is not None and anchor_weight > 0:
            rows = _matrix(anchors, dim, "anchors")
            shrunk = np.empty_like(rows)
            for i, row in enumerate(rows * np.sqrt(anchor_weight)):
                shrunk[i] = self._shrink(shrunk[:i], row)[0]
            self._shrunk = shrunk

    @classmethod
    def of_pairs(
        cls,
        dim: int,
        a: npt.ArrayLike,
        b: npt.ArrayLike,
        *,
        alpha: float,
        anchors: npt.ArrayLike | None = None,
        anchor_weight: float = 0.0,
    ) -> RidgeAdapter:
        """The map of the pairs (a[i], b[i]), both (n, dim): the same bits as one by one.

        Raises:
            ValueError: as the constructor and `with_pair`.
        """
        empty = cls(dim, alpha=alpha, anchors=anchors, anchor_weight=anchor_weight)
        return empty.with_pairs(a, b)

    def with_pair(self, a: npt.ArrayLike, b: npt.ArrayLike) -> RidgeAdapter:
        """The map that also turns a (dim,) into b (dim,), as far as the ridge lets it.

        Raises:
            ValueError: if a shape does not fit, or a value is not finite.
        """
        return self.with_pairs(
            check_row(a, self.dim, "a")[None],
            check_row(b, self.dim, "b")[None],
        )

    def with_pairs(self, a: npt.ArrayLike, b: npt.ArrayLike) -> RidgeAdapter:
        """`with_pair` for each pair (a[i], b[i]) of two (n, dim) in turn."""
        inputs, targets = _matrix(a, self.dim, "a"), _matrix(b, self.dim, "b")
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} rows of a but {len(targets)} of b; give pairs")
        known, pairs = len(self._shrunk), len(self._moves)
        shrunk = np.concatenate([self._shrunk, np.empty_like(inputs)])
        moves = np.concatenate([self._moves, np.empty_like(inputs)])
        for i, (row, target) in enumerate(zip(inputs, targets, strict=True)):
            scaled, along, length = self._shrink(shrunk[: known + i], row)
            mapped = row + np.einsum("n,nd->d", along[known - pairs :], moves[: pairs + i])
            shrunk[known + i] = scaled
            moves[pairs + i] = (target - mapped) / length
        return self._made_of(shrunk, moves)

    def first(self, count: int) -> RidgeAdapter:
        """The map as it was after its first `count` pairs, to the bit; free."""
        if not 0 <= count <= len(self):
            raise ValueError(f"count must be 0 to {len(self)}, got {count}")
        anchors = len(self._shrunk) - len(self)
        return self._made_of(self._shrunk[: anchors + count], self._moves[:count])

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._moves)

    def apply(self, c: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """`M c` of rows (..., dim).

        One row gives the same bits on any number of threads; rows in bulk agree with it to
        rounding.

        Raises:
            ValueError: if the rows have another length.
        """
        return self._moved(c, self._shrunk[len(self._shrunk) - len(self) :], self._moves)

    def apply_transposed(self, v: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """`M^T v` of rows (..., dim): `v.(M c) == (M^T v).c`."""
        return self._moved(v, self._moves, self._shrunk[len(self._shrunk) - len(self) :])

    def matrix(self) -> npt.NDArray[np.float64]:
        """M (dim, dim)."""
        return np.ascontiguousarray(self.apply(np.eye(self.dim)).T)

    def _made_of(self, shrunk: np.ndarray, moves: np.ndarray) -> RidgeAdapter:
        made = object.__new__(RidgeAdapter)
        made.dim, made.alpha = self.dim, self.alpha
        made._shrunk, made._moves = shrunk, moves
        return made

    def _shrink(self, shrunk: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """`P a / d`, the row's products with `shrunk`, and `d = sqrt(alpha + a^T P a)`."""
        along = np.einsum("nd,d->n", shrunk, row)
        left = row - np.einsum("n,nd->d", along, shrunk)
        length = float(np.sqrt(self.alpha + max(float(np.einsum("d,d->", row, left)), 0.0)))
        if not np.isfinite(length):
            raise ValueError("a row is too large to learn from; scale it to about unit length")
        return left / length, along, length

    def _moved(self, rows: npt.ArrayLike, along: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """`rows + (rows along^T) moves`."""
        given = np.asarray(rows, np.float64)
        if given.ndim == 0 or given.shape[-1] != self.dim:
            raise ValueError(f"rows must have shape (..., {self.dim}), got {given.shape}")
        out = np.array(given, order="C").reshape(-1, self.dim)
        if len(out) == 1:
            out[0] += np.einsum("n,nd->d", np.einsum("nd,d->n", along, out[0]), moves)
            return out.reshape(given.shape)
        origin = out.copy()
        for i in range(0, len(moves), _PIECE_PAIRS):
            here, there = along[i : i + _PIECE_PAIRS], moves[i : i + _PIECE_PAIRS]
            step = max(2, _PIECE // here.size)
            for start in range(0, len(out), step):
                part = slice(start, start + step)
                out[part] += (origin[part] @ here.T) @ there
        return out.reshape(given.shape)


def _matrix(rows: npt.ArrayLike, dim: int, name: str) -> np.ndarray:
    values = np.ascontiguousarray(rows, np.float64)
    if values.ndim != 2 or values.shape[1] != dim:
        raise ValueError(f"{name} must have shape (n, {dim}), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return values
