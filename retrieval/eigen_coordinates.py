"""Eigen-coordinates: how images and queries meet in the index.

The last map of an image tower is linear, ``z = W x`` with ``W = Q diag(Lambda) P^T``; nothing
non-linear follows it but the L2 norm. For a unit text vector ``t`` the cosine is therefore

    t.z / |z|  =  (Lambda c).y / |Lambda y|      with  y = P^T x  and  c = Q^T t,

exactly, because Q has orthonormal columns. The index stores ``v0 = Lambda y / |Lambda y|`` once;
a query is ``c``; a changed spectrum is ``delta = Lambda_new / Lambda``. Neither a changed query
nor a changed spectrum touches the stored vectors.

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> W, x, t = rng.normal(size=(4, 6)), rng.normal(size=(3, 6)), rng.normal(size=(1, 4))
>>> t /= np.linalg.norm(t)
>>> basis = EigenBasis.from_weight(W)
>>> z = x @ W.T
>>> cosine = (z @ t[0]) / np.linalg.norm(z, axis=1)
>>> bool(np.allclose(scores(basis.query(t)[0], basis.vectors(x)), cosine, atol=1e-6))
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SPECTRUM_FLOOR", "EigenBasis", "scores"]

# Components this far below the largest carry rounding noise, and delta = Lambda/Lambda0 would blow
# that noise up.
SPECTRUM_FLOOR = 1e-6

# Rows scaled at a time under a changed spectrum: 32 MB of float64 at r = 512.
_CHUNK_ROWS = 8192

FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class EigenBasis:
    """Final linear map of an image tower, ``z = W x`` with ``W = Q diag(Lambda) P^T``.

    Attributes:
        Q: (d, r) float64, orthonormal columns; d is the size of the shared image-text space.
        Lambda: (r,) float64; components below 1e-6 of the largest are dropped.
        P: (n, r) float64, orthonormal columns; when the map has a bias, the last of the n inputs
            is the constant 1.
        has_bias: whether the constant-1 input is there.
    """

    Q: np.ndarray
    Lambda: np.ndarray
    P: np.ndarray
    has_bias: bool = False

    @classmethod
    def from_weight(cls, weight: Any, bias: Any = None) -> EigenBasis:
        """Factor a trained map by SVD in float64.

        Args:
            weight: (d, n) array or tensor.
            bias: (d,) array or tensor; folded in as one more input that is always 1.

        Raises:
            ValueError: if the shapes do not fit, a value is not finite, or the map is zero.
        """
        matrix = _as_float64(weight)
        if matrix.ndim != 2:
            raise ValueError(f"weight must be (d, n), got shape {matrix.shape}")
        if bias is not None:
            column = _as_float64(bias)
            if column.shape != (matrix.shape[0],):
                raise ValueError(
                    f"bias must have shape ({matrix.shape[0]},) to fit weight {matrix.shape}, "
                    f"got {column.shape}"
                )
            matrix = np.concatenate([matrix, column[:, None]], axis=1)
        if not np.isfinite(matrix).all():
            raise ValueError("weight or bias holds NaN or infinity: the checkpoint is damaged")
        import torch

        from enn_core import svd_factors

        # Its signs are fixed: the same weights give the same coordinates on every machine.
        Q, Lambda, P = (factor.numpy() for factor in svd_factors(torch.from_numpy(matrix)))
        if Lambda.size == 0 or Lambda[0] == 0:
            raise ValueError("the final map is zero: its vectors have no direction")
        keep = Lambda >= SPECTRUM_FLOOR * Lambda[0]
        return cls(
            Q=np.ascontiguousarray(Q[:, keep]),
            Lambda=np.ascontiguousarray(Lambda[keep]),
            P=np.ascontiguousarray(P[:, keep]),
            has_bias=bias is not None,
        )

    @classmethod
    def identity(cls, d: int) -> EigenBasis:
        """The basis of a tower whose last step is not linear: coordinates are its own output."""
        if d < 1:
            raise ValueError(f"d must be at least 1, got {d}")
        return cls(Q=np.eye(d), Lambda=np.ones(d), P=np.eye(d))

    @property
    def dim(self) -> int:
        """r, the length of the stored vectors."""
        return int(self.Lambda.shape[0])

    def vectors(self, x: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Stored vectors of images.

        Args:
            x: (N, n) inputs of the final map, or (N, n-1) without the constant 1 if it has a bias.

        Returns:
            (N, r) float32, unit norm; a row of zeros where z itself is zero.

        Raises:
            ValueError: if the width of x does not fit.
        """
        inputs = np.asarray(x, dtype=np.float64)
        n = self.P.shape[0]
        if inputs.ndim == 2 and self.has_bias and inputs.shape[1] == n - 1:
            inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
        if inputs.ndim != 2 or inputs.shape[1] != n:
            valid = f"(N, {n}) or (N, {n - 1})" if self.has_bias else f"(N, {n})"
            raise ValueError(f"x must be {valid}, got shape {inputs.shape}")
        scaled = (inputs @ self.P) * self.Lambda
        norms = np.linalg.norm(scaled, axis=1, keepdims=True)
        # Below this the row is the rounding of a sum that cancelled, not a direction.
        noise = 1e-13 * self.Lambda.max() * np.linalg.norm(inputs, axis=1, keepdims=True)
        unit = np.divide(scaled, norms, out=np.zeros_like(scaled), where=norms > noise)
        return unit.astype(np.float32)

    def query(self, t: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Eigen-coordinates of texts (or of any direction in the shared space).

        Args:
            t: (N, d) unit vectors.

        Returns:
            (N, r) float32, ``c = Q^T t``. Not renormalised, so that scores equal the cosine with z.

        Raises:
            ValueError: if the width of t is not d.
        """
        texts = np.asarray(t, dtype=np.float64)
        if texts.ndim != 2 or texts.shape[1] != self.Q.shape[0]:
            raise ValueError(f"t must be (N, {self.Q.shape[0]}), got shape {texts.shape}")
        return np.asarray(texts @ self.Q, dtype=np.float32)


def scores(q: npt.ArrayLike, v0: npt.ArrayLike, delta: npt.ArrayLike | None = None) -> FloatArray:
    """Cosines of queries with stored images: ``(delta*q).v0 / |delta*v0|``.

    Args:
        q: (r,) or (M, r) query coordinates.
        v0: (N, r) stored vectors.
        delta: (r,) changed spectrum over base spectrum, any sign; None leaves it unchanged.

    Returns:
        (N,) for one query, (M, N) for several; 0 for an image that the spectrum silences.
    """
    queries, stored = np.asarray(q), np.asarray(v0)
    if stored.ndim != 2 or queries.shape[-1:] != stored.shape[1:]:
        raise ValueError(f"q {queries.shape} and v0 {stored.shape} must end in the same r")
    if delta is None:
        return queries @ stored.T
    ratio = np.asarray(delta, dtype=np.float64)
    if ratio.shape != stored.shape[1:]:
        raise ValueError(f"delta must have shape ({stored.shape[1]},), got {ratio.shape}")
    # Only the direction of delta matters; its scale could under- or overflow the norms.
    largest = np.abs(ratio).max(initial=0.0)
    if largest > 0:
        ratio = ratio / largest
    scaled_queries = queries * ratio
    result = np.zeros((*queries.shape[:-1], len(stored)))
    for start in range(0, len(stored), _CHUNK_ROWS):
        rows = stored[start : start + _CHUNK_ROWS].astype(np.float64)
        raw = scaled_queries @ rows.T
        norms = np.sqrt(np.square(rows) @ np.square(ratio))
        np.divide(raw, norms, out=result[..., start : start + len(rows)], where=norms > 0)
    return result


def _as_float64(values: Any) -> np.ndarray:
    """Array from an array or a torch tensor, without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
