"""The arithmetic of `W = Q diag(Lambda) P^T`: factoring, rebuilding, applying.

Shapes: `W` is (..., out, n), `Q` (..., out, r), `Lambda` (..., r), `P` (..., n, r) with
`r = min(out, n)`. Leading dimensions, if any, are independent matrices (convolution groups, or
the q, k, v blocks of a packed attention projection).

>>> import torch
>>> W = torch.randn(3, 5)
>>> Q, Lambda, P = svd_factors(W)
>>> bool(torch.allclose((Q * Lambda) @ P.mT, W.double()))
True
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


class FactorError(ValueError):
    """A weight that has no usable factors (NaN, infinity, not a matrix, not real)."""


def in_working_precision(factor: Tensor) -> Tensor:
    """At least float32: in half precision a Gram matrix is only good to 1e-2."""
    return factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor


def gram_error(factor: Tensor) -> Tensor:
    """`Q^T Q - I` (..., r, r)."""
    gram = factor.mT @ factor
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)  # in place: no identity matrix is built
    return gram


def relative_size(error: Tensor) -> Tensor:
    """`||E||_F / sqrt(r)` of each matrix (..., r, r)."""
    return torch.linalg.matrix_norm(error) / error.shape[-1] ** 0.5


def svd_factors(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor a matrix exactly: economy SVD in float64.

    The sign of each pair of columns is fixed so that the entry of `Q` with the largest magnitude
    is positive; distinct singular values then give the same factors on every platform.

    Args:
        W: (..., out, n) real tensor of any floating dtype, on any device.

    Returns:
        `Q` (..., out, r), `Lambda` (..., r) descending and >= 0, `P` (..., n, r), all float64 on
        the device of `W` (on the CPU for devices without float64).

    Raises:
        FactorError: `W` has fewer than two dimensions, is not a real floating tensor, or holds
            NaN or infinity.
    """
    if W.ndim < 2 or not W.is_floating_point():
        raise FactorError(
            f"svd_factors needs a real floating tensor (..., out, n), got {W.dtype} of shape "
            f"{tuple(W.shape)}; reshape or cast it first"
        )
    dense = W.detach()
    if dense.device.type == "mps":  # no float64 there
        dense = dense.cpu()
    dense = dense.double()
    if not dense.is_meta and not bool(torch.isfinite(dense).all()):
        raise FactorError("the weight holds NaN or infinity; only finite weights can be factored")
    Q, Lambda, Ph = torch.linalg.svd(dense, full_matrices=False)
    P = Ph.mT
    if not dense.is_meta and Q.numel():
        largest = Q.abs().argmax(dim=-2, keepdim=True)
        sign = torch.where(Q.gather(-2, largest) < 0, -1.0, 1.0).to(Q.dtype)
        Q, P = Q * sign, P * sign
    return Q.contiguous(), Lambda, P.contiguous()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype in which a product with `tensor` runs: the autocast dtype inside autocast."""
    kind = tensor.device.type
    if tensor.dtype is torch.float64 or not torch.amp.is_autocast_available(kind):
        return tensor.dtype
    if not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def _product(Q: Tensor, Lambda: Tensor, P: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., out, n) `Q diag(Lambda) P^T`, with Lambda folded into the smaller factor."""
    scale = Lambda.unsqueeze(-2)
    if Q.shape[-2] <= P.shape[-2]:
        return (Q * scale).to(dtype) @ P.to(dtype).mT
    return Q.to(dtype) @ (P * scale).to(dtype).mT


class _Rebuild(Function):
    """`W = Q diag(Lambda) P^T`, keeping nothing for backward but the parameters themselves.

    Autograd would also keep the scaled factor. Backward costs two products of the size of the
    forward one and is itself differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(Q: Tensor, Lambda: Tensor, P: Tensor, dtype: torch.dtype) -> Tensor:
        return _product(Q, Lambda, P, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Q, Lambda, P, _ = inputs
        ctx.save_for_backward(Q, Lambda, P)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        Q, Lambda, P = ctx.saved_tensors
        need_q, need_lambda, need_p, _ = ctx.needs_input_grad
        scale = Lambda.unsqueeze(-2)
        grad_q = grad_lambda = grad_p = None
        if need_q or need_lambda:
            along_p = (grad @ P.to(grad.dtype)).to(Q.dtype)
            if need_q:
                grad_q = along_p * scale
            if need_lambda:
                grad_lambda = (Q * along_p).sum(-2)
        if need_p:
            grad_p = (grad.mT @ Q.to(grad.dtype)).to(P.dtype) * scale
        return grad_q, grad_lambda, grad_p, None


# Below this many numbers in Q and P, autograd's own nodes are faster than a Python function by
# about 25 us a call, and what they save is at most half a megabyte.
_SMALL = 2**17


def rebuild(Q: Tensor, Lambda: Tensor, P: Tensor) -> Tensor:
    """Dense weight (..., out, n) from its factors, in the autocast dtype inside autocast.

    Differentiable, twice if wanted. Large factors save no tensor beyond the three inputs.
    """
    dtype = compute_dtype(Q)
    if Q.numel() + P.numel() < _SMALL:
        return _product(Q, Lambda, P, dtype)
    return _Rebuild.apply(Q, Lambda, P, dtype)


def apply_factors(
    input: Tensor, Q: Tensor, Lambda: Tensor, P: Tensor, bias: Tensor | None
) -> Tensor:
    """`input W^T + bias` without forming `W`: r(out + n) instead of out*n multiplications a row.

    Args:
        input: (..., n).
        Q, Lambda, P: factors of one matrix, no leading dimensions.
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    out, n = Q.shape[0], P.shape[0]
    rows = input.numel() // n
    # Lambda scales whichever has the fewest entries: the activations, Q or P.
    if rows < min(out, n):
        return F.linear(F.linear(input, P.mT) * Lambda, Q, bias)
    if out <= n:
        return F.linear(F.linear(input, P.mT), Q * Lambda, bias)
    return F.linear(F.linear(input, (P * Lambda).mT), Q, bias)


def rebuild_is_cheaper(rows: int, out: int, n: int) -> bool:
    """Whether rebuilding `W` (out, n) beats applying its factors to `rows` tokens or pixels.

    Rebuilding costs `1 + r/rows` plain layers, applying `r(out + n)/(out n)`: equal at
    `rows = max(out, n)`.
    """
    return rows > max(out, n)
