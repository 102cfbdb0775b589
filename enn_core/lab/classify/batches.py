"""Batches of training images: shuffled, augmented, the same on every run.

What is drawn for an image depends on the seed, the epoch and the image alone, not on the process
that decodes it or on what came before: a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from enn_core.lab.classify.dataset_files import ImageFiles, Images

__all__ = ["Augment", "Batches", "feed"]

Key = tuple[int, int]  # (epoch, row)


@dataclass(frozen=True)
class Augment:
    """Random changes of an image, by torchvision's transforms.

    Attributes:
        pad: pixels of margin for a random crop (0: none).
        crop: (smallest, largest) share of the image in a random crop, or ().
        flip: whether to mirror every second image.
        randaugment: (operations, magnitude), or ().
    """

    pad: int = 0
    crop: tuple[float, ...] = ()
    flip: bool = False
    randaugment: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pad or self.crop or self.flip or self.randaugment)

    def pipeline(self, height: int, width: int) -> Callable[[Tensor], Tensor]:
        """(C, H, W) -> (C, height, width); draws from torch's global generator."""
        from torchvision.transforms import v2

        steps: list[Callable[..., Any]] = []
        if self.crop:
            scale = (self.crop[0], self.crop[1])
            steps.append(v2.RandomResizedCrop((height, width), scale=scale, antialias=True))
        if self.pad:
            steps.append(v2.RandomCrop((height, width), padding=self.pad))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.randaugment:
            steps.append(v2.RandAugment(*self.randaugment))
        return v2.Compose(steps) if steps else lambda image: image


class Batches(Sampler[list[Key]]):
    """Keys of batches over all epochs, from any step on; incomplete batches are left out.

    With several processes each gets its share of every batch.

    Args:
        count: training images.
        batch_size: of all processes together.
        epochs: how many.
        seed: of the order.
        start: optimizer steps done, from the very first.
        rank, world: this process, and how many there are.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        epochs: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.count, self.batch_size, self.epochs, self.seed = count, batch_size, epochs, seed
        self.start, self.rank, self.world = start, rank, world
        self.per_epoch = count // batch_size

    def __len__(self) -> int:
        return max(0, self.epochs * self.per_epoch - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch_size // self.world
        for epoch in range(self.start // self.per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            for batch in range(max(0, self.start - epoch * self.per_epoch), self.per_epoch):
                at = batch * self.batch_size + self.rank * share
                yield [(epoch, int(row)) for row in order[at : at + share]]


class _Augmented(Dataset[Tensor]):
    """(epoch, row) -> image and row."""

    def __init__(self, images: Images, augment: Augment, seed: int) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        self._pipeline: Callable[[Tensor], Tensor] | None = None

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:  # type: ignore[override]
        epoch, row = key
        images = self.images
        if self._pipeline is None:
            self._pipeline = self.augment.pipeline(*images.shape[2:])
        whole = isinstance(images, ImageFiles) and self.augment.crop
        image = images.decode(row) if whole else images[row]  # type: ignore[union-attr]
        with torch.random.fork_rng(devices=[]):
            seed = int(np.random.default_rng([self.seed, epoch, row]).integers(2**62))
            torch.default_generator.manual_seed(seed)
            return self._pipeline(image), row


def feed(
    images: Images, labels: Tensor, batches: Batches, augment: Augment, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, C, H, W) and labels (n,) of every batch, in order.

    Args:
        images, labels: of the training part.
        batches: which rows.
        augment: what is changed at random.
        workers: processes that read and augment ahead; 0 for this one.
    """
    if isinstance(images, Tensor) and not augment:
        for keys in batches:
            rows = torch.tensor([row for _, row in keys])
            yield images[rows], labels[rows]
        return
    loader: DataLoader[Any] = DataLoader(
        _Augmented(images, augment, batches.seed),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # fork would copy the threads' locks of the parent
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=4 if workers else None,
    )
    for pixels, rows in loader:
        yield pixels, labels[rows]
