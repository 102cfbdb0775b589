"""Spiking neurons with soft reset, their rate twin, and the coding of inputs into time steps.

A spiking network is a plain `nn.Sequential` that begins with `Encode(steps)` and ends with
`Decode(steps)`. In between, the batch holds all time steps, first step first, so that `nn.Linear`,
`nn.Conv2d` and pooling need not know of time; only the neurons do. `forward` maps (B, ...) to
scores (B, classes), and `enn_core.loco` trains it as it stands, without surrogate gradients.

>>> import torch
>>> from torch import nn
>>> from enn_core.spiking import IF, Decode, Encode
>>> net = nn.Sequential(Encode(4), nn.Linear(3, 5), IF(4), nn.Linear(5, 2), Decode(4))
>>> net(torch.rand(6, 3)).shape
torch.Size([6, 2])
>>> IF(4)(torch.full((4, 1), 0.5)).flatten()  # half a threshold per step: every second step fires
tensor([1., 0., 1., 0.])
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["IF", "LIF", "ClampedReLU", "Decode", "Encode", "spiking_twin"]

Coding = Literal["constant", "poisson"]


class ClampedReLU(nn.Module):
    """`min(max(z, 0), 1)`: the rate of an integrate-and-fire neuron with threshold 1, soft reset.

    Shape: any, returned unchanged.

    Attributes:
        linear: inputs between these two change the output.
    """

    linear = (0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return z.clamp(0.0, 1.0)


class LIF(nn.Module):
    """Leaky integrate-and-fire with soft reset: `v <- leak v + z; s = [v >= 1]; v <- v - s`.

    Args:
        steps: time steps in a batch, at least 1.
        leak: share of the membrane potential that a step keeps, in (0, 1]; 1 integrates perfectly.
        start: potential before the first step. One half makes the spike count of a constant input
            the rounded one, not the one rounded down.

    Shape:
        Input currents and output spikes (steps * B, ...), float, spikes 0 or 1.

    Attributes:
        linear: mean currents between these two change the rate. Below `1 - leak` a constant current
            never reaches the threshold; from 1 on the neuron fires in every step.
    """

    def __init__(self, steps: int, leak: float = 0.9, start: float = 0.5) -> None:
        super().__init__()
        if not 0 < leak <= 1:
            raise ValueError(f"leak must be above 0 and at most 1, got {leak}")
        self.steps, self.leak, self.start = check_steps(steps), leak, start
        self.linear = (1.0 - leak, 1.0)

    def forward(self, current: Tensor) -> Tensor:
        currents = split_time(current, self.steps)
        v = torch.full_like(currents[0], self.start)
        spikes = torch.empty_like(currents)
        for now, z in enumerate(currents):
            v = torch.add(z, v, alpha=self.leak)
            spikes[now] = v >= 1.0
            v -= spikes[now]
        return spikes.flatten(0, 1)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, leak={self.leak}"


class IF(LIF):
    """Integrate-and-fire with soft reset: `LIF` without leak. Its rate curve is `ClampedReLU`."""

    def __init__(self, steps: int, start: float = 0.5) -> None:
        super().__init__(steps, leak=1.0, start=start)


class Encode(nn.Module):
    """Inputs (B, ...) in [0, 1] as `steps` time steps: (steps * B, ...), first step first.

    Args:
        steps: time steps.
        coding: `constant` gives the value as a current in every step; `poisson` draws a spike
            with the value as its probability (torch's global random numbers).
    """

    def __init__(self, steps: int, coding: Coding = "constant") -> None:
        super().__init__()
        if coding not in ("constant", "poisson"):
            raise ValueError(f"coding must be constant or poisson, got {coding!r}")
        self.steps, self.coding = check_steps(steps), coding

    def forward(self, x: Tensor) -> Tensor:
        repeated = x.expand(self.steps, *x.shape)
        if self.coding == "poisson":
            repeated = torch.bernoulli(repeated.clamp(0.0, 1.0))
        return repeated.flatten(0, 1)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, coding={self.coding!r}"


class Decode(nn.Module):
    """Mean over time: (steps * B, ...) to (B, ...); rates of spikes, or mean currents."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = check_steps(steps)

    def forward(self, x: Tensor) -> Tensor:
        return split_time(x, self.steps).mean(0)

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


def spiking_twin(
    model: nn.Sequential, steps: int, *, leak: float = 1.0, coding: Coding = "constant"
) -> nn.Sequential:
    """The spiking network of a rate network: neurons for `ClampedReLU`, the same layers.

    Args:
        model: layers and `ClampedReLU`s; the twin shares its parameters.
        steps: time steps.
        leak: of the neurons; 1 gives `IF`.
        coding: of the input.
    """

    def of(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Sequential):
            return nn.Sequential(*map(of, module))
        return LIF(steps, leak) if isinstance(module, ClampedReLU) else module

    return nn.Sequential(Encode(steps, coding), *map(of, model), Decode(steps))


def split_time(x: Tensor, steps: int) -> Tensor:
    """(steps * B, ...) as (steps, B, ...); ValueError if it does not divide."""
    if len(x) % steps:
        raise ValueError(
            f"a batch of {len(x)} is not a multiple of {steps} time steps; "
            "begin the network with Encode of as many steps as its neurons have"
        )
    return x.unflatten(0, (steps, -1))


def check_steps(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps
