"""What a brain-age network has to beat, on exactly its folds: 5 folds x 3 seeds of 151 IXI brains.

- the mean age of the training subjects;
- PCA (100 components) + ridge on the registered brains at 4 mm;
- ridge on DLMUSE regional volumes over intracranial volume (not from the image alone: another
  network segmented it);
- ridge on the soft intensity bins that our network begins with, averaged over 8 mm: what is left
  of it without anything learnt but the last map.

    python benchmarks/brain_baselines.py

Penalties are chosen by leave-one-out within the training part. Predictions of every subject and
seed go to `brain_baselines_predictions.csv`, scores to `brain_baselines.csv`. A minute.
"""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import torch
from ixi import SEEDS, find_ixi, outer_splits
from record import write_rows
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import avg_pool3d

from neuro.age.networks import IntensityBins
from neuro.dataset import BrainDataset
from neuro.metrics import by_decade, evaluate
from neuro.scans.grid import as_input
from neuro.scans.template import FULL_SCALE

ALPHAS = 10.0 ** np.arange(-3, 7, 0.5)
INTRACRANIAL = "702"


def main() -> None:
    data = BrainDataset.read(find_ixi() / "brains_mni_2mm")
    predictions: dict[str, np.ndarray] = {}
    for name, features in feature_sets(data).items():
        predictions[name] = cross_validated(data, name, features)
        report(name, predictions[name], data.ages)
    write_rows(
        "brain_baselines",
        [row for name in predictions for row in rows(name, predictions[name], data)],
    )
    write_rows(
        "brain_baselines_predictions",
        [
            {"participant_id": subject}
            | {
                f"{name}, seed {seed}": round(float(by_seed[i, seed]), 2)
                for name, by_seed in predictions.items()
                for seed in SEEDS
            }
            for i, subject in enumerate(data.ids)
        ],
    )


def feature_sets(data: BrainDataset) -> dict[str, np.ndarray]:
    """Name of the method -> features (n, d); rows of NaN where a subject has none."""
    n, i, j, k = data.volumes.shape
    halves = data.volumes.reshape(n, i // 2, 2, j // 2, 2, k // 2, 2)
    voxels = halves.mean((2, 4, 6), dtype=np.float32).reshape(n, -1) / FULL_SCALE
    return {
        "mean age": np.zeros((n, 1)),
        "PCA(100) + ridge, voxels at 4 mm": voxels,
        "ridge, ROI volumes / ICV": region_volumes(data),
        "ridge, intensity bins at 8 mm": intensity_bins(data),
    }


def intensity_bins(data: BrainDataset) -> np.ndarray:
    """(n, 7 x 10 x 12 x 10) soft bins and those of the mirror image, averaged."""
    stem = IntensityBins()
    with torch.no_grad():
        parts = [
            avg_pool3d(stem(torch.from_numpy(as_input(part))), 2)
            for part in np.split(data.volumes, range(8, len(data), 8))
        ]
    bins = torch.cat(parts)
    return ((bins + bins.flip(2)) / 2).flatten(1).numpy()


def region_volumes(data: BrainDataset) -> np.ndarray:
    """(n, regions) DLMUSE volumes over intracranial volume; NaN for subjects without."""
    with (find_ixi() / "roi_volumes_dlmuse.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        names = [
            name for name in reader.fieldnames or () if name.isdigit() and name != INTRACRANIAL
        ]
        table = {
            row["MRID"]: np.array([float(row[name]) for name in names]) / float(row[INTRACRANIAL])
            for row in reader
        }
    missing = np.full(len(names), np.nan)
    return np.array([_of_subject(table, subject, missing) for subject in data.ids])


def _of_subject(table: dict[str, np.ndarray], subject: str, missing: np.ndarray) -> np.ndarray:
    found = [values for name, values in table.items() if name.startswith(subject)]
    return found[0] if len(found) == 1 else missing


def cross_validated(data: BrainDataset, name: str, features: np.ndarray) -> np.ndarray:
    """Out-of-fold ages (n, seeds); NaN for subjects without features."""
    known = np.isfinite(features).all(1)
    predicted = np.full((len(data), len(SEEDS)), np.nan)
    for split in outer_splits(data):
        train, test = split.train[known[split.train]], split.test[known[split.test]]
        if name == "mean age":
            predicted[test, split.seed] = data.ages[train].mean()
            continue
        model: Any = RidgeCV(alphas=ALPHAS)
        if name.startswith("PCA"):
            model = make_pipeline(PCA(100, random_state=0), model)
        elif "ROI" in name:
            model = make_pipeline(StandardScaler(), model)
        predicted[test, split.seed] = model.fit(features[train], data.ages[train]).predict(
            features[test]
        )
    return predicted


def rows(name: str, predicted: np.ndarray, data: BrainDataset) -> list[dict[str, Any]]:
    """Mean and standard deviation of each score over seeds, and by decade."""
    known = np.isfinite(predicted).all(1)
    ages = data.ages[known]
    scores = [evaluate(column, ages) for column in predicted[known].T]
    row: dict[str, Any] = {"method": name, "n": int(known.sum()), "seeds": len(scores)}
    for key in ("mae", "rmse", "r", "r2", "bias_slope"):
        values = [score[key] for score in scores]
        row[key] = round(float(np.mean(values)), 4)
        row[f"{key}_sd"] = round(float(np.std(values)), 4)
    for part in by_decade(predicted[known].mean(1), ages):
        row[f"mae_{part['decade']}"] = round(part["mae"], 2)
    return [row]


def report(name: str, predicted: np.ndarray, ages: np.ndarray) -> None:
    known = np.isfinite(predicted).all(1)
    errors = np.abs(predicted[known] - ages[known, None]).mean(0)
    print(f"{name}: MAE {errors.mean():.2f} ± {errors.std():.2f} y, n = {known.sum()}", flush=True)


if __name__ == "__main__":
    main()
