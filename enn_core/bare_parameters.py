"""Factored weights that are bare parameters of a module rather than layers of their own.

Examples: `in_proj_weight` of `nn.MultiheadAttention` (q, k and v packed into one matrix), or
`visual.proj` of a CLIP model (stored transposed: `x @ proj`). The owner keeps its code: its class
is extended by a property that yields the dense parameter, and the factors live in a child module
`<name>_eigen` with the keys `Q`, `Lambda`, `P`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enn_core.factors import FactorError
from enn_core.layers import FACTORS, Factored, split_entry

SUFFIX = "_eigen"


@dataclass(frozen=True)
class Form:
    """How a bare parameter holds its matrix: `blocks` stacked on dim 0, or the transpose."""

    blocks: int = 1
    transposed: bool = False

    def as_matrix(self, value: Tensor) -> Tensor:
        """(out, n), or (blocks, out, n) for a packed parameter."""
        matrix = value.detach()
        if self.transposed:
            matrix = matrix.mT
        if self.blocks > 1:
            matrix = matrix.reshape(self.blocks, matrix.shape[0] // self.blocks, matrix.shape[1])
        return matrix

    def as_parameter(self, matrix: Tensor) -> Tensor:
        """Inverse of `as_matrix`."""
        if self.blocks > 1:
            matrix = matrix.flatten(0, 1)
        return matrix.mT if self.transposed else matrix


# Linear maps by their name in torch, open_clip and timm. Position embeddings and the like are
# matrices too, but no maps; so shape alone cannot tell.
KNOWN_FORMS: dict[str, Form] = {
    "in_proj_weight": Form(blocks=3),
    "q_proj_weight": Form(),
    "k_proj_weight": Form(),
    "v_proj_weight": Form(),
    "proj": Form(transposed=True),
    "text_projection": Form(transposed=True),
}


def known_form(name: str, value: Tensor) -> Form | None:
    """Form of the bare parameter `name`, None if it is not known to be a linear map."""
    form = KNOWN_FORMS.get(name)
    if form is None or value.ndim != 2:
        return None
    if form.blocks > 1 and value.shape[0] != form.blocks * value.shape[1]:
        return None
    return form


class EigenWeight(Factored):
    """Factors of one bare parameter; `forward()` gives the dense parameter in its own shape."""

    def __init__(
        self, shape: tuple[int, ...], form: Form, factors: dict[str, nn.Parameter]
    ) -> None:
        super().__init__()
        self.form = form
        self.shape = shape
        self.plain_order: tuple[str, ...] = ()  # the owner's parameter names, in order
        for name in FACTORS:
            self.register_parameter(name, factors[name])

    def forward(self) -> Tensor:
        return self.dense()

    def assign(self, weight: Tensor) -> None:
        if isinstance(weight, Tensor) and tuple(weight.shape) != self.shape:
            raise FactorError(
                f"got a weight of shape {tuple(weight.shape)}, this parameter's is {self.shape}"
            )
        super().assign(self.form.as_matrix(weight) if isinstance(weight, Tensor) else weight)

    def _shaped(self, dense: Tensor) -> Tensor:
        return self.form.as_parameter(dense)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, rank={self.Lambda.shape[-1]}, form={self.form}"


class EigenOwner(nn.Module):
    """Mixin, generated per class: properties in place of bare parameters."""

    plain_class: type[nn.Module]
    eigen_names: tuple[str, ...]
    _bound: dict[str, Tensor] | None = None

    def eigen_weight(self, name: str) -> EigenWeight:
        """Factors of the bare parameter `name`."""
        child = self._modules[name + SUFFIX]
        if not isinstance(child, EigenWeight):
            raise TypeError(f"{name}{SUFFIX} was replaced by a {type(child).__name__}")
        return child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The owner's forward may read a parameter several times; rebuild it once a call.
        if torch.compiler.is_compiling() or self._bound is not None:
            return super().forward(*args, **kwargs)
        self._bound = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._bound = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self.eigen_names:  # how `nn.Module` assigns a Parameter
            self.eigen_weight(name).assign(param)  # type: ignore[arg-type]
        else:
            super().register_parameter(name, param)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        for name in self.eigen_names:
            key, child = prefix + name, self.eigen_weight(name)
            split_entry(
                state_dict, key, f"{key}{SUFFIX}.", child, child.shape, child.form.as_matrix,
                local_metadata, args[-1],
            )  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_bound", None)
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_owner, (self.plain_class, self.eigen_names), self.__getstate__()


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor:
        bound = self._bound
        if bound is not None and name in bound:
            return bound[name]
        child = self._modules.get(name + SUFFIX)
        if child is None:
            raise AttributeError(name)
        if bound is None:
            return child.lent()
        bound[name] = child()
        return bound[name]

    def assign(self: Any, value: Tensor) -> None:
        self.eigen_weight(name).assign(value)

    return property(read, assign, doc=f"Dense `{name}`, rebuilt from `{name}{SUFFIX}`.")


_owner_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[EigenOwner]] = {}


def owner_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[EigenOwner]:
    """`cls` with the bare parameters `names` replaced by properties."""
    if (cls, names) not in _owner_classes:
        members: dict[str, Any] = {name: _reader(name) for name in names}
        members |= {"plain_class": cls, "eigen_names": names, "__doc__": cls.__doc__}
        _owner_classes[cls, names] = type(f"ENN{cls.__name__}", (EigenOwner, cls), members)
    return _owner_classes[cls, names]


def _new_owner(plain_class: type[nn.Module], names: tuple[str, ...]) -> EigenOwner:
    """Empty instance of a generated class, for copy and pickle."""
    cls = owner_class(plain_class, names)
    return cls.__new__(cls)
