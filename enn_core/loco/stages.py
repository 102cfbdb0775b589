"""A network as a chain of stages: a layer with weights, then functions without any.

What LOCO needs of a layer is its input, its weight matrix and a place to add noise; `Stage` gives
these for `nn.Linear` and, by patches, for `nn.Conv2d`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from enn_core.spiking import LIF, Decode, Encode

__all__ = ["Stage", "UnsupportedModel", "layer_rows", "over_time", "time_steps", "to_stages"]


_TIMED = (Encode, LIF, Decode)
_RANDOM = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)


class UnsupportedModel(ValueError):
    """The model is no chain of layers that a perturbation rule can train."""


@dataclass
class Stage:
    """One layer with weights and what follows it up to the next.

    Shares the layer's parameters. Rows of its input are `[x; 1]` (the 1 only with a bias) of
    `columns` numbers: one row per sample for `nn.Linear`, one per patch for `nn.Conv2d`. Its
    matrix is (out, columns).
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    after: list[nn.Module] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return self.layer.weight[0].numel() + (self.layer.bias is not None)

    def rows(self, x: Tensor) -> Tensor:
        """Inputs (B, ...) of the layer as rows (B, positions, columns)."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            rows = F.unfold(
                x, layer.kernel_size, layer.dilation, cast(int, layer.padding), layer.stride
            ).transpose(1, 2)
        else:
            rows = x.reshape(len(x), -1, layer.in_features)
        return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)

    def errors(self, values: Tensor) -> Tensor:
        """Values at the layer's output, (B, ...) as it gives them, as (B, positions, out)."""
        if isinstance(self.layer, nn.Conv2d):
            return values.flatten(2).transpose(1, 2)
        return values.reshape(len(values), -1, self.layer.out_features)

    def finish(self, z: Tensor) -> Tensor:
        """From the layer's output to the next layer's input, or to the answer."""
        for module in self.after:
            z = module(z)
        return z

    @property
    def linear(self) -> tuple[float, float] | None:
        """Outputs of the layer between these two move its activation; None if all do."""
        activation = self.after[0] if self.after else None
        if isinstance(activation, nn.ReLU):
            return 0.0, math.inf
        return getattr(activation, "linear", None)

    def add(self, change: Tensor) -> None:
        """Add a change (out, columns) to weight and bias, in place."""
        weight, bias = self.layer.weight, self.layer.bias
        if bias is not None:
            bias.add_(change[:, -1])
            change = change[:, :-1]
        weight.add_(change.reshape(weight.shape))

    def matrix(self) -> Tensor:
        """Weight and bias as one matrix (out, columns), a copy."""
        return self._joined(self.layer.weight.detach(), self.layer.bias)

    def gradient(self) -> Tensor:
        """Gradients of weight and bias, that backpropagation left, as one matrix, a copy."""
        weight, bias = self.layer.weight, self.layer.bias
        if weight.grad is None or (bias is not None and bias.grad is None):
            raise ValueError(f"layer {self.name} has no gradient; call backward before the step")
        return self._joined(weight.grad, None if bias is None else bias.grad)

    def set_gradient(self, gradient: Tensor) -> None:
        """Put a matrix (out, columns) in place of the gradients of weight and bias."""
        weight, bias = self.layer.weight, self.layer.bias
        if bias is not None:
            bias.grad = gradient[:, -1].clone()
            gradient = gradient[:, :-1]
        weight.grad = gradient.reshape(weight.shape).contiguous()

    @staticmethod
    def _joined(weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.flatten(1)
        if bias is None:
            return weight.clone()
        return torch.cat([weight, bias.detach()[:, None]], 1)


def to_stages(model: nn.Module) -> tuple[list[nn.Module], list[Stage]]:
    """The functions before the first layer with weights, and the stages.

    Raises:
        UnsupportedModel: a module is neither `nn.Linear`, `nn.Conv2d` (one group, zero padding) nor
            a function without parameters, buffers and random numbers; or there is no layer.
    """
    first: list[nn.Module] = []
    stages: list[Stage] = []
    for name, module in _leaves(model):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _check_layer(name, module)
            stages.append(Stage(name, module))
        else:
            _check_function(name, module)
            (stages[-1].after if stages else first).append(module)
    if not stages:
        raise UnsupportedModel("the model has no nn.Linear or nn.Conv2d to train")
    return first, stages


def time_steps(model: nn.Module) -> int:
    """Time steps of a spiking network, 1 for any other."""
    steps = {module.steps for module in model.modules() if isinstance(module, _TIMED)}
    if len(steps) > 1:
        raise UnsupportedModel(
            f"the model mixes {', '.join(map(str, sorted(steps)))} time steps; use one number"
        )
    return steps.pop() if steps else 1


def layer_rows(first: Sequence[nn.Module], stages: Sequence[Stage], x: Tensor) -> list[Tensor]:
    """Input rows (B, positions, columns) of every layer for inputs (B, ...).

    A spiking network has rows for each time step, (steps * B, positions, columns).
    """
    h, every = x, []
    for module in first:
        h = module(h)
    for stage in stages:
        every.append(stage.rows(h))
        h = stage.finish(stage.layer(h))
    return every


def over_time(x: Tensor, time: int) -> Tensor:
    """Mean over the time steps that a batch (time * B, ...) holds."""
    return x if time == 1 else x.unflatten(0, (time, -1)).mean(0)


def _leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        yield prefix or type(model).__name__, model
        return
    for name, module in model._modules.items():  # named_children drops what occurs twice
        if module is None:
            continue
        yield from _leaves(module, f"{prefix}.{name}" if prefix else name)


def _check_layer(name: str, layer: nn.Linear | nn.Conv2d) -> None:
    if is_parametrized(layer):
        raise UnsupportedModel(f"layer {name} is parametrized; fuse it first, or use backprop")
    if isinstance(layer, nn.Conv2d) and (
        layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        raise UnsupportedModel(
            f"layer {name} ({layer}) is not supported; LOCO trains convolutions of one group with "
            "zero padding given as numbers, backprop or a local rule can train the others"
        )


def _check_function(name: str, module: nn.Module) -> None:
    own = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    if own or any(True for _ in module.children()) or isinstance(module, _RANDOM):
        raise UnsupportedModel(
            f"layer {name} ({type(module).__name__}) is not supported; LOCO trains an "
            "nn.Sequential of nn.Linear, nn.Conv2d and functions without weights or random "
            "numbers; use backprop or a local rule"
        )
