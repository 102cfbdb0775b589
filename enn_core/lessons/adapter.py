"""The ridge adapter: one map of queries that absorbs every taught pair (a, b) and leaves the rest.

With `power` 1 it is linear. With the taught inputs and their targets as columns of A and B,

    M = I + (B - A) (A^T A + alpha I)^-1 A^T,

the minimiser of `sum |M a - b|^2 + alpha |M - I|^2`, the closed form of orthogonal weight
modification (`RecursiveProjector`). With `power` 2 it is the same map in the space of products of
two coordinates: A^T A and A^T c hold |a| |c| cos^2 instead of a.c. An input that was taught is met
as well as before, one at right angles stays as well as before, and one that has a fifth of its
length in common with a taught one moves by a 25th instead of a fifth.

Pairs are absorbed one by one through a bordered Cholesky factor, kept as its inverse T: a pair
costs two rows and one line of T, never a matrix of the size of M.

>>> import numpy as np
>>> from enn_core.feedback import RidgeAdapter
>>> adapter = RidgeAdapter(3, alpha=1e-6, power=1).with_pair([1, 0, 0], [0, 1, 0])
>>> adapter.apply([[1, 0, 0], [0, 0, 2]]).round(3)
array([[0., 1., 0.],
       [0., 0., 2.]])
"""

from __future__ import annotations

from copy import copy

import numpy as np
import numpy.typing as npt

from enn_core.lessons.recursive_projector import check_row, check_size

__all__ = ["RidgeAdapter"]

# Products of many rows go through BLAS in pieces of this many multiplications, which it computes
# in the calling thread: waking others costs more than it saves (0.5 against 20 ms for 200 rows and
# 50 pairs on a busy machine).
_PIECE = 200_000
# Of a large T so many rows are read at once all the same: there the products take long.
_LEAST_ROWS = 64

# Lines of T that are made together, columns that fit a cache with all of their rows, and the number
# of products that `einsum` adds at once: a sum over a multiple of it has the same terms in the same
# order, however many zeros follow.
_ROWS, _COLUMNS, _LANES = 64, 64, 128


class RidgeAdapter:
    """The map of the pairs taught so far; immutable.

    All state is float64 and summed by `einsum`, never by BLAS: the same pairs in the same order
    give the same bits, whatever the number of threads. Another order gives the same map to
    rounding.
    """

    def __init__(self, dim: int, *, alpha: float, power: int = 2) -> None:
        """The identity, with nothing taught yet.

        Args:
            dim: length of a row.
            alpha: ridge, above 0; the smaller, the more exactly a pair is met.
            power: 1 for a linear map, 2 for the map in the space of products.

        Raises:
            ValueError: if a value is out of range or not finite.
        """
        check_size(dim, alpha)
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        self.dim = dim
        self.alpha = float(alpha)
        self.power = power
        self._inputs = np.empty((0, dim))
        self._inverse = np.empty((0, 0))  # T: T^T T = (K + alpha I)^-1
        self._moves = np.empty((0, dim))  # T (B - A): M c = c + (T k(c)) . moves

    @classmethod
    def of_pairs(
        cls, dim: int, a: npt.ArrayLike, b: npt.ArrayLike, *, alpha: float, power: int = 2
    ) -> RidgeAdapter:
        """The map of the pairs (a[i], b[i]), both (n, dim): the same bits as one by one.

        Raises:
            ValueError: as the constructor and `with_pair`.
        """
        return cls(dim, alpha=alpha, power=power).with_pairs(a, b)

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
        added, targets = _matrix(a, self.dim, "a"), _matrix(b, self.dim, "b")
        if len(added) != len(targets):
            raise ValueError(f"{len(added)} rows of a but {len(targets)} of b; give pairs")
        known, total = len(self), len(self) + len(added)
        inputs = np.concatenate([self._inputs, added])
        moves = np.concatenate([self._moves, np.empty_like(added)])
        inverse = np.zeros((total, total))
        for start in range(0, known, _ROWS):  # above the diagonal there is nothing
            end = min(start + _ROWS, known)
            inverse[start:end, :end] = self._inverse[start:end, :end]
        for start in range(known, total, _ROWS):
            self._absorb(inputs, targets[start - known :], inverse, moves, start)
        return self._made_of(inputs, inverse, moves)

    def _absorb(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        inverse: np.ndarray,
        moves: np.ndarray,
        start: int,
    ) -> None:
        """Fill `_ROWS` lines of T and of the moves from `start` on.

        What they need of the lines before is summed for all of them at once, so that T is read from
        memory once for many lines. Every sum runs over the same numbers in the same order as one
        line at a time: zeros above the diagonal are left out where no other sum is formed by it.
        """
        end = min(start + _ROWS, len(inputs))
        near = _kernels(inputs[:end], inputs[start:end], self.power)
        along = np.zeros((end - start, end))
        for first in range(0, start, _ROWS):
            rows = slice(first, min(first + _ROWS, start))
            used = -(-rows.stop // _LANES) * _LANES
            for line, n in enumerate(range(start, end)):
                part = inverse[rows, : min(used, n)]
                along[line, rows] = np.einsum("mn,n->m", part, near[line, : min(used, n)])
        summed = np.empty((end - start, start))
        for columns in _pieces(start):
            part = inverse[columns.start : start, columns]
            for line in range(end - start):
                summed[line, columns] = np.einsum(
                    "m,mn->n", along[line, columns.start : start], part
                )
        moved = np.empty((end - start, self.dim))
        for line in range(end - start):
            moved[line] = np.einsum("n,nd->d", along[line, :start], moves[:start])
        for line, n in enumerate(range(start, end)):
            row, ways = inputs[n], along[line, :n]
            if n > start:
                own = slice(start, n)
                along[line, own] = np.einsum("mn,n->m", inverse[own, :n], near[line, :n])
            own_length = float(np.einsum("d,d->", row, row))
            left = max(own_length - float(np.einsum("n,n->", ways, ways)), 0.0)
            length = float(np.sqrt(self.alpha + left))
            if not np.isfinite(length):
                raise ValueError("a row is too large to learn from; scale it to about unit length")
            # A sum goes on from what is summed already as its first term.
            more = np.concatenate([[1.0], ways[start:]])
            if self.dim > 1:
                parts = np.concatenate([moved[line, None], moves[start:n]])
                way = np.einsum("n,nd->d", more, parts)
            else:  # a column alone is added in another order, as a whole
                way = np.einsum("n,nd->d", ways, moves[:n])
            moves[n] = (targets[line] - row - way) / length
            if n:
                before = np.zeros((1, n))
                before[0, :start] = summed[line]
                lines = np.concatenate([before, inverse[start:n, :n]])
                inverse[n, :n] = -np.einsum("m,mn->n", more, lines) / length
            inverse[n, n] = 1 / length

    def first(self, count: int) -> RidgeAdapter:
        """The map as it was after its first `count` pairs, to the bit; free."""
        if not 0 <= count <= len(self):
            raise ValueError(f"count must be 0 to {len(self)}, got {count}")
        return self._made_of(
            self._inputs[:count], self._inverse[:count, :count], self._moves[:count]
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._moves)

    def apply(self, c: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """`M c` of rows (..., dim); a multiple of a row gives the multiple of its image.

        One row gives the same bits on any number of threads; rows in bulk agree with it to
        rounding.

        Raises:
            ValueError: if the rows have another length.
        """
        given = np.asarray(c, np.float64)
        if given.ndim == 0 or given.shape[-1] != self.dim:
            raise ValueError(f"rows must have shape (..., {self.dim}), got {given.shape}")
        out = np.array(given, order="C").reshape(-1, self.dim)
        if len(out) == 1:
            near = _kernel(self._inputs, out[0], self.power)
            along = np.einsum("mn,n->m", self._inverse, near)
            out[0] += np.einsum("n,nd->d", along, self._moves)
            return out.reshape(given.shape)
        size = max(self._moves.size, self._inverse.size, 1)
        step = max(2, _PIECE // size) if size < 5 * _PIECE else _LEAST_ROWS
        for start in range(0, len(out) if len(self) else 0, step):
            part = out[start : start + step]
            products = part @ self._inputs.T
            if self.power == 2:
                sizes = np.outer(np.linalg.norm(part, axis=1), np.linalg.norm(self._inputs, axis=1))
                products = _squared(products, sizes)
            part += products @ self._inverse.T @ self._moves
        return out.reshape(given.shape)

    def matrix(self) -> npt.NDArray[np.float64]:
        """M (dim, dim) of a linear map.

        Raises:
            ValueError: with power 2.
        """
        if self.power != 1:
            raise ValueError(f"a map of power {self.power} has no matrix; take power 1")
        return np.ascontiguousarray(self.apply(np.eye(self.dim)).T)

    def _made_of(self, inputs: np.ndarray, inverse: np.ndarray, moves: np.ndarray) -> RidgeAdapter:
        made = copy(self)
        made._inputs, made._inverse, made._moves = inputs, inverse, moves
        return made


def _kernel(inputs: np.ndarray, row: np.ndarray, power: int) -> np.ndarray:
    """(n,) products of inputs (n, dim) with a row (dim,): a.c, or |a| |c| cos^2."""
    products = np.einsum("nd,d->n", inputs, row)
    if power == 1:
        return products
    lengths = np.sqrt(np.einsum("nd,nd->n", inputs, inputs))
    return _squared(products, lengths * np.sqrt(np.einsum("d,d->", row, row)))


def _kernels(inputs: np.ndarray, rows: np.ndarray, power: int) -> np.ndarray:
    """(m, n) `_kernel` of inputs (n, dim) with each of some rows (m, dim)."""
    found = np.empty((len(rows), len(inputs)))
    for start in range(0, len(inputs), 4 * _ROWS):
        part = inputs[start : start + 4 * _ROWS]
        for line, row in enumerate(rows):
            found[line, start : start + len(part)] = _kernel(part, row, power)
    return found


def _pieces(count: int) -> list[slice]:
    """Columns in pieces of two at least: of one alone, products are added in another order."""
    edges = list(range(0, count, _COLUMNS)) or [0]
    if len(edges) > 1 and count - edges[-1] < 2:
        edges.pop()
    ends = [*edges[1:], count]
    return [slice(a, b) for a, b in zip(edges, ends, strict=True)] if count else []


def _squared(products: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """products^2 / sizes, 0 where a row is 0."""
    return np.divide(products * products, sizes, out=np.zeros_like(products), where=sizes > 0)


def _matrix(rows: npt.ArrayLike, dim: int, name: str) -> np.ndarray:
    values = np.ascontiguousarray(rows, np.float64)
    if values.ndim != 2 or values.shape[1] != dim:
        raise ValueError(f"{name} must have shape (n, {dim}), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return values
