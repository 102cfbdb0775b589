"""Made-up brains whose age shows in one place, for tests of training and data sets."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from neuro.dataset import BrainDataset
from neuro.scans.template import MNI_AFFINE, MNI_SHAPE

SMALL = (20, 24, 20)


def made_up(count: int = 16, shape: tuple[int, int, int] = SMALL, seed: int = 0) -> BrainDataset:
    """Noise around one intensity; a cube in the middle is brighter the older the subject."""
    rng = np.random.default_rng(seed)
    ages = rng.uniform(20, 80, count)
    volumes = np.zeros((count, *shape), np.uint8)
    brain = tuple(slice(n // 8, n - n // 8) for n in shape)
    core = tuple(slice(n // 3, n - n // 3) for n in shape)
    for volume, age in zip(volumes, ages, strict=True):
        volume[brain] = np.clip(rng.normal(130, 15, volume[brain].shape), 1, 255)
        volume[core] = 40 + age
    return BrainDataset(tuple(f"sub-{i:02d}" for i in range(count)), ages, volumes)


def write_dataset(folder: Path, count: int = 3) -> list[float]:
    """A folder with `participants.tsv` and volumes on the template's grid; the ages."""
    rng = np.random.default_rng(0)
    ages = [20.5 + 10 * i for i in range(count)]
    lines = ["participant_id\tage\tsex"]
    for i, age in enumerate(ages):
        volume = np.zeros(MNI_SHAPE, np.uint8)
        volume[20:70, 20:90, 10:70] = rng.integers(100, 201, (50, 70, 60))
        nibabel.save(nibabel.Nifti1Image(volume, MNI_AFFINE), folder / f"sub-{i}_T1w.nii.gz")
        lines.append(f"sub-{i}\t{age}\tF")
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ages
