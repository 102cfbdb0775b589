"""How far a prepared brain can be trusted: measures, limits, and a picture for the eye.

>>> import numpy as np
>>> left, both = np.zeros((2, 4, 4, 4), bool)
>>> left[:2] = both[:] = True
>>> round(dice(left, both), 3)
0.667
>>> [flag.name for flag in judge(Quality(0.62, 1400.0, 1.0, (0.9, 1.1), 1.0))]
['registration']
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.files.digests import DigestError, check_seal, sealed
from neuro.scans.contrast import LEAST_WHITE_TO_GREY, LIMIT, white_to_grey
from neuro.scans.intensity import bright_excess
from neuro.scans.template import FULL_SCALE, MNI_AFFINE, load_template

__all__ = [
    "USUAL_DICE",
    "Flag",
    "IntensityReference",
    "Quality",
    "dice",
    "empty_share",
    "field_of_view",
    "intensity_features",
    "judge",
    "save_picture",
    "told_apart",
]

# (fatal, odd) below these; what is usual is measured: docs/decisions.md.
# Dice of a brain that lies within its scan: 13 IXI heads, 8 old ones and 3 others have 0.941 to
# 0.966; 16 heads that lay upside down, back to front or on their side 0.80 to 0.911.
_DICE = (0.925, 0.935)
USUAL_DICE = 0.94
_FIELD = (0.80, 0.96)
# Brain with its ventricles in mL: fatal outside of the first, odd outside of the second.
_POSSIBLE_ML = (700.0, 2300.0)
_VOLUME_ML = (900.0, 2200.0)
# Distance of the intensities: odd and fatal above these. Old people at another scanner have 1.9 to
# 3.7, averaged templates up to 5.5; what is not T1-weighted 7 to 29.
_DISTANCE = (1.0, 6.5)
# Odd outside of these: the largest voxel side in mm, the factors by which the registration
# stretches.
_SPACING_MM = 3.5
_STRETCH = (0.7, 1.45)
# Share of the template's brain that is empty: (odd, fatal) above these; usual: 0.001 to 0.006.
_EMPTY = (0.03, 0.10)

# Share of the brain that shines beyond what is usual: fatal above this. Made heads whose brightest
# 2 to 3 % shone as after a contrast agent were up to 9 years off, those with up to 2 % less than 5.
_BRIGHT = 0.02

# Below this a voxel is dark fluid or what interpolation leaves around the brain.
_DARK = FULL_SCALE // 10
_QUANTILES = (5, 10, 25, 50, 75, 90, 95)


@dataclass(frozen=True)
class Flag:
    """What is odd about a scan.

    Attributes:
        name: a word for tables.
        text: for people, with the number and what is usual.
        fatal: nothing may be predicted from this scan.
    """

    name: str
    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Quality:
    """Measures of one prepared scan.

    Attributes:
        dice: overlap of the registered brain's mask with the template's, 0 to 1.
        brain_ml: volume of the extracted brain in the scan's own space; None if the scan came in
            MNI space.
        field_of_view: share of the template's brain that lies within the scan, 0 to 1.
        stretch: smallest and largest factor by which the registration scaled a direction.
        spacing_mm: largest voxel side of the scan.
    """

    dice: float
    brain_ml: float | None
    field_of_view: float
    stretch: tuple[float, float]
    spacing_mm: float

    def as_record(self) -> dict[str, Any]:
        """JSON."""
        return {**asdict(self), "stretch": list(self.stretch)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Quality:
        """The inverse of `as_record`."""
        low, high = record["stretch"]
        return cls(**{**record, "stretch": (low, high)})


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Overlap of two masks, 0 to 1 (0 if both are empty)."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 0.0


def field_of_view(to_mni: np.ndarray, shape: tuple[int, int, int]) -> float:
    """Share of the template's brain that lies within a grid, 0 to 1.

    Args:
        to_mni: (4, 4) voxel indices of the grid -> mm in MNI space.
        shape: of the grid.
    """
    from_template = np.linalg.inv(to_mni) @ MNI_AFFINE
    points = np.argwhere(load_template()[1]) @ from_template[:3, :3].T + from_template[:3, 3]
    # Half a voxel of slack: the template's own grid ends where its brain stem goes on.
    held = (points >= -1.0) & (points <= np.array(shape))
    return float(held.all(axis=1).mean())


def empty_share(image: np.ndarray) -> float:
    """Share of the template's brain where an image is 0, from 0 to 1.

    Args:
        image: (99, 117, 95) uint8, as `Prepared.image`.
    """
    return float(np.mean(image[load_template()[1]] == 0))


def told_apart(value: float, *limits: float, digits: int = 1) -> tuple[str, ...]:
    """A number and its limits with as many digits as tell it from each of them.

    >>> told_apart(1.03, 1.0), told_apart(82.3, 20.17, 82.0, digits=0)
    (('1.03', '1.00'), ('82.3', '20.2', '82.0'))

    Args:
        value: beyond a limit.
        limits: other numbers.
        digits: behind the point, at least; three more at most.
    """
    for more in range(3):
        texts = tuple(f"{number:.{digits + more}f}" for number in (value, *limits))
        if texts[0] not in texts[1:]:
            return texts
    return tuple(f"{number:.{digits + 3}f}" for number in (value, *limits))


def judge(
    quality: Quality,
    *,
    image: np.ndarray | None = None,
    distance: float | None = None,
    contrast: float | None = None,
    age: float | None = None,
    trained_ages: tuple[float, float] | None = None,
) -> list[Flag]:
    """What is odd about a scan, gravest first.

    Args:
        quality: its measures.
        image: (99, 117, 95) uint8, `Prepared.image`: looked through for holes.
        distance: `IntensityReference.distance` of its image.
        contrast: `neuro.scans.contrast.deviation` of its image, if the model is the one that this
            was fitted to.
        age: of the person in years, if known.
        trained_ages: youngest and oldest that the model has seen.
    """
    flags = []

    def low(name: str, value: float, limits: tuple[float, float], text: str) -> None:
        fatal, odd = limits
        if not value >= odd:
            flags.append(Flag(name, text, fatal=not value >= fatal))

    # What lies outside of the scan cannot overlap.
    most = 2 * quality.field_of_view / (1 + quality.field_of_view)
    low(
        "registration",
        quality.dice,
        (_DICE[0] * most, _DICE[1] * most),
        f"the brain overlaps the template's with Dice {quality.dice:.2f} (usual: "
        f"{USUAL_DICE} or more); is it a T1-weighted head, complete and upright in its header? "
        "Mend the orientation there if it lies upside down, back to front or on its side",
    )
    low(
        "field_of_view",
        quality.field_of_view,
        _FIELD,
        f"only {100 * quality.field_of_view:.0f} % of the brain lie within the scan",
    )
    if quality.brain_ml is not None and not _within(quality.brain_ml, _VOLUME_ML):
        volume, *_ = told_apart(quality.brain_ml, *_VOLUME_ML, *_POSSIBLE_ML, digits=0)
        flags.append(
            Flag(
                "brain_volume",
                f"the brain has {volume} mL (adults: {_VOLUME_ML[0]:.0f} to "
                f"{_VOLUME_ML[1]:.0f}; {_POSSIBLE_ML[0]:.0f} to {_POSSIBLE_ML[1]:.0f} get an age); "
                "is it a T1-weighted head with the right voxel size?",
                fatal=not _within(quality.brain_ml, _POSSIBLE_ML),
            )
        )
    if not (quality.stretch[0] >= _STRETCH[0] and quality.stretch[1] <= _STRETCH[1]):
        flags.append(
            Flag(
                "stretch",
                f"registration scaled it by {quality.stretch[0]:.2f} to {quality.stretch[1]:.2f} "
                f"(usual: {_STRETCH[0]} to {_STRETCH[1]})",
            )
        )
    if quality.spacing_mm > _SPACING_MM:
        flags.append(
            Flag("coarse", f"its slices are {quality.spacing_mm:.1f} mm thick; 1 to 2 mm are best")
        )
    empty = 0.0 if image is None else empty_share(image)
    if empty > _EMPTY[0]:
        flags.append(
            Flag(
                "holes",
                f"{100 * empty:.0f} % of the brain are empty (usual: below 1 %); is it damaged, "
                "cut off, or no brain?",
                fatal=empty > _EMPTY[1],
            )
        )
    if image is not None:
        flags += _of_contrast(image)
    if distance is not None and not distance <= _DISTANCE[0]:
        beyond = not distance <= _DISTANCE[1]
        times, *_ = told_apart(distance, *_DISTANCE)
        flags.append(
            Flag(
                "intensity",
                f"its intensities are {times} times as far from the training scans' as the "
                "farthest of these: another scanner, sequence or age"
                + (
                    f" (up to {_DISTANCE[1]} get an age); is it T1-weighted, without a contrast "
                    "agent?"
                    if beyond
                    else ""
                ),
                fatal=beyond,
            )
        )
    elif contrast is not None and not abs(contrast) <= LIMIT:
        deviations, *_ = told_apart(abs(contrast), LIMIT)
        flags.append(
            Flag(
                "contrast",
                f"its contrast is unlike the training scans' ({deviations} standard "
                f"deviations {'flatter' if contrast < 0 else 'steeper'}; usual: up to {LIMIT}): "
                "the age may be off by several years",
            )
        )
    if age is not None and trained_ages is not None and not _within(age, trained_ages):
        told, youngest, oldest = told_apart(age, *trained_ages, digits=0)
        flags.append(
            Flag(
                "age",
                f"the model has learnt from ages {youngest} to {oldest}, this person is {told}",
            )
        )
    # A knee may be stretched until its outline is nearly that of a brain.
    if {"brain_volume", "stretch"} & {flag.name for flag in flags}:
        flags = [
            replace(flag, fatal=True) if flag.name == "registration" else flag for flag in flags
        ]
    return sorted(flags, key=lambda flag: not flag.fatal)


def _of_contrast(image: np.ndarray) -> list[Flag]:
    """What a (99, 117, 95) uint8 image shows without a model."""
    flags = []
    ratio = white_to_grey(image)
    if ratio < LEAST_WHITE_TO_GREY:
        text = (
            f"it does not look T1-weighted: its white matter is {ratio:.2f} times as bright as its "
            f"grey matter (T1: {LEAST_WHITE_TO_GREY} or more)"
        )
        flags.append(Flag("not_t1", text, fatal=True))
    inside = image[image > 0]
    excess = bright_excess(inside) if inside.size else 0.0
    if excess > 0:
        text = (
            f"{100 * excess:.1f} % of the brain are far brighter than white matter beyond what is "
            "usual (contrast agent, artefact?); "
        )
        fatal = excess > _BRIGHT
        if fatal:
            text += f"up to {100 * _BRIGHT:.0f} % get an age; is there a scan without?"
        else:
            text += "the intensities are scaled without them"
        flags.append(Flag("bright", text, fatal=fatal))
    return flags


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


# --- intensities -------------------------------------------------------------------------------


def intensity_features(image: np.ndarray) -> np.ndarray:
    """What scanner and sequence leave in an image, whoever's brain it is.

    Args:
        image: (99, 117, 95) uint8, as `Prepared.image`.

    Returns:
        (10,) float64: quantiles of the brain's values (5 to 95 %), how sharp and how noisy it is,
        and how the value changes from the middle to the rim.
    """
    inside = image > _DARK
    values = image.astype(np.float32) / FULL_SCALE
    if inside.sum() < 1000:
        return np.full(len(_QUANTILES) + 3, np.nan)
    quantiles = np.percentile(values[inside], _QUANTILES)
    # First and second differences along each axis, where all voxels are brain.
    first, second = [], []
    for axis in range(3):
        v, m = np.moveaxis(values, axis, 0), np.moveaxis(inside, axis, 0)
        first.append(np.diff(v, axis=0)[m[1:] & m[:-1]])
        second.append(np.diff(v, n=2, axis=0)[m[2:] & m[1:-1] & m[:-2]])
    sharp = math.sqrt(float(np.mean(np.concatenate(first) ** 2)))
    noise = float(np.median(np.abs(np.concatenate(second))))
    points = np.argwhere(inside)
    radius = np.linalg.norm(points - points.mean(axis=0), axis=1)
    deep = radius < np.median(radius)
    shading = float(np.median(values[inside][deep]) - np.median(values[inside][~deep]))
    return np.array([*quantiles, sharp, noise, shading], np.float64)


@dataclass(frozen=True)
class IntensityReference:
    """The `intensity_features` of the training scans, as a mean and a covariance.

    Attributes:
        mean: (10,).
        covariance: (10, 10).
        limit: Mahalanobis distance of the farthest training scan.
        count: training scans.
    """

    mean: np.ndarray
    covariance: np.ndarray
    limit: float
    count: int

    @classmethod
    def fit(cls, images: Iterable[np.ndarray]) -> IntensityReference:
        """From the training images, each (99, 117, 95) uint8.

        Raises:
            ValueError: fewer than 20 images, or one without a brain.
        """
        rows = np.array([intensity_features(image) for image in images])
        if len(rows) < 20:
            raise ValueError(f"got {len(rows)} images, at least 20 are needed for a reference")
        if not np.isfinite(rows).all():
            raise ValueError("an image holds no brain; leave it out")
        covariance = np.cov(rows, rowvar=False)
        # Quantiles go together: what hardly varies in training must not count without bound.
        covariance += np.diag(0.05 * np.diag(covariance) + 1e-8)
        own = cls(rows.mean(axis=0), covariance, 1.0, len(rows))
        return cls(
            own.mean, covariance, float(max(own._mahalanobis(row) for row in rows)), len(rows)
        )

    def distance(self, image: np.ndarray) -> float:
        """Distance of an image to the training scans; 1 is the farthest of these."""
        return self._mahalanobis(intensity_features(image)) / self.limit

    def _mahalanobis(self, row: np.ndarray) -> float:
        if not np.isfinite(row).all():
            return math.inf
        gap = row - self.mean
        return math.sqrt(float(gap @ np.linalg.solve(self.covariance, gap)))

    def as_record(self) -> dict[str, Any]:
        """JSON."""
        return {
            "format": 1,
            "mean": self.mean.tolist(),
            "covariance": self.covariance.tolist(),
            "limit": self.limit,
            "count": self.count,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> IntensityReference:
        """The inverse of `as_record`.

        Raises:
            ValueError: no such record.
        """
        try:
            mean = np.array(record["mean"], np.float64)
            covariance = np.array(record["covariance"], np.float64)
            reference = cls(mean, covariance, float(record["limit"]), int(record["count"]))
            size = len(_QUANTILES) + 3
            valid = mean.shape == (size,) and covariance.shape == (size, size)
            valid = valid and record["format"] == 1 and reference.limit > 0
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError("no statistics of intensities; write them by training again")
        return reference

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        from enn_core.files.atomic import replacing

        with replacing(Path(path)) as temporary:
            text = json.dumps(sealed(self.as_record()))
            temporary.write_text(text + "\n", encoding="ascii")

    @classmethod
    def load(cls, path: Path | str) -> IntensityReference:
        """Read what `save` wrote.

        Raises:
            ValueError: no such document.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="ascii"))
            check_seal(record)
            return cls.from_record(record)
        except DigestError as error:
            raise ValueError(f"{path} {error}; write it by training again") from None
        except (TypeError, ValueError):
            text = "no statistics of intensities; write them by training again"
            raise ValueError(f"{path}: {text}") from None


# --- picture -----------------------------------------------------------------------------------


def save_picture(image: np.ndarray, path: Path | str, *, scale: int = 3) -> None:
    """Three planes of a registered brain as a PNG, the template's outline over them.

    Args:
        image: (99, 117, 95) uint8, as `Prepared.image`.
        path: PNG file.
        scale: pixels per voxel.
    """
    from PIL import Image, ImageDraw

    from enn_core.files.atomic import replacing

    mask = load_template()[1]
    centre = (49, 62, 38)
    panels = []
    for axis in (2, 1, 0):
        plane = np.take(image, centre[axis], axis).T[::-1]
        outline = _outline(
            np.repeat(np.repeat(np.take(mask, centre[axis], axis).T[::-1], scale, 0), scale, 1)
        )
        grey = Image.fromarray(plane).resize(
            (plane.shape[1] * scale, plane.shape[0] * scale), Image.Resampling.BICUBIC
        )
        pixels = np.array(grey.convert("RGB"))
        pixels[outline] = (230, 120, 30)
        panels.append(pixels)
    height = max(panel.shape[0] for panel in panels)
    width = sum(panel.shape[1] for panel in panels)
    sheet = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(sheet)
    left = 0
    for panel, sides in zip(panels, ("LR", "LR", "PA"), strict=True):
        top = (height - panel.shape[0]) // 2
        sheet.paste(Image.fromarray(panel), (left, top))
        draw.text((left + 4, height - 14), sides[0], fill=(255, 255, 255))
        draw.text((left + panel.shape[1] - 12, height - 14), sides[1], fill=(255, 255, 255))
        left += panel.shape[1]
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch what is outside of it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
