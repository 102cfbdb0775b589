"""The 151 registered IXI brains, and the nested folds that every number of them comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuro.dataset import BrainDataset, DatasetError, folds

SEEDS = (0, 1, 2)
FOLDS = 5
"""Outer folds of each of the `SEEDS`: the numbers of the model card come from these 15 splits."""

_INNER = 5


def find_ixi() -> Path:
    """Folder of the 151 registered IXI brains: `ixi_hh` in `ENN_DATA` (default `../shared/data`).

    Raises:
        DatasetError: it is not there.
    """
    root = Path(os.environ.get("ENN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    folder = root / "ixi_hh"
    if not (folder / "participants.tsv").is_file():
        raise DatasetError(f"no IXI brains at {folder}; set ENN_DATA to the folder with ixi_hh")
    return folder


@dataclass(frozen=True)
class Split:
    """One outer fold: positions in the data set."""

    seed: int
    fold: int
    train: np.ndarray
    test: np.ndarray


def outer_splits(
    data: BrainDataset, seeds: Sequence[int] = SEEDS, parts: int = FOLDS
) -> Iterator[Split]:
    """All outer folds; a model is chosen and trained within `train` alone."""
    for seed in seeds:
        deal = folds(data.ids, data.ages, parts, seed)
        for fold, test in enumerate(deal):
            train = np.sort(np.concatenate([part for part in deal if part is not test]))
            yield Split(seed, fold, train, test)


def inner_folds(data: BrainDataset, split: Split, parts: int = _INNER) -> list[np.ndarray]:
    """Folds of a split's training part, as positions in the data set: for choices and residuals."""
    subjects = [data.ids[i] for i in split.train]
    inner = folds(subjects, data.ages[split.train], parts, f"{split.seed}.{split.fold}")
    return [split.train[part] for part in inner]
