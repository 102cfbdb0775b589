"""Light heads for the blocks of a locally trained network.

A head maps features of any size to a prediction. The form matters more than anything else in local
training: a plain average forgets where things were, so early blocks learn too little from it.

>>> import torch
>>> from enn_core.heads import ConvHead, make_head
>>> head = ConvHead(16, 10, axes=2)
>>> [tuple(head(torch.randn(3, 16, side, side)).shape) for side in (1, 7, 32)]
[(3, 10), (3, 10), (3, 10)]
>>> make_head("linear", torch.randn(2, 50, 384), 10)  # tokens (N, L, C)
LinearHead(384, 10, axes=1, channel_axis=-1)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Form = Literal["linear", "conv", "mlp"]
FORMS: tuple[str, ...] = get_args(Form)

# What the 1x1 convolution sees at most along each axis (64 cells): a head must stay light before
# the first, largest features.
_GRID = {0: 1, 1: 64, 2: 8, 3: 4}
_SMALL = 1024  # positions
_CELLS = 2  # what is left along each axis for the last map: where something is, coarsely


class _Head(nn.Module):
    """Features (N, C, *space) or channels elsewhere, to predictions (N, outputs).

    Args:
        channels: C.
        outputs: numbers to predict: classes, 1 for a regression, width of an embedding.
        axes: of space: 0 for vectors, 1 for tokens or signals, 2 for images, 3 for volumes.
        channel_axis: where the channels are: 1, or -1 as in tokens (N, L, C).
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        axes: int,
        channel_axis: int = 1,
    ) -> None:
        super().__init__()
        if axes not in _GRID:
            raise ValueError(f"axes={axes} is invalid, features have 0 to 3 axes of space")
        if channel_axis not in (1, -1):
            raise ValueError(f"channel_axis={channel_axis} is invalid, valid are 1 and -1")
        self.channels, self.outputs = channels, outputs
        self.axes, self.channel_axis = axes, channel_axis

    def features(self, h: Tensor) -> Tensor:
        """The features as (N, C, *space), checked."""
        if h.ndim != self.axes + 2 or h.shape[self.channel_axis] != self.channels:
            wanted = ["N", *["*"] * self.axes]
            wanted.insert(1 if self.channel_axis == 1 else len(wanted), str(self.channels))
            raise ValueError(
                f"{type(self).__name__} got features {tuple(h.shape)} and takes "
                f"({', '.join(wanted)}); make a head for these with make_head"
            )
        return h.movedim(-1, 1) if self.channel_axis == -1 else h

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.outputs}, axes={self.axes}, channel_axis={self.channel_axis}"
        )


class LinearHead(_Head):
    """Average over space, then a linear map. The lightest; learns least in early blocks."""

    def __init__(self, channels: int, outputs: int, *, axes: int, channel_axis: int = 1) -> None:
        super().__init__(channels, outputs, axes=axes, channel_axis=channel_axis)
        self.out = nn.Linear(channels, outputs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def forward(self, h: Tensor) -> Tensor:
        h = self.features(h)
        return self.out(h.flatten(2).mean(2) if self.axes else h)


class ConvHead(_Head):
    """A 1x1 convolution on a coarse grid, then two cells along each axis and a linear map.

    Args:
        channels, outputs, axes, channel_axis: as in every head.
        width: channels of the convolution; the features' own, but 64 to 128, by default.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        axes: int,
        channel_axis: int = 1,
        width: int | None = None,
    ) -> None:
        super().__init__(channels, outputs, axes=axes, channel_axis=channel_axis)
        width = width or min(max(channels, 64), 128)
        self.mix = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width * _CELLS**axes, outputs)

    def forward(self, h: Tensor) -> Tensor:
        h = _pool(self.features(h), _GRID[self.axes])
        h = F.relu(self.norm(self.mix(h.movedim(1, -1))))
        return self.out(_spread(h.movedim(-1, 1)).flatten(1))


class MLPHead(_Head):
    """Two cells along each axis, then a hidden layer.

    Args:
        channels, outputs, axes, channel_axis: as in every head.
        width: of the hidden layer; the features' own, but 64 to 256, by default.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        axes: int,
        channel_axis: int = 1,
        width: int | None = None,
    ) -> None:
        super().__init__(channels, outputs, axes=axes, channel_axis=channel_axis)
        width = width or min(max(channels, 64), 256)
        self.mix = nn.Linear(channels * _CELLS**axes, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, outputs)

    def forward(self, h: Tensor) -> Tensor:
        h = _spread(self.features(h)).flatten(1)
        return self.out(F.relu(self.norm(self.mix(h))))


def make_head(
    form: Form,
    features: Tensor | Sequence[int],
    outputs: int,
    *,
    channel_axis: int | None = None,
    width: int | None = None,
) -> nn.Module:
    """A head for the features of a block.

    Args:
        form: "linear" (average, linear map), "conv" (1x1 convolution, pool, linear map) or "mlp"
            (pool, hidden layer).
        features: what the block returns, or its shape: (N, C), (N, L, C), (N, C, H, W) or
            (N, C, D, H, W). Only the number of channels binds the head, not the size.
        outputs: numbers to predict.
        channel_axis: 1 or -1; by default -1 for three dimensions (tokens), else 1.
        width: of the hidden layer or convolution.

    Raises:
        ValueError: unknown form, or features of other than two to five dimensions.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown, valid are {', '.join(FORMS)}")
    shape = tuple(features.shape if isinstance(features, Tensor) else features)
    if not 2 <= len(shape) <= 5:
        raise ValueError(
            f"features of shape {shape} have {len(shape)} dimensions, a head takes 2 to 5: a "
            "batch, channels, and 0 to 3 axes of space"
        )
    if channel_axis is None:
        channel_axis = -1 if len(shape) == 3 else 1
    place = {"axes": len(shape) - 2, "channel_axis": channel_axis}
    channels = shape[channel_axis]
    if form == "linear":
        return LinearHead(channels, outputs, **place)
    head = ConvHead if form == "conv" else MLPHead
    return head(channels, outputs, **place, width=width)


def _pool(h: Tensor, cells: int) -> Tensor:
    """Averages (N, C, ...) of at most so many cells along each axis; never more than it has."""
    return _averages(h, [min(side, cells) for side in h.shape[2:]])


def _spread(h: Tensor) -> Tensor:
    """Averages (N, C, 2, ...): two cells along each axis, equal ones where there was but one."""
    return _averages(h, [_CELLS] * (h.ndim - 2))


def _averages(h: Tensor, cells: list[int]) -> Tensor:
    """`adaptive_avg_pool`, for small features as one product with a small matrix.

    That is three times faster there and keeps no features for its backward.
    """
    sides = h.shape[2:]
    if list(sides) == cells:
        return h
    if prod(sides) > _SMALL:
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(cells) - 1]
        return pool(h, cells)  # type: ignore[arg-type]
    windows = [_windows(side, n, h) for side, n in zip(sides, cells, strict=True)]
    return (h.flatten(2) @ reduce(torch.kron, windows)).unflatten(2, cells)


def _windows(side: int, cells: int, like: Tensor) -> Tensor:
    """Averaging matrix (side, cells)."""
    cell = torch.arange(cells, device=like.device)
    start, stop = cell * side // cells, ((cell + 1) * side + cells - 1) // cells
    place = torch.arange(side, device=like.device)[:, None]
    return ((place >= start) & (place < stop)).to(like.dtype) / (stop - start).to(like.dtype)
