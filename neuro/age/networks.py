"""Networks that read a brain: lists of blocks, each with its head, for any size of volume.

- `bins4`: ours. Intensity becomes soft tissue channels, then four blocks of 3-D convolutions with
  instance normalisation; every block's head sees a coarse grid of places, not one average.
- `yin2023`: the four blocks of Yin et al. 2023 (6^3 kernels, 16 to 128 filters).
- `sfcn`: the six blocks of Peng et al. 2021, which published checkpoints fit.

With the local rule each block learns from its own head; with backpropagation the last head trains
all. Both use the same modules, so weights of one load into the other.

>>> import torch
>>> net = build("bins4", outputs=1, widths=(8, 8, 8, 8))
>>> [tuple(p.shape) for p in net(torch.rand(2, 1, 40, 48, 40))]
[(2, 1), (2, 1), (2, 1), (2, 1)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.convert import to_enn
from enn_core.local import LocalBlock

__all__ = ["ARCHITECTURES", "BrainNet", "GridHead", "IntensityBins", "build"]

Layers = Literal["enn", "plain"]
Norm = Literal["instance", "group", "batch"]
Parts = tuple[nn.Module, list[nn.Module], list[nn.Module]]

GRID = (5, 6, 5)
"""Cells of a head along i, j, k: 32 mm each for a volume of 80 x 96 x 80 at 2 mm."""


class BrainNet(nn.Module):
    """A fixed stem, then blocks in sequence, each with a head.

    Training reads `stem(volumes)`, which is computed once for each volume and kept.

    Args:
        stem: without parameters: volumes (N, 1, i, j, k) -> what the first block reads.
        blocks: applied one after the other.
        heads: one for each block: its output -> (N, outputs).
        settings: arguments of `build` that make this network again.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        pairs = zip(blocks, heads, strict=True)
        self.stem = stem
        self.blocks = nn.ModuleList(LocalBlock(block, head) for block, head in pairs)
        self.settings = settings

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 1, i, j, k) -> (N, outputs) of each head; gradients reach the input."""
        return self.heads_say(self.stem(x))

    def heads_say(self, h: Tensor) -> list[Tensor]:
        """What the first block reads -> (N, outputs) of each head."""
        return self.run(h)[0]

    def run(self, h: Tensor) -> tuple[list[Tensor], Tensor]:
        """`heads_say`, and what the last block reads."""
        passed = [h]
        for unit in self.blocks:
            passed.append(unit.block(passed[-1]))  # type: ignore[operator]
        units = zip(self.blocks, passed[1:], strict=True)
        return [unit.head(given) for unit, given in units], passed[-2]  # type: ignore[operator]

    def block_input(self, x: Tensor, index: int) -> Tensor:
        """What block `index` reads for volumes (N, 1, i, j, k); negative counts from the end."""
        h = self.stem(x)
        for unit in list(self.blocks)[:index]:
            h = unit.block(h)  # type: ignore[operator]
        return h

    def units(self, rule: Literal["local", "backprop"]) -> list[LocalBlock]:
        """What a trainer loops over: every block with its head, or all blocks with the last head.

        They read `stem(volumes)` and share the network's parameters.
        """
        units: list[LocalBlock] = list(self.blocks)  # type: ignore[arg-type]
        if rule == "local":
            return units
        whole = nn.Sequential(*(unit.block for unit in units))
        return [LocalBlock(whole, units[-1].head)]

    @torch.no_grad()
    def standardise_heads_(self, batches: Iterable[Tensor]) -> None:
        """Centre and scale what grid heads read, on training scans as the first block reads them.

        Done once, before training: a head starts from features of mean 0 and norm 10, whatever
        the block's initialisation.
        """
        for head, pooled in zip(self.grid_heads(), self.pooled(batches), strict=True):
            head.standardise_(pooled)

    def grid_heads(self) -> list[GridHead]:
        """The heads that are maps of a coarse grid: all of ours, all but the last of others."""
        return [unit.head for unit in self.blocks if isinstance(unit.head, GridHead)]

    @torch.no_grad()
    def pooled(self, batches: Iterable[Tensor]) -> list[Tensor]:
        """What each of `grid_heads` reads of scans as the first block reads them, in eval mode."""
        seen: list[list[Tensor]] = [[] for _ in self.grid_heads()]
        training = self.training
        self.eval()
        for h in batches:
            into = iter(seen)
            for unit in self.blocks:
                h = unit.block(h)  # type: ignore[operator]
                if isinstance(unit.head, GridHead):
                    next(into).append(unit.head.pooled(h))
        self.train(training)
        return [torch.cat(each) for each in seen]


class IntensityBins(nn.Module):
    """A volume as soft bins of its intensity, averaged over 2 x 2 x 2 voxels; nothing to learn.

    Channel c is how much of the neighbourhood has an intensity near `centres[c]`: fluid, grey and
    white matter and what lies between. A tent function per bin; 0, outside the brain, is in none.

    Args:
        bins: how many, from 0.15 to 1.05 of the 99th percentile.
    """

    centres: Tensor

    def __init__(self, bins: int = 7) -> None:
        super().__init__()
        if bins < 2:
            raise ValueError(f"got {bins} intensity bins, give 2 or more")
        self.bins = bins
        self.register_buffer("centres", torch.linspace(0.15, 1.05, bins), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, i, j, k), 1 at a brain's 99th percentile -> (N, bins, i/2, j/2, k/2)."""
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"got volumes {tuple(x.shape)}, expected (N, 1, i, j, k)")
        width = (1.05 - 0.15) / (self.bins - 1)
        inside = (x > 0).to(x.dtype)
        # One channel at a time: all of them at full resolution would be the largest tensor by far.
        pooled = [
            F.avg_pool3d((1 - (x - centre).abs() / width).clamp(min=0) * inside, 2)
            for centre in self.centres.to(x.dtype)
        ]
        return torch.cat(pooled, dim=1)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


class PadTo(nn.Module):
    """Zeros around a volume, so that no side is shorter than `side` voxels; nothing to learn."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, i, j, k) -> (N, 1, >= side, >= side, >= side)."""
        missing = [max(0, self.side - n) for n in reversed(x.shape[2:])]
        return F.pad(x, [half for m in missing for half in (m // 2, m - m // 2)])

    def extra_repr(self) -> str:
        return f"{self.side}"


class GridHead(nn.Module):
    """Averages over a coarse grid of places, standardises, and maps linearly.

    A brain is registered: where something is says more than how much of it there is.

    Args:
        channels: of the features.
        outputs: numbers to predict.
        grid: cells along i, j, k.
        dropout: share of grid values left out while training.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        channels: int,
        outputs: int,
        grid: Sequence[int] = GRID,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        i, j, k = grid
        self.grid = (i, j, k)
        size = channels * prod(self.grid)
        self.out = nn.Linear(size, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(()))

    def pooled(self, h: Tensor) -> Tensor:
        """(N, channels, i, j, k) -> (N, channels x cells), float32."""
        return F.adaptive_avg_pool3d(h.float(), self.grid).flatten(1)

    def features(self, h: Tensor) -> Tensor:
        """`pooled`, centred and scaled."""
        return (self.pooled(h) - self.mean) / self.scale

    def forward(self, h: Tensor) -> Tensor:
        # Sums of thousands of small terms: not in bf16.
        with torch.autocast(h.device.type, enabled=False):
            return self.out(self.dropout(self.features(h)))

    @torch.no_grad()
    def refit_(self, pooled: Tensor, wanted: Tensor) -> float:
        """Replace the linear map by the ridge regression of `wanted` on `pooled` features.

        The penalty is the one of the smallest leave-one-out error, in closed form.

        Args:
            pooled: of training scans (N, channels x cells).
            wanted: (N,) what output 0 should be.

        Returns:
            The penalty, as a multiple of the mean squared norm of the features.

        Raises:
            ValueError: the head predicts several numbers, or there are fewer than 3 scans.
        """
        if self.out.out_features != 1 or len(pooled) < 3:
            raise ValueError(
                f"got {len(pooled)} scans for a head of {self.out.out_features} outputs; a refit "
                "needs 3 scans or more and 1 output"
            )
        weight, bias, penalty = _ridge((pooled.double() - self.mean) / self.scale, wanted.double())
        self.out.weight.copy_(weight[None])
        self.out.bias.fill_(float(bias))
        return penalty

    @torch.no_grad()
    def standardise_(self, pooled: Tensor) -> None:
        """Take mean and scale from `pooled` features of training scans (N, channels x cells)."""
        self.mean.copy_(pooled.mean(0))
        total = (pooled - self.mean).square().sum(1).mean().sqrt()
        # A norm of 10 keeps the first steps of a linear map with thousands of inputs small enough.
        self.scale.copy_(torch.where(total > 0, total / 10, torch.ones_like(total)))


def _ridge(features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ridge regression by its kernel, (N, d) and (N,) float64 -> weight (d,), bias, penalty."""
    centre, level = features.mean(0), wanted.mean()
    a, y = features - centre, wanted - level
    kernel = a @ a.T
    unit = kernel.diagonal().mean().clamp(min=torch.finfo(kernel.dtype).tiny)
    values, vectors = torch.linalg.eigh(kernel / unit)
    values = values.clamp(min=0)
    along = vectors.T @ y
    best, chosen = float("inf"), 1.0
    for penalty in (10.0 ** (step / 2) for step in range(-8, 7)):
        kept = values / (values + penalty)
        leverage = (vectors.square() * kept).sum(1) + 1 / len(y)
        left_out = (y - vectors @ (kept * along)) / (1 - leverage)
        error = float(left_out.square().mean())
        if error < best:
            best, chosen = error, penalty
    weight = a.T @ (vectors @ (along / (values + chosen))) / unit
    return weight, level - centre @ weight, chosen


class MeanHead(nn.Module):
    """Average over space, dropout, a linear map: the end of SFCN."""

    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(channels, outputs)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(self.dropout(h.float().flatten(2).mean(2)))


class YinHead(nn.Module):
    """Average over space, a hidden layer of 128, dropout, a linear map: the end of Yin's network.

    Its last ReLU (no age below 0) is part of the target: `AgeValue.ages`.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 128)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(128, outputs)

    def forward(self, h: Tensor) -> Tensor:
        h = F.relu(self.hidden(h.float().flatten(2).mean(2)))
        return self.out(self.dropout(h))


def _norm(kind: Norm, channels: int, eps: float = 1e-5) -> nn.Module:
    """Batch statistics of a few volumes swing; a new network takes "instance" or "group"."""
    match kind:
        case "instance":
            return nn.InstanceNorm3d(channels, eps=eps, affine=True)
        case "group":
            return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels, eps=eps)
        case "batch":
            return nn.BatchNorm3d(channels, eps=eps)
    raise ValueError(f"got norm {kind!r}, valid are 'instance', 'group' and 'batch'")


def _bins4(
    outputs: int,
    widths: Sequence[int] = (32, 64, 64, 96),
    strides: Sequence[int] = (2, 1, 2, 1),
    bins: int = 7,
    norm: Norm = "instance",
    dropout: float = 0.0,
    grid: Sequence[int] = GRID,
) -> Parts:
    """2 mm volume -> bins at 4 mm -> 8 mm -> 8 mm -> 16 mm -> 16 mm."""
    blocks: list[nn.Module] = []
    channels = bins
    for width, stride in zip(widths, strides, strict=True):
        layers = nn.Sequential()
        layers.add_module("conv", nn.Conv3d(channels, width, 3, stride, 1, bias=False))
        layers.add_module("norm", _norm(norm, width))
        layers.add_module("act", nn.ReLU())
        blocks.append(layers)
        channels = width
    heads: list[nn.Module] = [GridHead(width, outputs, grid, dropout) for width in widths]
    return IntensityBins(bins), blocks, heads


def _yin2023(outputs: int, norm: Norm = "batch") -> Parts:
    """Yin et al. 2023; published input 128^3 of 2 mm. Smaller volumes are padded to 96^3."""
    widths = (16, 32, 64, 128)
    blocks: list[nn.Module] = []
    channels = 1
    for i, width in enumerate(widths):
        layers = nn.Sequential()
        layers.add_module("conv", nn.Conv3d(channels, width, 6))
        layers.add_module("act", nn.ReLU())
        layers.add_module("pool", nn.MaxPool3d(2))
        layers.add_module("norm", _norm(norm, width, eps=1e-3))  # Keras' default
        if i > 0:
            layers.add_module("dropout", nn.Dropout(0.2))
        blocks.append(layers)
        channels = width
    heads: list[nn.Module] = [GridHead(width, outputs) for width in widths[:-1]]
    return PadTo(96), blocks, [*heads, YinHead(widths[-1], outputs)]


def _sfcn(outputs: int, norm: Norm = "batch", eps: float = 1e-5, dropout: float = 0.5) -> Parts:
    """Peng et al. 2021; published input 160 x 192 x 160 of 1 mm, intensities over their mean."""
    widths = (32, 64, 128, 256, 256, 64)
    blocks: list[nn.Module] = []
    channels = 1
    for i, width in enumerate(widths):
        last = i == len(widths) - 1
        layers = nn.Sequential()
        layers.add_module("conv", nn.Conv3d(channels, width, 1 if last else 3, 1, 0 if last else 1))
        layers.add_module("norm", _norm(norm, width, eps))
        if not last:
            layers.add_module("pool", nn.MaxPool3d(2))
        layers.add_module("act", nn.ReLU())
        blocks.append(layers)
        channels = width
    heads: list[nn.Module] = [GridHead(width, outputs) for width in widths[:-1]]
    return nn.Identity(), blocks, [*heads, MeanHead(widths[-1], outputs, dropout)]


ARCHITECTURES: dict[str, Callable[..., Parts]] = {
    "bins4": _bins4,
    "yin2023": _yin2023,
    "sfcn": _sfcn,
}


def build(name: str, outputs: int = 1, layers: Layers = "enn", **options: Any) -> BrainNet:
    """A new network.

    Args:
        name: one of `ARCHITECTURES`.
        outputs: numbers that each head predicts, `Target.outputs`.
        layers: "enn" for eigen convolutions (heads stay plain), "plain" for torch's own.
        **options: of the architecture: `norm` for all; `widths`, `strides`, `bins`, `dropout` and
            `grid` for bins4; `eps` and `dropout` for sfcn.

    Raises:
        ValueError: unknown architecture, layers, or option.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"got architecture {name!r}, valid are {', '.join(ARCHITECTURES)}")
    if layers not in ("enn", "plain"):
        raise ValueError(f"got layers {layers!r}, valid are 'enn' and 'plain'")
    make = ARCHITECTURES[name]
    known = make.__code__.co_varnames[1 : make.__code__.co_argcount]
    if unknown := set(options) - set(known):
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}; valid are {', '.join(known)}"
        )
    stem, blocks, heads = make(outputs, **options)
    if layers == "enn":
        blocks = [to_enn(block) for block in blocks]
    settings = {"name": name, "outputs": outputs, "layers": layers, **options}
    return BrainNet(stem, blocks, heads, settings)
