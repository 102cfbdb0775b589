"""Nested folds of the brains that the benchmarks are about."""

from __future__ import annotations

import numpy as np
import pytest
from ixi import find_ixi, inner_folds, outer_splits

from neuro.dataset import BrainDataset, DatasetError, read_ages


def test_nested_folds_never_touch_the_test_part():
    ids = tuple(f"s{i}" for i in range(40))
    data = BrainDataset(ids, np.linspace(20, 80, 40), np.zeros((40, 1, 1, 1), np.uint8))
    splits = list(outer_splits(data))
    assert len(splits) == 15
    for split in splits:
        assert not set(split.train) & set(split.test)
        inner = inner_folds(data, split)
        assert sorted(np.concatenate(inner)) == sorted(split.train)
    together = np.concatenate([s.test for s in splits if s.seed == 1])
    assert sorted(together) == list(range(40))


def test_the_ixi_brains():
    try:
        folder = find_ixi()
    except DatasetError as error:
        pytest.skip(str(error))
    assert len(read_ages(folder / "participants.tsv")) == 151
