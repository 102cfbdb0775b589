"""What the checks of a scan say of ordinary brains, and of some with another contrast.

    python benchmarks/brain_scan_checks.py           # about 4 minutes on one core
    python benchmarks/brain_scan_checks.py --fit     # the numbers of neuro/scans/contrast.py

Looks at the prepared brains of the 151 IXI people that the shipped model was trained on and of 18
old people from another scanner. Some of them are also given a power law (gamma) or a bright
sphere, and are scaled anew as a scan is. Contrast of an IXI brain is judged by a fit to nine
tenths of them that it is not in. Writes `results/brain_scan_checks.csv`: a row for each brain and
what was done to it, with its age by the percentile that was used before and by today's reference.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from record import write_rows

from neuro.age.predict import BrainAge
from neuro.scans.contrast import (
    FITTED_TO,
    LEAST_WHITE_TO_GREY,
    LIMIT,
    contrast_features,
    deviation,
    white_to_grey,
)
from neuro.scans.grid import crop, uncrop
from neuro.scans.intensity import bright_excess
from neuro.scans.preprocess import to_uint8
from neuro.scans.template import FULL_SCALE

DATA = Path(os.environ.get("ENN_DATA", "../shared/data"))
GAMMAS = (0.8, 0.9, 1.1, 1.25)
# Centres in voxels, shares of the brain's volume, brightness in units of the 99th percentile.
SPHERES = [((49, 62, 38), 0.015, 2.0), ((30, 80, 50), 0.03, 1.3), ((70, 40, 40), 0.005, 2.0)]
REGULARISATION = 0.05
FOLDS = 10


def percentile_alone(image: np.ndarray) -> np.ndarray:
    """As `to_uint8` was: nothing kept a bright tail from moving the reference."""
    scaled = image * (FULL_SCALE / np.percentile(image[image > 0], 99))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def with_gamma(image: np.ndarray, gamma: float) -> np.ndarray:
    """float32 (99, 117, 95)."""
    return ((image / FULL_SCALE) ** gamma).astype(np.float32)


def with_sphere(
    image: np.ndarray, centre: tuple[int, int, int], share: float, bright: float
) -> np.ndarray:
    """float32 (99, 117, 95)."""
    radius = (share * np.count_nonzero(image) * 3 / 4 / np.pi) ** (1 / 3)
    away = np.indices(image.shape) - np.array(centre)[:, None, None, None]
    inside = ((away**2).sum(axis=0) <= radius**2) & (image > 0)
    return np.where(inside, bright * FULL_SCALE, image).astype(np.float32)


def direction(plain: np.ndarray, flat: np.ndarray, steep: np.ndarray) -> tuple[Any, Any]:
    """Mean, and weights that tell a power law best; (n, d) features each."""
    mean = plain.mean(axis=0)
    spread = np.cov(plain, rowvar=False)
    spread += np.diag(REGULARISATION * np.diag(spread) + 1e-9)
    weights = np.linalg.solve(spread, (steep - flat).mean(axis=0))
    return mean, weights / ((plain - mean) @ weights).std()


def fitted(images: list[np.ndarray]) -> tuple[Any, Any, dict[float, np.ndarray]]:
    """Mean, weights, and the deviations by gamma of brains that were not fitted to."""
    features = {
        gamma: np.array(
            [contrast_features(image if gamma == 1 else _again(image, gamma)) for image in images]
        )
        for gamma in (1.0, *GAMMAS)
    }
    away = {gamma: np.empty(len(images)) for gamma in features}
    for part in np.array_split(np.random.default_rng(0).permutation(len(images)), FOLDS):
        others = np.setdiff1d(np.arange(len(images)), part)
        mean, weights = direction(*(features[gamma][others] for gamma in (1.0, 0.9, 1.1)))
        for gamma, rows in features.items():
            away[gamma][part] = (rows[part] - mean) @ weights
    return *direction(*(features[gamma] for gamma in (1.0, 0.9, 1.1))), away


def _again(image: np.ndarray, gamma: float) -> np.ndarray:
    return uncrop(crop(to_uint8(with_gamma(image, gamma))))


def load(folder: Path) -> dict[str, np.ndarray]:
    import nibabel

    return {
        path.name.removesuffix(".nii.gz"): np.asarray(nibabel.load(path).dataobj)
        for path in sorted(folder.glob("*.nii.gz"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="print the numbers of contrast.py")
    args = parser.parse_args()
    ixi = load(DATA / "ixi_hh/brains_mni_2mm")
    old = load(DATA / "external_old/brains_mni_2mm")
    mean, weights, away = fitted([uncrop(crop(image)) for image in ixi.values()])
    if args.fit:
        for gamma, found in away.items():
            share = np.mean(np.abs(found) > LIMIT)
            print(f"# beyond LIMIT = {LIMIT} at gamma {gamma:g}: {share:.1%}")
        for name, numbers in (("_MEAN", mean), ("_WEIGHTS", weights)):
            print(name, "= (")
            for start in range(0, len(numbers), 8):
                print("    *(" + ", ".join(f"{n:.4f}" for n in numbers[start : start + 8]) + "),")
            print(")")
        return
    brain = BrainAge.load()
    if brain.sha256 != FITTED_TO:
        raise SystemExit("neuro/scans/contrast.py belongs to another model: --fit, and put it in")
    rows = []

    def add(name: str, what: str, before: np.ndarray, now: np.ndarray, known: float | None) -> None:
        said = uncrop(crop(now))
        contrast = deviation(said) if known is None else known
        distance = brain.reference.distance(said)
        excess = bright_excess(now[now > 0])
        same = np.array_equal(before, now)
        both = [crop(now)] if same else [crop(before), crop(now)]
        ages = brain.model.predict(np.stack(both)).ages
        rows.append(
            {
                "brain": name,
                "set": "ixi" if name in ixi else "external_old",
                "change": what,
                "age_percentile": round(float(ages[0]), 2),
                "age": round(float(ages[-1]), 2),
                "distance": round(distance, 2),
                "contrast": round(contrast, 2),
                "white_to_grey": round(white_to_grey(now), 3),
                "shining": round(excess, 4),
                "flagged": int(abs(contrast) > LIMIT or distance > 1 or excess > 0),
                "no_t1": int(white_to_grey(now) < LEAST_WHITE_TO_GREY),
            }
        )

    for index, (name, image) in enumerate({**ixi, **old}.items()):
        inside = index < len(ixi)
        as_float = image.astype(np.float32)
        add(
            *(name, "none", image, to_uint8(as_float)),
            float(away[1.0][index]) if inside else None,
        )
        if index % (12 if inside else 3):
            continue
        for gamma in GAMMAS:
            changed = with_gamma(image, gamma)
            known = float(away[gamma][index]) if inside else None
            add(name, f"gamma {gamma}", percentile_alone(changed), to_uint8(changed), known)
        for centre, share, bright in SPHERES:
            changed = with_sphere(image, centre, share, bright)
            what = f"sphere of {100 * share:g} %, {bright:g}"
            add(name, what, percentile_alone(changed), to_uint8(changed), None)
    path = write_rows("brain_scan_checks", rows)
    for group in ("ixi", "external_old"):
        for what in dict.fromkeys(row["change"] for row in rows):
            some = [row for row in rows if (row["set"], row["change"]) == (group, what)]
            base = {r["brain"]: r["age"] for r in rows if r["change"] == "none"}
            moved = [
                [row[c] - base[row["brain"]] for c in ("age_percentile", "age")] for row in some
            ]
            flagged = np.mean([row["flagged"] for row in some])
            contrast = np.mean([abs(row["contrast"]) > LIMIT for row in some])
            worst = np.abs(moved).max(axis=0)
            silent = [abs(m[1]) for m, row in zip(moved, some, strict=True) if not row["flagged"]]
            print(
                f"{group} {what}: {len(some)} brains, contrast {contrast:.0%}, flagged "
                f"{flagged:.0%}, moved by at most {worst[0]:.1f} before, {worst[1]:.1f} now, "
                f"unflagged by {max(silent, default=0):.1f}"
            )
    print(path)


if __name__ == "__main__":
    main()
