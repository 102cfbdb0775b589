"""Training samples: augmented images, one caption of each, the same on every run.

What is drawn for a sample depends on the seed, the epoch and the image alone, not on the process
that decodes it: a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from retrieval.datasets.captioned import CaptionDataset, image_source
from retrieval.images import ImageError, decode
from retrieval.model.preprocess import Preprocess
from retrieval.training.settings import TrainError

__all__ = ["Augment", "Batches", "Pairs", "captions_of", "loader"]

Key = tuple[int, int]  # (epoch, image)


@dataclass(frozen=True)
class Augment:
    """Random changes of a photo, with torchvision's transforms.

    Attributes:
        preprocess: what is done where nothing is random.
        crop: (smallest, largest) share of the image in a random crop, or ().
        flip: whether to mirror every second image.
        randaugment: (operations, magnitude), or ().
    """

    preprocess: Preprocess
    crop: tuple[float, ...] = ()
    flip: bool = False
    randaugment: tuple[int, ...] = ()

    def pipeline(self) -> Callable[..., Tensor]:
        """PIL image -> (3, H, W) uint8; draws from torch's global generator."""
        from PIL import Image
        from torchvision.transforms import InterpolationMode, v2

        steps: list[Callable[..., object]] = []
        if self.crop:
            how = InterpolationMode(self.preprocess.interpolation)
            crop: tuple[float, float] = (self.crop[0], self.crop[1])
            steps.append(v2.RandomResizedCrop(self.preprocess.size, scale=crop, interpolation=how))
        else:
            steps.append(lambda photo: Image.fromarray(self.preprocess(photo)))
        steps.append(v2.PILToTensor())
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.randaugment:
            steps.append(v2.RandAugment(*self.randaugment))
        return v2.Compose(steps)


def captions_of(dataset: CaptionDataset, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Row of the caption that goes with each image in an epoch: (N,), drawn evenly."""
    counts = np.bincount(dataset.image_of_caption, minlength=len(dataset.images))
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    drawn = np.random.default_rng([seed, epoch, 1]).integers(counts)
    return np.asarray(first + drawn, dtype=np.int64)


class Pairs(Dataset[Any]):
    """(epoch, image) -> (pixels (3, H, W) uint8, image)."""

    def __init__(self, dataset: CaptionDataset, augment: Augment, seed: int) -> None:
        """seed of what is drawn for the pixels."""
        self.images = dataset.images
        self.augment = augment
        self.seed = seed
        self._pipeline: Callable[..., Tensor] | None = None

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, image = key
        if self._pipeline is None:
            self._pipeline = self.augment.pipeline()
        try:
            photo = decode(
                image_source(self.images[image]), draft_size=self.augment.preprocess.draft_size
            )
        except (ImageError, OSError) as error:
            raise TrainError(f"cannot read {self.images[image]}: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([self.seed, epoch, image]).integers(2**62)))
            pixels = self._pipeline(photo)
        return pixels, image


class Batches(Sampler[list[Key]]):
    """Batches of keys over all epochs, from any step on; incomplete ones are left out.

    With several processes each gets its share of every batch.
    """

    def __init__(
        self,
        images: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        epochs: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """start counts optimizer steps from the very first."""
        self.images = np.asarray(images)
        self.batch_size, self.epochs, self.seed, self.start = batch_size, epochs, seed, start
        self.rank, self.world = rank, world
        self.per_epoch = len(self.images) // batch_size

    def __len__(self) -> int:
        return max(0, self.epochs * self.per_epoch - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch_size // self.world
        for epoch in range(self.start // self.per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
            skip = self.start - epoch * self.per_epoch
            for batch in range(max(0, skip), self.per_epoch):
                at = batch * self.batch_size + self.rank * share
                yield [(epoch, int(image)) for image in order[at : at + share]]


def loader(pairs: Pairs, batches: Iterable[list[Key]], workers: int) -> DataLoader[Any]:
    """Decodes ahead in `workers` processes; gives (pixels (n, 3, H, W) uint8, images (n,))."""
    return DataLoader(
        pairs,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # fork would copy the threads' locks of the parent
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=4 if workers else None,
    )
