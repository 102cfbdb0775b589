"""Registered brains with ages, read once into memory, and folds of equal ages.

A data set is a folder with `participants.tsv` (at least `participant_id` and `age`) and one volume
for each participant, in the MNI152 2 mm grid as `neuro.scans.preprocess` writes it. Volumes are
kept as uint8, cropped to `GRID`; `as_input` turns a batch into what networks read.

>>> outer = folds(["a", "b", "c", "d", "e", "f"], [20, 30, 40, 50, 60, 70], parts=3, seed=0)
>>> sorted(len(part) for part in outer)
[2, 2, 2]
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuro.scans.grid import GRID, crop
from neuro.scans.preprocess import to_uint8
from neuro.scans.read import VolumeError

__all__ = [
    "BrainDataset",
    "DatasetError",
    "folds",
]

_SUFFIXES = (".nii.gz", ".nii")


class DatasetError(ValueError):
    """A data set's folder or table is not as expected; the message says where and what to do."""


@dataclass(frozen=True)
class BrainDataset:
    """Subjects in the order of their table.

    Attributes:
        ids: participant ids, unique.
        ages: (n,) float64, years.
        volumes: (n, 80, 96, 80) uint8, `FULL_SCALE` at each brain's 99th percentile.
    """

    ids: tuple[str, ...]
    ages: np.ndarray
    volumes: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def read(cls, folder: Path | str, table: Path | str | None = None) -> BrainDataset:
        """Read a folder of volumes and its table.

        Args:
            folder: holds `<participant_id>*.nii.gz` (or `.nii`), directly or in sub-folders.
            table: tab-separated, with `participant_id` and `age` in years; `participants.tsv` in
                the folder or above it by default.

        Raises:
            DatasetError: no table, a bad age, a volume that is missing or has another shape.
        """
        folder = Path(folder)
        table = _find_table(folder) if table is None else Path(table)
        ages = read_ages(table)
        files = _volume_files(folder)
        volumes = np.empty((len(ages), *GRID), np.uint8)
        for row, participant in zip(volumes, ages, strict=True):
            row[:] = _read_volume(_file_of(participant, files, folder))
        return cls(tuple(ages), np.array(list(ages.values()), np.float64), volumes)

    def take(self, rows: Sequence[int] | np.ndarray) -> BrainDataset:
        """The subjects at these positions."""
        rows = np.asarray(rows)
        return BrainDataset(tuple(self.ids[i] for i in rows), self.ages[rows], self.volumes[rows])


def read_ages(table: Path) -> dict[str, float]:
    """participant_id -> age in years, in the order of a tab-separated table.

    Raises:
        DatasetError: a column is missing, an id is there twice, an age is no number from 0 to 120.
    """
    ages: dict[str, float] = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t")
        if not {"participant_id", "age"} <= set(reader.fieldnames or ()):
            raise DatasetError(
                f"{table}: needs tab-separated columns participant_id and age, has "
                f"{', '.join(reader.fieldnames or ()) or 'none'}"
            )
        for line, row in enumerate(reader, start=2):
            participant = row["participant_id"]
            try:
                age = float(row["age"])
            except (TypeError, ValueError):
                age = float("nan")
            if not 0 < age < 120:
                raise DatasetError(
                    f"{table}, line {line}: age {row['age']!r} of {participant} is no number of "
                    "years between 0 and 120; correct or remove the line"
                )
            if participant in ages:
                raise DatasetError(f"{table}, line {line}: {participant} is there twice")
            ages[participant] = age
    if not ages:
        raise DatasetError(f"{table}: no participants")
    return ages


def folds(
    ids: Sequence[str], ages: Sequence[float] | np.ndarray, parts: int, seed: int | str
) -> list[np.ndarray]:
    """Deal subjects to `parts` folds of equal ages, the same on every machine and version.

    Subjects sorted by age are dealt in rounds of `parts`; who gets which fold within a round is
    decided by a hash of seed and id, so no random generator's history matters.

    Returns:
        Sorted positions of each fold; together all of them, each once.

    Raises:
        DatasetError: fewer subjects than folds.
    """
    if not 2 <= parts <= len(ids):
        raise DatasetError(f"cannot deal {len(ids)} subjects to {parts} folds; give 2 or more each")
    drawn = [hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in ids]
    by_age = sorted(range(len(ids)), key=lambda i: (ages[i], ids[i]))
    members: list[list[int]] = [[] for _ in range(parts)]
    for start in range(0, len(ids), parts):
        group = sorted(by_age[start : start + parts], key=lambda i: drawn[i])
        # The last round may be short: whom it reaches is drawn too.
        order = sorted(
            range(parts), key=lambda f: hashlib.sha256(f"{seed}:{start}:{f}".encode()).digest()
        )
        for subject, part in zip(group, order, strict=False):
            members[part].append(subject)
    return [np.array(sorted(part)) for part in members]


def _find_table(folder: Path) -> Path:
    for place in (folder, folder.parent):
        if (place / "participants.tsv").is_file():
            return place / "participants.tsv"
    raise DatasetError(
        f"{folder}: no participants.tsv here or above; make one with participant_id and age"
    )


def _volume_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for suffix in _SUFFIXES:
        for path in sorted(folder.rglob(f"*{suffix}")):
            files.setdefault(path.name.removesuffix(suffix), path)
    return files


def _file_of(participant: str, files: dict[str, Path], folder: Path) -> Path:
    for name in (participant, f"{participant}_T1w", f"{participant}_brain"):
        if name in files:
            return files[name]
    raise DatasetError(
        f"{folder}: no volume of {participant}; expected {participant}_T1w.nii.gz, or remove the "
        "participant from the table"
    )


def _read_volume(path: Path) -> np.ndarray:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
        values = values if values.dtype == np.uint8 else to_uint8(values)
        return crop(values)
    except (DatasetError, VolumeError, ImageFileError, OSError, EOFError) as error:
        raise DatasetError(f"{path}: {error}") from None
