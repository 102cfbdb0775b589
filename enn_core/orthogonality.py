"""Keeping `Q` and `P` orthonormal: penalty, error, retraction.

Two ways. The *penalty* is the paper's term, added to the loss; measured, it does not hold the
factors. *Retraction* puts them back on the manifold after optimizer steps; it is the default.

>>> import torch
>>> from enn_core import ENNLinear, Retraction, orthogonality_error, param_groups
>>> layer = ENNLinear(8, 4)
>>> optimizer = torch.optim.AdamW(param_groups(layer, lr=1e-2))
>>> retraction = Retraction(optimizer, layer, every=1)
>>> for _ in range(3):
...     optimizer.zero_grad()
...     layer(torch.randn(16, 8)).square().mean().backward()
...     _ = optimizer.step()
>>> max(orthogonality_error(layer).values()) < 5e-3
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Function

from enn_core.factors import gram_error, in_working_precision, relative_size
from enn_core.layers import Factored

Method = Literal["newton-schulz", "quintic", "qr"]
METHODS: tuple[str, ...] = get_args(Method)

# Newton-Schulz maps a singular value s to s(3 - s^2)/2 and converges for s < sqrt(3), but from
# further than this (spectral norm of Q^T Q - I) it needs three steps, dearer than one QR.
_FAR = 0.5
_NEAR = 0.75  # up to here the Gram matrix is safely positive definite (spectral norm below 1)
_MAX_STEPS = 8


def factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every distinct `Q` and `P` of a model with its dotted name."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, Factored):
            continue
        for name in ("Q", "P"):
            factor = module._parameters[name]
            if factor is not None and id(factor) not in seen:
                seen.add(id(factor))
                yield f"{path}.{name}".lstrip("."), factor


class _Penalty(Function):
    """`||Q^T Q - I||_F^2` with gradient `4 Q (Q^T Q - I)`."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor) -> Tensor:
        work = in_working_precision(factor)
        with torch.autocast(factor.device.type, enabled=False):
            error = gram_error(work)
        ctx.save_for_backward(factor, error)
        return error.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        factor, error = ctx.saved_tensors
        work = in_working_precision(factor)
        if torch.is_grad_enabled():  # create_graph: this gradient will be differentiated
            error = gram_error(work)
        return ((work @ error) * (4 * grad)).to(factor.dtype)


def orthogonality_penalty(model: nn.Module, coefficient: float = 2e-4) -> Tensor:
    """The paper's term: `coefficient * sum over layers (||Q^T Q - I||_F^2 + ||P^T P - I||_F^2)`.

    Args:
        model: module whose eigen layers count; frozen factors add a constant.
        coefficient: lambda, 2e-4 in the paper.

    Returns:
        Scalar, float32 at least; its gradient is the closed form, not autograd's.
    """
    total: Tensor | None = None
    for _, factor in factors(model):
        term = _Penalty.apply(factor)
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else coefficient * total


@torch.no_grad()
def orthogonality_error(model: nn.Module) -> dict[str, float]:
    """`||Q^T Q - I||_F / sqrt(r)` of every `Q` and `P`, by dotted name; 0 is orthonormal."""
    report = {}
    for name, factor in factors(model):
        with torch.autocast(factor.device.type, enabled=False):
            error = gram_error(in_working_precision(factor))
        report[name] = float(relative_size(error).max())
    return report


@torch.no_grad()
def retract_(
    model: nn.Module, method: Method = "newton-schulz", bound: float = 1e-3
) -> dict[str, float]:
    """Put every trainable `Q` and `P` back on the orthonormal matrices, in place.

    One step of the method, and more while the error is estimated to exceed `bound`.

    Args:
        model: module whose eigen layers are retracted.
        method: "newton-schulz" (two products a step, the nearest orthonormal matrix), "quintic"
            (three, cubic convergence) or "qr" (exact at once, cheaper than two steps of the
            others). Factors too far away for polynomials are retracted by QR in any case.
        bound: largest `||Q^T Q - I||_F / sqrt(r)` that may remain.

    Returns:
        The error of every factor before the retraction, by dotted name.

    Raises:
        ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown, valid are {', '.join(METHODS)}")
    before = {}
    for name, factor in factors(model):
        if factor.requires_grad:
            before[name] = _retract(factor, method, bound)
    return before


def _retract(factor: nn.Parameter, method: Method, bound: float) -> float:
    """Retract one factor in place; its relative error before."""
    first = 0.0
    with torch.autocast(factor.device.type, enabled=False):
        work = in_working_precision(factor)
        for step in range(_MAX_STEPS):
            error = gram_error(work)
            rms = float(relative_size(error).max())  # of the eigenvalues of Q^T Q - I
            if step == 0:
                first = rms
            elif rms <= bound:
                break
            # The Frobenius norm bounds the spectral one; often that is all one needs to know.
            largest = rms * error.shape[-1] ** 0.5
            if not largest < 0.1:
                largest = _spectral_norm(error)
            if method == "qr" or not largest < _FAR:  # NaN goes this way too, once
                work = _cholesky_qr(work, error) if largest < _NEAR else _qr(work)
                break
            if method == "newton-schulz":
                step_matrix = error.mul_(-0.5)
                left = 0.75 * largest * rms
            else:
                step_matrix = (error @ error).mul_(0.375).sub_(error, alpha=0.5)
                left = 0.625 * largest**2 * rms
            work = work.addmm(work, step_matrix) if work.ndim == 2 else work + work @ step_matrix
            if 1.5 * left < bound:  # 1.5: `largest` is estimated from below
                break
        factor.copy_(work)
    return first


def _spectral_norm(error: Tensor) -> float:
    """Largest |eigenvalue| of a symmetric matrix (..., r, r), from below, by power iteration."""
    start = error.square().sum(-1, keepdim=True).argmax(-2, keepdim=True)
    vector = torch.take_along_dim(error, start, dim=-1)
    norm = vector.norm(dim=-2, keepdim=True)
    for _ in range(3):
        vector = error @ (vector / norm.clamp_min(torch.finfo(error.dtype).tiny))
        norm = vector.norm(dim=-2, keepdim=True)
    return float(norm.max())


def _cholesky_qr(work: Tensor, error: Tensor) -> Tensor:
    """The `Q` of the QR decomposition from the Gram matrix at hand; a third of the price of `_qr`.

    Rounding grows with the square of the condition, so only for nearly orthonormal columns.
    """
    error.diagonal(dim1=-2, dim2=-1).add_(1)
    lower, failed = torch.linalg.cholesky_ex(error)
    if bool(failed.any()):  # farther away than was estimated
        return _qr(work)
    return torch.linalg.solve_triangular(lower.mT, work, upper=True, left=False)


def _qr(work: Tensor) -> Tensor:
    """QR with positive diagonal of R (Householder), so that no column changes its sense."""
    Q, R = torch.linalg.qr(work)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return Q * sign.unsqueeze(-2)


class Retraction:
    """Retracts a model's factors after every `every`-th step of an optimizer.

    Works with any `torch.optim.Optimizer`, through its step post-hook. Where its `eval()` puts
    averages into the parameters, as schedule-free optimizers do, these are retracted too, and
    training goes on from them. Averages in copies of the model (EMA, SWA) are the caller's to
    retract, `retract_(average)`; evaluated without it, they warn.

    Args:
        optimizer: steps the model's parameters.
        model: module whose eigen layers are retracted.
        every: optimizer steps between retractions.
        method, bound: as in `retract_`.

    Attributes:
        steps: optimizer steps seen; kept in the optimizer's first parameter group, so that the
            usual checkpoint (model, optimizer) resumes in step.
        last_error: error of every factor just before the last retraction.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        every: int = 10,
        method: Method = "newton-schulz",
        bound: float = 1e-3,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} is invalid, give a number of steps >= 1")
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown, valid are {', '.join(METHODS)}")
        self.model, self.every, self.method, self.bound = model, every, method, bound
        self.optimizer = optimizer
        nth = optimizer.__dict__["_retractions"] = optimizer.__dict__.get("_retractions", 0) + 1
        self._key = "retraction_steps" if nth == 1 else f"retraction_steps_{nth}"
        self.last_error: dict[str, float] = {}
        self._handle = optimizer.register_step_post_hook(self._after_step)
        self._is_removed = False
        self._held = [module for module in model.modules() if isinstance(module, Factored)]
        for layer in self._held:
            layer.hold()
        if callable(evaluate := getattr(optimizer, "eval", None)):
            optimizer.__dict__["eval"] = self._with_averages_retracted(evaluate)

    @property
    def steps(self) -> int:
        return int(self.optimizer.param_groups[0].get(self._key, 0))

    @steps.setter
    def steps(self, value: int) -> None:
        self.optimizer.param_groups[0][self._key] = value

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.last_error = retract_(self.model, self.method, self.bound)

    def _with_averages_retracted(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            before = [factor._version for _, factor in factors(self.model)]
            result = evaluate(*args, **options)
            after = [factor._version for _, factor in factors(self.model)]
            if before != after and not self._is_removed:  # else they are what they were
                self.last_error = retract_(self.model, self.method, self.bound)
            return result

        return wrapped

    def remove(self) -> None:
        """Stop retracting."""
        if not self._is_removed:
            self._handle.remove()
            self._is_removed = True
            for layer in self._held:
                layer.hold(False)


def param_groups(
    model: nn.Module, lr: float | None = None, weight_decay: float = 1e-2
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: no weight decay on `Q`, `P`, biases and norms.

    `Lambda` decays with the plain weights: decaying it decays `||W||_F`, as `||W||_F = ||Lambda||`.

    Args:
        model: module, converted or not; frozen parameters are left out.
        lr: learning rate of both groups; the optimizer's own if None.
        weight_decay: for the decayed group.

    Returns:
        Two groups (or one, if the other is empty), decayed first.
    """
    bases = {id(factor) for _, factor in factors(model)}
    spectra = {id(m.Lambda) for m in model.modules() if isinstance(m, Factored)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        decays = id(parameter) in spectra or (parameter.ndim > 1 and id(parameter) not in bases)
        (decayed if decays else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if lr is not None:
        groups = [{**group, "lr": lr} for group in groups]
    return [group for group in groups if group["params"]]
