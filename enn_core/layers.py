"""Eigen layers: drop-in twins of `nn.Linear` and `nn.ConvNd` that learn `W = Q diag(Lambda) P^T`.

Every layer stores `Q` (out, r), `Lambda` (r), `P` (n, r) and `bias`, with `n` the inputs of one
output (in_features, or in_channels/groups times the kernel volume) and `r = min(out, n)`. With
`groups > 1` each factor has a leading dimension of `groups`, and `out` counts the channels of one
group. `layer.weight` is the dense weight: differentiable in training, cached in eval; what is
written to it, or assigned, is factored.

>>> import torch
>>> from enn_core import ENNLinear
>>> layer = ENNLinear(8, 3)
>>> layer(torch.zeros(2, 8)).shape
torch.Size([2, 3])
>>> sorted(layer.state_dict())
['Lambda', 'P', 'Q', 'bias']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.common_types import _size_1_t, _size_2_t, _size_3_t

from enn_core.averages import Copyable, warn_if_averaged
from enn_core.dense_weights import Loan, as_weight
from enn_core.factors import (
    FactorError,
    apply_factors,
    rebuild,
    rebuild_is_cheaper,
    svd_factors,
)

FACTORS = ("Q", "Lambda", "P")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _Cached(NamedTuple):
    """A dense weight and what it was built from."""

    Q: nn.Parameter
    Lambda: nn.Parameter
    P: nn.Parameter
    state: tuple[int, ...]  # versions and addresses of the factors, version of the weight
    weight: Tensor
    loan: Loan
    lent: Tensor  # the weight, to be handed out


class Factored(Copyable, nn.Module):
    """A module that owns one factored weight: parameters `Q`, `Lambda`, `P`."""

    Q: nn.Parameter
    Lambda: nn.Parameter
    P: nn.Parameter
    _cache: _Cached | None = None
    _looked_at: tuple[int, ...] = ()

    def dense(self) -> Tensor:
        """Dense weight in the shape of the plain one: differentiable, or cached in eval.

        In eval mode, where the factors need no gradient, the tensor is kept until a factor
        changes (in place, by `load_state_dict`, by assignment or by `.to()`) or `train()` is
        called. Writing through `Tensor.data` of a factor in eval mode leaves no trace that could
        be checked: call `train()` and `eval()` after it.
        """
        weight = self._cached()
        if weight is None:
            weight = self._shaped(rebuild(self.Q, self.Lambda, self.P))
        return weight

    def lent(self) -> Tensor:
        """`dense()`, as code that may write to it gets it: see `enn_core.dense_weights`."""
        factors = [self._parameters[name] for name in FACTORS]
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _are_transient(factors):
            return self.dense()
        if self._cached() is not None and self._cache is not None:
            return self._cache.lent
        grad = torch.is_grad_enabled()
        # Tensors made in inference mode have no version that a write would change.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            weight = self._shaped(rebuild(self.Q, self.Lambda, self.P))
        return as_weight(Loan(self, weight), weight)

    def settle(self) -> None:
        """Take over what was written to the cached weight."""
        if self._cache is not None:
            self._cache.loan.settle()

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a factor does."""
        factors = [self._parameters[name] for name in FACTORS]
        return tuple(x for f in factors if f is not None for x in (id(f), f._version, f.data_ptr()))

    def write_weight(self, weight: Tensor) -> None:
        """Take over a dense weight in the plain shape; one that is not finite gives NaN."""
        if bool(torch.isfinite(weight).all()):
            self.assign(weight)
        else:  # on the way, it may be: some initialisers clamp last
            self.Lambda.detach().fill_(torch.nan)

    def assign(self, weight: Tensor) -> None:
        """`factor_` for a weight in the plain shape."""
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"got {type(weight).__name__} for the weight of an eigen layer, give a tensor; "
                "`fuse` gives the plain layer back"
            )
        self.factor_(weight)

    def _shaped(self, dense: Tensor) -> Tensor:
        """(..., out, n) in the shape of the plain weight."""
        return dense

    def _cached(self) -> Tensor | None:
        """The dense weight if it may be cached now, else None; called in every forward."""
        if self.training or torch.compiler.is_compiling():
            return None
        parameters = self._parameters  # three times faster than attributes
        Q, Lambda, P = parameters["Q"], parameters["Lambda"], parameters["P"]
        if torch.is_grad_enabled() and (
            Q.requires_grad or Lambda.requires_grad or P.requires_grad  # type: ignore[union-attr]
        ):
            self._look()
            return None
        cache = self._cache
        if (
            cache is not None
            and cache.Q is Q
            and cache.Lambda is Lambda
            and cache.P is P
            and cache.state == _state(Q, Lambda, P, cache.weight)
        ):
            return cache.weight
        factors = (Q, Lambda, P)
        if cache is not None and cache.loan.settle():
            return self._cached()
        if _are_transient(factors):
            return None
        self._look()
        # Outside inference mode and autocast, so that the tensor serves every later context.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(Q.device.type, enabled=False),  # type: ignore[union-attr]
        ):
            weight = self._shaped(rebuild(*factors))  # type: ignore[arg-type]
            state = _state(*factors, weight)  # type: ignore[arg-type]
            loan = Loan(self, weight)
            lent = as_weight(loan, weight, hooked=False)
            self._cache = _Cached(*factors, state, weight, loan, lent)  # type: ignore[arg-type]
        return weight

    def _look(self) -> None:
        """Warn of averaged factors, once for what they are now."""
        Q, P = self._parameters["Q"], self._parameters["P"]
        if not self.has_held_kin() or _are_transient((Q, P)) or torch.jit.is_tracing():
            return
        if self._looked_at != (seen := self.versions()):
            self._looked_at = seen
            warn_if_averaged(Q, P, is_held=self.is_held)  # type: ignore[arg-type]

    @torch.no_grad()
    def factor_(self, weight: Tensor) -> None:
        """Replace the factors by those of `weight` (..., out, n), exactly (float64 SVD).

        Raises:
            FactorError: the shape differs from the layer's, or `weight` is not finite.
        """
        Q, P = self.Q, self.P
        expected = (*Q.shape[:-1], P.shape[-2])
        if tuple(weight.shape) != expected:
            raise FactorError(
                f"got a weight of shape {tuple(weight.shape)}, this layer factors {expected}"
            )
        for name, value in zip(FACTORS, svd_factors(weight), strict=True):
            self._parameters[name].copy_(value)  # type: ignore[union-attr]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.settle()
        self._cache = None
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        self.settle()
        if mode:
            self._cache = None
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        self.lineage()
        state = self.__dict__.copy()
        for name in ("_cache", "_looked_at", "is_held"):
            state.pop(name, None)
        return state


def _are_transient(factors: Iterable[Tensor | None]) -> bool:
    """Whether some is no plain Parameter with numbers (functional_call, vmap, fake tensors)."""
    return any(type(f) is not nn.Parameter or f.is_inference() or f.is_meta for f in factors)


def _state(Q: Tensor, Lambda: Tensor, P: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Changes with every write to the factors or to the weight itself."""
    return (
        Q._version,
        Lambda._version,
        P._version,
        weight._version,
        Q.data_ptr(),
        Lambda.data_ptr(),
        P.data_ptr(),
    )


def make_parameters(
    weight: Tensor, requires_grad: bool = True
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Factors of `weight` (..., out, n) as parameters of its dtype and device."""
    Q, Lambda, P = (
        nn.Parameter(f.to(device=weight.device, dtype=weight.dtype), requires_grad=requires_grad)
        for f in svd_factors(weight)
    )
    return Q, Lambda, P


def replace_parameter(module: nn.Module, old: str, new: dict[str, nn.Parameter]) -> None:
    """Put `new` where `old` stands in the order of `module`'s own parameters."""
    before = dict(module._parameters)
    module._parameters.clear()
    for name, parameter in before.items():
        if name == old:
            module._parameters.update(new)
        else:
            module._parameters[name] = parameter


def split_entry(
    state_dict: dict[str, Any],
    key: str,
    target: str,
    holder: Factored,
    shape: tuple[int, ...],
    as_matrix: Callable[[Tensor], Tensor],
    metadata: dict[str, Any],
    errors: list[str],
) -> None:
    """Turn the plain weight `key` of a state dict into the factors that `holder` loads.

    Args:
        state_dict: changed in place, nothing if it has no `key`.
        target: prefix of the factors' keys.
        shape: of the plain weight.
        as_matrix: plain weight -> (..., out, n).
        metadata, errors: as in `nn.Module._load_from_state_dict`.
    """
    if key not in state_dict:
        return
    weight = state_dict.pop(key)
    factors: tuple[Tensor, ...] = (holder.Q, holder.Lambda, holder.P)
    if tuple(weight.shape) != shape:
        errors.append(
            f"size mismatch for {key}: copying a param with shape {tuple(weight.shape)} from "
            f"checkpoint, the shape in current model is {shape}."
        )
    else:
        try:
            factors = svd_factors(as_matrix(weight))
        except FactorError as error:
            errors.append(f"{key}: {error}")
        if metadata.get("assign_to_params_buffers"):  # else copied, and cast, from float64
            factors = tuple(f.to(weight.device, weight.dtype) for f in factors)
    for name, factor in zip(FACTORS, factors, strict=True):
        state_dict[target + name] = factor.detach()


def is_channels_last(weight: Tensor) -> bool:
    """Whether a convolution weight is stored channels last, and only so."""
    if weight.ndim not in _CHANNELS_LAST or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=_CHANNELS_LAST[weight.ndim])


def as_matrix(weight: Tensor, groups: int) -> Tensor:
    """(out, n) view of a layer's dense weight, or (groups, out, n)."""
    if groups > 1:
        return weight.detach().reshape(groups, weight.shape[0] // groups, -1)
    return weight.detach().reshape(weight.shape[0], -1)


class EigenLayer(Factored):
    """What all eigen layers share; stands before the plain class in the method resolution order."""

    plain_class: type[nn.Module]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # the plain layer, with a plain weight
        self._split_weight()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, as in the plain twin."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Dense weight in the plain twin's shape; what is written or assigned is factored."""
        plain = self._parameters.get("weight")
        if plain is not None:  # only while being built
            return plain
        if "Q" not in self._parameters:
            raise AttributeError("weight")
        return self.lent()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.assign(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and "Q" in self._parameters:  # how `nn.Module` assigns a Parameter
            self.assign(param)  # type: ignore[arg-type]
        else:
            super().register_parameter(name, param)

    def _shaped(self, dense: Tensor) -> Tensor:
        return dense.view(self.weight_shape)

    def _split_weight(self) -> None:
        plain = self._parameters["weight"]
        factors = make_parameters(self._as_matrix(plain), plain.requires_grad)  # type: ignore[arg-type, union-attr]
        replace_parameter(self, "weight", dict(zip(FACTORS, factors, strict=True)))

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return as_matrix(weight, getattr(self, "groups", 1))

    def factor_(self, weight: Tensor) -> None:
        """Replace the factors by those of `weight`, given in the plain twin's shape."""
        if tuple(weight.shape) != self.weight_shape:
            raise FactorError(
                f"got a weight of shape {tuple(weight.shape)}, this layer's is {self.weight_shape}"
            )
        super().factor_(self._as_matrix(weight))

    def reset_parameters(self) -> None:
        """Draw a weight (and bias) as the plain twin does and factor it."""
        if "Q" not in self._parameters:
            super().reset_parameters()  # type: ignore[misc]
            return
        Q = self.Q
        plain = nn.Parameter(torch.empty(self.weight_shape, dtype=Q.dtype, device=Q.device))
        self._parameters["weight"] = plain
        try:
            super().reset_parameters()  # type: ignore[misc]
        finally:
            del self._parameters["weight"]
        self.factor_(plain.detach())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        split_entry(
            state_dict, f"{prefix}weight", prefix, self, self.weight_shape, self._as_matrix,
            local_metadata, args[-1],
        )  # fmt: skip
        self._cache = None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self._parameters['Lambda'].shape[-1]}"  # type: ignore[union-attr]

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        if "_generated" in cls.__dict__:
            return _new_generated, (cls.plain_class,), self.__getstate__()
        return super().__reduce_ex__(protocol)


class ENNLinear(EigenLayer, nn.Linear):
    """`nn.Linear` with `W = Q diag(Lambda) P^T`: input (*, in_features) -> (*, out_features).

    Rebuilds `W` when the input has more rows than `max(in_features, out_features)`, otherwise
    applies the factors one after the other.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether to learn an additive bias.
        device, dtype: of the parameters.
    """

    plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._cached()
        if weight is None:
            rows = input.numel() // max(self.in_features, 1)
            if not rebuild_is_cheaper(rows, self.out_features, self.in_features):
                return apply_factors(input, self.Q, self.Lambda, self.P, self.bias)
            weight = rebuild(self.Q, self.Lambda, self.P)
        return F.linear(input, weight, self._parameters["bias"])


class ENNConv(EigenLayer):
    """Shared by the three convolutions, which take all arguments of their twins.

    Rebuilds the kernel for many output positions. For few (see `_way`) it multiplies the unfolded
    input by `P` and then by `Q`, or convolves with the r kernels in `P` and mixes the maps by `Q`.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _reversed_padding_repeated_twice: list[int]
    _channels_last: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._cached()
        if weight is None:
            sizes = self._output_sizes(input)
            way = self._way(input, sizes)
            if way == "unfold":
                return self._apply_unfolded(input, sizes)
            if way == "kernels":
                return self._apply_kernels(input)
            weight = self._shaped(rebuild(self.Q, self.Lambda, self.P))
        return self._conv_forward(input, weight, self._parameters["bias"])  # type: ignore[operator]

    def _way(self, input: Tensor, sizes: tuple[int, ...]) -> str:
        """The cheapest way to convolve: "rebuild", "unfold" or "kernels".

        By the count of multiplications factors win up to max(out, n) positions. Measured on
        kernels larger than one pixel, transposing P into r kernels costs what they save beyond 4 r
        positions; below, unfolding avoids that transpose (512 -> 512, 3x3, 49 positions: 0.85
        plain layers against 3.1 by kernels and 5.7 rebuilt).
        """
        dims = len(sizes)
        count = prod(sizes) * (input.shape[0] if input.ndim > dims + 1 else 1)
        n, r = self.P.shape[-2:]
        if self.groups > 1 or rebuild_is_cheaper(count, self.out_channels, n):
            return "rebuild"
        few = count <= 4 * r
        if few and dims < 3:
            return "unfold"
        return "kernels" if few or prod(self.kernel_size) == 1 else "rebuild"

    def _shaped(self, dense: Tensor) -> Tensor:
        weight = dense.view(self.weight_shape)
        if self._channels_last and weight.ndim > 3:
            weight = weight.contiguous(memory_format=_CHANNELS_LAST[weight.ndim])
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The factors are matrices, so `model.to(memory_format=...)` passes them by; a probe in the
        # layer's present format tells what it would have done to the plain weight.
        ndim = len(self.kernel_size) + 2
        if ndim in _CHANNELS_LAST:
            shape = (2,) * ndim
            probe = torch.empty(shape, dtype=self.Q.dtype, device=self.Q.device)
            last = _CHANNELS_LAST[ndim]
            if self._channels_last:
                probe = probe.contiguous(memory_format=last)
            self._channels_last = fn(probe).is_contiguous(memory_format=last)
        return super()._apply(fn, recurse)

    def _output_sizes(self, input: Tensor) -> tuple[int, ...]:
        """Spatial sizes of the output."""
        sizes = []
        for i, size in enumerate(input.shape[-len(self.kernel_size) :]):
            if self.padding == "same":
                sizes.append(size)
                continue
            padding = 0 if isinstance(self.padding, str) else 2 * self.padding[i]
            reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            sizes.append((size + padding - reach) // self.stride[i] + 1)
        return tuple(sizes)

    def _apply_unfolded(self, input: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """One row of n inputs for every output position, times `P`, times `Q`; 1-d and 2-d."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        image = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        kernel, dilation, stride = self.kernel_size, self.dilation, self.stride
        if len(sizes) == 1:
            image = image.unsqueeze(-2)
            kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        rows = F.unfold(image, kernel, dilation, 0, stride).mT
        bias = self._parameters["bias"]
        out = apply_factors(rows, self.Q, self.Lambda, self.P, bias).mT
        if not self._channels_last:  # else the rows already lie as channels last
            out = out.contiguous()
        return out.reshape(*out.shape[:-1], *sizes)

    def _apply_kernels(self, input: Tensor) -> Tensor:
        """Convolution by `P`, then a 1x1 convolution by `Q`; Lambda goes into the smaller."""
        Q: Tensor = self.Q
        P: Tensor = self.P
        if Q.shape[0] <= P.shape[0]:
            Q = Q * self.Lambda
        else:
            P = P * self.Lambda
        ones = (1,) * len(self.kernel_size)
        kernels = P.mT.reshape(-1, *self.weight_shape[1:])
        if self._channels_last and kernels.ndim > 3:
            kernels = kernels.contiguous(memory_format=_CHANNELS_LAST[kernels.ndim])
        maps = self._conv_forward(input, kernels, None)  # type: ignore[operator]
        mix = (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1]
        return mix(maps, Q.reshape(*Q.shape, *ones), self._parameters["bias"])


class ENNConv1d(ENNConv, nn.Conv1d):
    """`nn.Conv1d` with factored weight: (N, in, L) -> (N, out, L_out)."""

    plain_class = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: str | _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip


class ENNConv2d(ENNConv, nn.Conv2d):
    """`nn.Conv2d` with factored weight: (N, in, H, W) -> (N, out, H_out, W_out)."""

    plain_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip


class ENNConv3d(ENNConv, nn.Conv3d):
    """`nn.Conv3d` with factored weight: (N, in, D, H, W) -> (N, out, D_out, H_out, W_out)."""

    plain_class = nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: str | _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip


LAYERS: dict[type[nn.Module], type[EigenLayer]] = {
    nn.Linear: ENNLinear,
    nn.Conv1d: ENNConv1d,
    nn.Conv2d: ENNConv2d,
    nn.Conv3d: ENNConv3d,
}


def plain_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The torch layer class that `cls` is or extends, None if it is no such layer."""
    return next((base for base in LAYERS if issubclass(cls, base)), None)


_generated_classes: dict[type[nn.Module], type[EigenLayer]] = {}


def eigen_class(cls: type[nn.Module]) -> type[EigenLayer]:
    """Eigen twin of a layer class; subclasses keep their own `forward` (padding and all).

    Raises:
        TypeError: `cls` is no subclass of a layer in `LAYERS`.
    """
    if cls in LAYERS:
        return LAYERS[cls]
    base = plain_base(cls)
    if base is None:
        raise TypeError(f"{cls.__name__} has no eigen twin; valid: {[c.__name__ for c in LAYERS]}")
    if cls not in _generated_classes:
        members: dict[str, Any] = {"plain_class": cls, "_generated": True, "__doc__": cls.__doc__}
        # Such code reads `self.weight`, the rebuilt weight, whatever it does around it.
        own = ("forward", "_conv_forward")
        if any(getattr(cls, name, None) is not getattr(base, name, None) for name in own):
            members["forward"] = cls.forward
        _generated_classes[cls] = type(f"ENN{cls.__name__}", (LAYERS[base], cls), members)
    return _generated_classes[cls]


def _new_generated(plain_class: type[nn.Module]) -> EigenLayer:
    """Empty instance of a generated class, for copy and pickle."""
    cls = eigen_class(plain_class)
    return cls.__new__(cls)
