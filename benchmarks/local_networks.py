"""Networks that the benchmarks of local learning train: model, batch and number of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network with the batch of a benchmark."""

    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    blocks: int

    def data(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return torch.randn(self.batch), torch.arange(self.batch[0]) % CLASSES


def _vit() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", num_classes=CLASSES)


def _resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(num_classes=CLASSES)


def _cnn3d(strided_stem: bool) -> nn.Module:
    """Four stages of two convolutions and a pool, at full or (after a strided stem) half size."""
    layers: list[nn.Module] = _conv3d(1, 16, 2) if strided_stem else []
    for before, after in pairwise((16 if strided_stem else 1, 16, 32, 64, 128)):
        layers += [*_conv3d(before, after, 1), *_conv3d(after, after, 1), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, CLASSES))


def _conv3d(before: int, after: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv3d(before, after, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm3d(after), nn.ReLU(inplace=True)]


CASES = {
    "vit-s 224 b8, 4 blocks": Case(_vit, (8, 3, 224, 224), 4),
    "resnet-50 64 b32, 4 blocks": Case(_resnet, (32, 3, 64, 64), 4),
    "resnet-50 64 b32, 17 blocks": Case(_resnet, (32, 3, 64, 64), 17),
    "3d-cnn strided stem 96 b1, 4 blocks": Case(partial(_cnn3d, True), (1, 1, 96, 96, 96), 4),
    "3d-cnn 96 b1, 4 blocks": Case(partial(_cnn3d, False), (1, 1, 96, 96, 96), 4),
}
QUICK = {
    "vit-s 224 b1, 4 blocks": Case(_vit, (1, 3, 224, 224), 4),
    "3d-cnn strided stem 32 b2, 4 blocks": Case(partial(_cnn3d, True), (2, 1, 32, 32, 32), 4),
}
