"""Labelled images to train and judge classifiers with.

>>> from enn_core.lab.classify.datasets import load_data
>>> data = load_data("digits", train=400)
>>> tuple(data.train_x.shape), tuple(data.valid_x.shape), tuple(data.test_x.shape)
((400, 1, 8, 8), (140, 1, 8, 8), (397, 1, 8, 8))
>>> data.normalized(data.train_x).std().round(decimals=1).item()
1.0
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from enn_core.lab.classify import dataset_files as sources
from enn_core.lab.classify.dataset_files import DataError, ImageFiles, Images, Source

__all__ = ["DATA_NAMES", "DataError", "ImageData", "ImageFiles", "Images", "load_data"]

DATA_NAMES = (
    *("digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet"),
    "imagefolder:DIR",
)
_DIGITS_TEST = 397  # leaves 1,400 to learn from


@dataclass(frozen=True)
class ImageData:
    """Images in three parts: to learn from, to choose settings by, and to report on once.

    Attributes:
        name: as `load_data` took it.
        train_x, train_y: images (N, C, H, W), float32 in [0, 1] or uint8, labels (N,) int64. Big
            sets stay on disk: then the images are an `ImageFiles`, which indexes like a tensor.
        valid_x, valid_y: cut from the training part, never from the test.
        test_x, test_y: the published test part.
        classes: names, by label.
        mean, std: per channel, of pixels in [0, 1].
    """

    name: str
    train_x: Images
    train_y: Tensor
    valid_x: Images
    valid_y: Tensor
    test_x: Images
    test_y: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: (channels, height, width)."""
        _, channels, height, width = self.train_x.shape
        return channels, height, width

    def normalized(self, x: Tensor) -> Tensor:
        """Images (..., C, H, W) as float32 of mean 0 and standard deviation 1 per channel."""
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (in_unit_range(x) - mean) / std


def in_unit_range(x: Tensor) -> Tensor:
    """Images as float32 in [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def load_data(
    name: str,
    *,
    root: Path | None = None,
    valid: float | int = 0.1,
    train: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set and cut a validation part from what is there to learn from.

    Args:
        name: one of `DATA_NAMES`. "digits" comes with scikit-learn (its 397 test images are the
            same for every seed). The others are looked for in `root`: files and folders named as
            their publishers name them; Fashion-MNIST also where its Debian package puts it.
        root: directory of the data sets; the environment variable ENN_DATA if None.
        valid: share (float) or number (int) of the training images to set apart; 0 for none. Not
            used where a folder has a part of its own for it.
        train: keep so many training images; all that are left by default. Every number of them
            has the classes in the same proportions.
        size: side of the images of sets that stay on disk (tiny-imagenet 64, imagefolder 224).
        seed: chooses which images are set apart and kept.

    Raises:
        DataError: unknown name; a file is missing (which, where it was looked for, how to get it);
            more images asked for than there are.
    """
    if root is None and os.environ.get("ENN_DATA"):
        root = Path(os.environ["ENN_DATA"])
    source = _source(name, root, size)
    order = mixed_order(source.train_y, seed)
    count = valid if isinstance(valid, int) else round(valid * len(order))
    if not 0 <= count < len(order) or (isinstance(valid, float) and not 0 <= valid < 1):
        raise DataError(
            f"valid={valid} of {len(order)} training images of {name} is invalid; give a share "
            f"from 0 to below 1, or a number below {len(order)}"
        )
    if source.valid is not None:
        count = 0
    left = order[count:]
    if train is not None and not 1 <= train <= len(left):
        raise DataError(
            f"train={train} is invalid: {name} has {len(left)} training images beside "
            f"{count} for validation; give 1 to {len(left)}"
        )
    kept = left[:train]
    train_x = take(source.train_x, kept)
    valid_x, valid_y = source.valid or (
        take(source.train_x, order[:count]),
        source.train_y[order[:count]],
    )
    mean, std = source.per_channel or _statistics(train_x)
    return ImageData(
        name=name,
        train_x=train_x,
        train_y=source.train_y[kept],
        valid_x=valid_x,
        valid_y=valid_y,
        test_x=source.test_x,
        test_y=source.test_y,
        classes=source.classes,
        mean=mean,
        std=std,
    )


def _source(name: str, root: Path | None, size: int | None) -> Source:
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return sources.fashion_mnist(root)
    if name == "cifar10":
        return sources.cifar10(root)
    if name == "cifar100":
        return sources.cifar100(root)
    if name == "tiny-imagenet":
        return sources.tiny_imagenet(root, size or 64)
    kind, _, folder = name.partition(":")
    if kind == "imagefolder" and folder:
        place = Path(folder).expanduser()
        if root is not None and not place.is_dir() and (root / place).is_dir():
            place = root / place
        return sources.image_folder(place, size or 224)
    raise DataError(f"data {name!r} is unknown; give one of {', '.join(DATA_NAMES)}")


def _digits() -> Source:
    """scikit-learn's 1,797 digits (1, 8, 8); those of the test are the same for every seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images[:, None] / 16).float()
    y = torch.from_numpy(digits.target).long()
    order = mixed_order(y, 0)
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    return Source(x[train], y[train], x[test], y[test], tuple("0123456789"))


def mixed_order(labels: Tensor, seed: int) -> Tensor:
    """A random order (N,) in which every beginning holds the classes in nearly their proportions.

    Args:
        labels: (N,) int64.
        seed: of the order.
    """
    random = np.random.default_rng([seed, len(labels)])
    y = labels.numpy()
    shuffled = random.permutation(len(y))
    place = np.empty(len(y))
    for label in np.unique(y):
        rows = shuffled[y[shuffled] == label]
        place[rows] = (np.arange(len(rows)) + random.random()) / len(rows)
    return torch.from_numpy(shuffled[np.argsort(place[shuffled], kind="stable")])


def take(images: Images, rows: Tensor) -> Images:
    """The images of some rows, in their order."""
    return images.select(rows) if isinstance(images, ImageFiles) else images[rows]


def _statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(images, ImageFiles):
        return sources.PHOTOS
    total, squares = (torch.zeros(images.shape[1], dtype=torch.float64) for _ in range(2))
    for part in images.split(4096):  # all at once would take eight bytes a pixel
        x = in_unit_range(part).double()
        total += x.sum((0, 2, 3))
        squares += x.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    # A channel may be empty.
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
