"""Samples that depend on the seed, the epoch and the image alone."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_cases import write_photos

from retrieval.datasets.captioned import CaptionDataset, load_captions
from retrieval.model.preprocess import Preprocess
from retrieval.training.pairs import Augment, Batches, Pairs, captions_of, loader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 12)
    return load_captions(folder / "captions.csv", folder)


@given(
    count=st.integers(2, 40),
    size=st.integers(1, 8),
    epochs=st.integers(1, 4),
    start=st.integers(0, 30),
    seed=st.integers(0, 5),
)
def test_batches_go_on_where_a_run_stopped(
    count: int, size: int, epochs: int, start: int, seed: int
) -> None:
    size = min(size, count)
    images = np.arange(100, 100 + count)
    whole = list(Batches(images, size, epochs=epochs, seed=seed))
    assert len(whole) == epochs * (count // size)
    start = min(start, len(whole))
    rest = Batches(images, size, epochs=epochs, seed=seed, start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == len(whole) - start
    for epoch in range(epochs):
        seen = Counter(i for batch in whole for e, i in batch if e == epoch)
        assert max(seen.values()) == 1
        assert len(seen) == count // size * size


@given(world=st.sampled_from([1, 2, 4]), epochs=st.integers(1, 3))
def test_processes_share_every_batch(world: int, epochs: int) -> None:
    images = np.arange(21)
    whole = list(Batches(images, 8, epochs=epochs, seed=3))
    parts = [
        list(Batches(images, 8, epochs=epochs, seed=3, rank=rank, world=world))
        for rank in range(world)
    ]
    assert [list(chain(*rows)) for rows in zip(*parts, strict=True)] == whole


def test_captions_are_those_of_their_images(dataset: CaptionDataset) -> None:
    drawn = [captions_of(dataset, 0, epoch) for epoch in range(20)]
    for rows in drawn:
        assert dataset.image_of_caption[rows].tolist() == list(range(12))
    assert len({tuple(rows) for rows in drawn}) > 10
    assert len({row for rows in drawn for row in rows}) == len(dataset.captions)


def test_samples_do_not_depend_on_who_decodes_them(dataset: CaptionDataset) -> None:
    augment = Augment(Preprocess(size=(32, 32)), crop=(0.3, 1.0), flip=True, randaugment=(2, 9))
    keys = [[(0, 1), (0, 2)], [(1, 1), (0, 7)], [(0, 1), (3, 3)]]
    alone = [pixels for pixels, _ in loader(Pairs(dataset, augment, 5), keys, 0)]
    shared = [pixels for pixels, _ in loader(Pairs(dataset, augment, 5), keys, 2)]
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(alone[0][0], alone[2][0])
    assert not torch.equal(alone[0][0], alone[1][0])  # the same photo in another epoch
    before = torch.random.get_rng_state()
    Pairs(dataset, augment, 5)[(0, 0)]
    assert torch.equal(before, torch.random.get_rng_state())


def test_without_augmentation_pixels_are_the_models_own(dataset: CaptionDataset) -> None:
    from retrieval.images import decode

    preprocess = Preprocess(size=(32, 24), mode="squash")
    pixels, image = Pairs(dataset, Augment(preprocess), 0)[(0, 4)]
    path = dataset.images[4]
    assert isinstance(path, Path)
    assert image == 4
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), preprocess(decode(path)))
