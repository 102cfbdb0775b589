"""Networks for images, by name: small ones of our own, and those of torchvision and timm.

All are plain; `enn_core.to_enn` converts them. Every one can be cut into four blocks.

>>> from enn_core.lab.classify.networks import build_network
>>> model = build_network("vit-tiny", (1, 8, 8), 10, seed=0)
>>> import torch
>>> tuple(model(torch.zeros(2, 1, 8, 8)).shape)
(2, 10)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from enn_core.spiking import ClampedReLU

__all__ = ["ARCHS", "NetworkError", "build_network"]

ARCHS = (
    *("mlp[:DEPTH[xWIDTH]]", "mlp-relu[:DEPTH[xWIDTH]]", "conv-small", "vit-tiny[:PATCH]"),
    "resnet-small",
    *("resnet18", "resnet50", "resnet101", "resnet152", "vit-b16"),
    *("timm:NAME", "torchvision:NAME"),
)
_RESNETS = ("resnet18", "resnet50", "resnet101", "resnet152")
_SMALL = 64  # pixels: images up to this side get a ResNet without stride in its stem


class NetworkError(ValueError):
    """A network that cannot be built; one line."""


def build_network(
    arch: str, shape: tuple[int, int, int], classes: int, *, seed: int = 0
) -> nn.Module:
    """A network with random weights, for images (N, *shape) to scores (N, classes).

    Args:
        arch: one of `ARCHS`.
            "mlp": so many weight layers (4) of rate neurons, `clamp(z, 0, 1)`, so wide (256): the
            activation of an integrate-and-fire neuron, which LOCO and spiking networks need;
            "mlp-relu": the same with ReLU.
            "conv-small": five convolutions of rate neurons without norms, and a linear map.
            "vit-tiny": 4 blocks of width 64, square patches of so many pixels (by default so that
            there are at most 8 x 8 of them; 4 x 4 of 8 x 8 images).
            "resnet-small": 4 residual blocks with batch norm, 16 to 128 channels.
            "resnet18" ... "resnet152": torchvision's; for images up to 64 x 64 with a stem of
            one 3 x 3 convolution without stride, as usual there.
            "vit-b16": timm's vit_base_patch16_224.
            "timm:NAME", "torchvision:NAME": any classifier of theirs.
        shape: (channels, height, width) of an image.
        classes: scores per image.
        seed: of the weights: the same for every learning rule. The global random state is kept.

    Raises:
        NetworkError: unknown name, or images that the network cannot take.
    """
    kind, _, detail = arch.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if kind in ("mlp", "mlp-relu"):
            return _mlp(detail, shape, classes, ClampedReLU if kind == "mlp" else nn.ReLU)
        if kind in ("timm", "torchvision") and detail:
            return _theirs(kind, detail, shape, classes)
        if arch in _RESNETS:
            return _resnet(arch, shape, classes)
        if arch == "vit-b16":
            return _theirs("timm", "vit_base_patch16_224", shape, classes)
        if arch == "conv-small":
            return _conv_small(shape, classes)
        if kind == "vit-tiny":
            return TinyViT(shape, classes, patch=_patch(detail, shape[1:]))
        if arch == "resnet-small":
            return _resnet_small(shape, classes)
    raise NetworkError(f"arch {arch!r} is unknown; give one of {', '.join(ARCHS)}")


# --- without norms and residuals: what rules without backpropagation can train ------------------


def _he(model: nn.Sequential) -> nn.Sequential:
    """Weights that keep the size of signals and gradients through many layers (He et al. 2015)."""
    layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    layers[-1].weight.data.mul_(sqrt(0.5))  # nothing is cut off there
    return model


def _mlp(
    detail: str, shape: tuple[int, int, int], classes: int, activation: Callable[[], nn.Module]
) -> nn.Sequential:
    text, _, wide = detail.partition("x")
    try:
        depth, width = int(text or 4), int(wide or 256)
    except ValueError:
        depth = width = 0
    if depth < 2 or width < 1:
        raise NetworkError(
            f"mlp:{detail} is invalid; give mlp:DEPTH or mlp:DEPTHxWIDTH with at least 2 weight "
            "layers, such as mlp:11x256"
        )
    channels, height, side = shape
    widths = [channels * height * side, *[width] * (depth - 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return _he(nn.Sequential(*layers, nn.Linear(widths[-1], classes)))


def _conv_small(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    channels, *sides = shape
    layers: list[nn.Module] = []
    for after, pool in ((16, False), (32, True), (32, False), (64, True), (64, True)):
        layers += [nn.Conv2d(channels, after, 3, padding=1), ClampedReLU()]
        channels = after
        if pool and min(sides) >= 4:
            layers.append(nn.AvgPool2d(2))
            sides = [side // 2 for side in sides]
    features = channels * sides[0] * sides[1]
    return _he(nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes)))


# --- a small vision transformer ----------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention of tokens (N, L, C), with separate maps for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Images to tokens (N, L, width): a linear map of every patch, plus its learnt position."""

    def __init__(self, shape: tuple[int, int, int], patch: int, width: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.patches = nn.Conv2d(channels, width, patch, patch)
        count = (sides[0] // patch) * (sides[1] // patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, count, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.position


class Mean(nn.Module):
    """Mean over the tokens of (N, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _patch(detail: str, sides: Sequence[int]) -> int:
    """Side of a patch: the one given, else the smallest that gives 2 x 2 to 8 x 8 of them."""
    fitting = [p for p in range(2, min(sides) // 2 + 1) if not (sides[0] % p or sides[1] % p)]
    if detail in map(str, fitting):
        return int(detail)
    patch = next((p for p in fitting if max(sides) <= 8 * p), None)
    if detail or patch is None:
        valid = f"vit-tiny:PATCH with a patch of {' or '.join(map(str, fitting))}, or images"
        raise NetworkError(
            f"vit-tiny{':' * bool(detail)}{detail} cannot cut images of {sides[0]} x {sides[1]} "
            f"into 2 x 2 to 8 x 8 patches; give {valid if fitting else 'images'} of another size"
        )
    return patch


class TinyViT(nn.Sequential):
    """A pre-norm vision transformer without class token: the mean of the tokens is classified.

    Args:
        shape: (channels, height, width) of an image.
        classes: scores per image.
        patch: side of the square patches that images are cut into, in pixels.
        width, blocks, heads: of the transformer.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        patch: int,
        width: int = 64,
        blocks: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__(
            Tokens(shape, patch, width),
            *(TransformerBlock(width, heads) for _ in range(blocks)),
            nn.LayerNorm(width),
            Mean(),
            nn.Linear(width, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02 * sqrt(768 / width))
                nn.init.zeros_(module.bias)


# --- residual networks -------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


def _resnet_small(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    channels, *sides = shape
    if min(sides) < 8:
        raise NetworkError(f"resnet-small takes images from 8 x 8 on, got {sides[0]} x {sides[1]}")
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        ResidualBlock(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _resnet(arch: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    channels, height, width = shape
    model = _theirs("torchvision", arch, (3, height, width), classes)
    if min(height, width) <= _SMALL:
        stem = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        stem = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    else:
        return model
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    return model


# --- other libraries' --------------------------------------------------------------------------


def _theirs(library: str, name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    channels, *sides = shape
    try:
        if library == "torchvision":
            from torchvision import models

            if channels != 3:
                raise ValueError(f"it takes images of 3 channels, these have {channels}")
            square = {"image_size": sides[0]} if name.startswith("vit_") else {}
            return models.get_model(name, num_classes=classes, **square)
        import timm

        if not timm.is_model(name):
            raise ValueError("it has no such model")
        options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
        try:
            return timm.create_model(name, **options, img_size=tuple(sides))
        except TypeError:  # convolutional networks take any size
            return timm.create_model(name, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise NetworkError(f"{library} cannot build {name!r}: {reason}") from error
