"""The dense weight of factored layers, as code that may write to it gets it.

Much code writes to `layer.weight` in place: initialisers, adapters that merge, masks. An eigen
layer has no such tensor, only the factors it is rebuilt from. So what is handed out is a
`DenseWeight`: whatever is written to it, to its `data` or to a view of it is factored and becomes
the layer's, by one SVD a write; what cannot be is refused.

>>> import torch
>>> from torch import nn
>>> from enn_core import ENNLinear
>>> layer = ENNLinear(3, 2)
>>> _ = nn.init.eye_(layer.weight)
>>> layer.Lambda.tolist()
[1.0, 1.0]
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["DenseWeight", "Loan", "as_weight"]

_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")


class Holder(Protocol):
    """The module that owns the factors."""

    def write_weight(self, weight: Tensor) -> None:
        """Take over a dense weight in the plain shape."""
        ...

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a factor does."""
        ...


class Loan:
    """A dense weight handed out, and whose it is.

    Every tensor that shares its memory through autograd's book-keeping shares its version counter
    too, so a write by any of them shows. `Tensor.data` has a counter of its own; `DenseWeight.data`
    is a detached tensor instead.
    """

    def __init__(self, holder: Holder, weight: Tensor) -> None:
        self.holder = weakref.ref(holder)  # the holder may cache this
        self.weight = weight.detach()
        self.written = self.weight._version
        self.factors = holder.versions()

    def settle(self) -> bool:
        """Give the layer what was written since; whether anything was."""
        if self.weight._version == self.written:
            return False
        self.written = self.weight._version
        self.write(self.weight)
        return True

    def write(self, value: Tensor) -> None:
        """Make `value` the layer's weight.

        Raises:
            RuntimeError: the factors have changed since the weight was handed out.
            FactorError: `value` has another shape.
        """
        holder = self.holder()
        if holder is None:
            return
        if holder.versions() != self.factors:
            raise RuntimeError(
                "got a write to a weight read before the eigen layer changed; read layer.weight "
                "again, then write"
            )
        holder.write_weight(value)
        self.factors = holder.versions()


def as_weight(loan: Loan, weight: Tensor, hooked: bool = True) -> Tensor:
    """`weight` as a `DenseWeight` that shares its memory and its graph.

    Args:
        loan: of this weight, or of what it is a view of.
        weight: plain tensor.
        hooked: see every torch function, and so every write at once. Else only methods of the
            tensor itself and its `data`, and the rest when the layer is used next; torch's fused
            attention, which takes no tensors with hooks, accepts it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        lent = weight.as_subclass(DenseWeight)
    lent._loan = loan
    if not hooked:
        lent.__torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment, method-assign]
    return lent


class _AsTensor(type(Tensor)):  # type: ignore[misc]
    """Any tensor counts as an instance: `torch.testing` compares related classes only."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Tensor)


class DenseWeight(Tensor, metaclass=_AsTensor):
    """See the module."""

    _loan: Loan | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if not all(issubclass(cls, other) for other in types):
            return NotImplemented
        kwargs = kwargs or {}
        given: list[Any] = []
        for value in (*args, *kwargs.values()):
            given += value if isinstance(value, (tuple, list)) else (value,)
        lent = [value for value in given if type(value) is DenseWeight]
        with torch._C.DisableTorchFunctionSubclass():
            # before the call, as torch judges: what is written may bring its own graph along
            in_graph = [torch.is_grad_enabled() and tensor.requires_grad for tensor in lent]
            result = func(*args, **kwargs)
            if func is Tensor.requires_grad_ and args[0].is_leaf:
                args[0]._loan = None  # a parameter is made of it, which is its own
            for tensor, refused in zip(lent, in_graph, strict=True):
                loan = tensor._loan
                if loan is None:
                    continue
                if refused:
                    if loan.weight._version != loan.written:
                        loan.written = loan.weight._version
                        raise RuntimeError(
                            "got an in-place operation on an eigen layer's weight that requires "
                            "grad; write under torch.no_grad(), or assign layer.weight = new"
                        )
                else:
                    loan.settle()
                result = _alias(result, loan)
        return result

    def detach(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            plain = super().detach()
        return plain if self._loan is None else as_weight(self._loan, plain)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        loan = self._loan
        if loan is None:
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        elif value.shape != loan.weight.shape or getattr(value, "_loan", None) is not loan:
            loan.write(value)
            loan.weight.data.copy_(value)  # without a version: written already
        # else `data += x`, which is settled

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._loan is not None:
            raise RuntimeError(
                "got set_() on an eigen layer's weight, which has no memory of its own; assign "
                "layer.weight = new"
            )
        return super().set_(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        array = self._plain().numpy(force=force)
        if self._loan is not None:  # no write to an array can be seen
            array.setflags(write=False)
        return array

    def __deepcopy__(self, memo: Any) -> Tensor:
        if getattr(self, "_is_param", False):
            plain = copy.deepcopy(self._plain().detach(), memo)
            return torch.nn.Parameter(plain, self.requires_grad)
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return self._plain().__repr__(**kwargs)

    def _plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self if type(self) is Tensor else self.as_subclass(Tensor)


def _alias(result: Any, loan: Loan) -> Any:
    """`result`, with tensors that share the weight's memory as `DenseWeight`s."""
    if type(result) in (tuple, list):
        return type(result)(_alias(one, loan) for one in result)
    if type(result) is not Tensor:
        return result
    try:
        shared = result.untyped_storage()._cdata == loan.weight.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse, or within vmap: no memory of its own
        return result
    return as_weight(loan, result) if shared else result


def _settling(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def write(self: DenseWeight, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if self._loan is not None:
            self._loan.settle()
        return result

    write.__name__ = name
    return write


# What torch functions do is seen by `__torch_function__`, unless it is switched off.
for _name in dir(Tensor):
    _writes = _name in _IN_PLACE or (_name.endswith("_") and not _name.startswith("_"))
    if _writes and _name not in vars(DenseWeight):  # `set_` is above
        setattr(DenseWeight, _name, _settling(_name))
