"""A brain's age with its interval, what is odd about the scan, and what teaching needs of it.

>>> from neuro.scans.batch import prepare_scan                              # doctest: +SKIP
>>> brain = BrainAge.load()                                           # doctest: +SKIP
>>> prepared, _ = prepare_scan("scan.nii.gz")                         # doctest: +SKIP
>>> estimate = brain.estimate(brain.look(prepared))                   # doctest: +SKIP
>>> estimate.age, estimate.low, estimate.high                         # doctest: +SKIP
(61.2, 49.8, 72.6)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from enn_core.files.shipped import shipped
from neuro.age.calibrate import BiasCorrection, CalibrationError, Conformal
from neuro.age.model import BrainAgeModel, ModelError, answer, both_sides, weights_sha256
from neuro.scans.contrast import FITTED_TO, deviation
from neuro.scans.grid import as_input, crop, uncrop
from neuro.scans.preprocess import Prepared
from neuro.scans.quality import Flag, IntensityReference, judge, told_apart

__all__ = ["BrainAge", "Corrects", "Estimate", "Seen", "shipped_weights"]

ANY_AGE = (0.0, 120.0)
"""Trained ages of a model that does not tell them."""


class Corrects(Protocol):
    """What an estimate needs of a site profile (`neuro.teach.Site`)."""

    def corrections(self, seen: Sequence[Seen]) -> np.ndarray:
        """(n,) years to add to each `Seen.raw_age`."""
        ...


@dataclass(frozen=True)
class Seen:
    """One brain after the forward pass: all that is needed later on, never the scan itself.

    Attributes:
        name: for people.
        raw_age: the model's answer in years, the mean of both mirror images; nothing is corrected.
        by_head: (members, heads) years.
        block_inputs: (members, channels, i, j, k) float16, what the last block of each member
            reads of the brain (not of its mirror image).
        flags: what is odd about the scan.
        distance: of its intensities to the training scans', 1 is the farthest of these; NaN if the
            model does not know.
        age: of the person, if known, in years.
    """

    name: str
    raw_age: float
    by_head: np.ndarray
    block_inputs: np.ndarray
    flags: list[Flag]
    distance: float
    age: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What is said of one brain; years.

    Attributes:
        age: predicted, with what the site has taught, 0 or more; None if the scan is refused,
            unless any scan was asked for.
        low, high: ends of the interval around `age`; None where the model has too few residuals.
        raw: before the site's teaching, 0 or more.
        corrected: `age` without its bias on age, if that was asked for; None for a flagged scan,
            and where it or `age` lies beyond the trained ages: the bias is known of ordinary scans
            of these ages alone.
        gap: `age` minus the known age; None if it is not known.
        flags: gravest first.
        out_of_distribution: distance of the intensities, see `Seen`.
        error: why the scan is refused; "" if it is not.
        uncorrected: why there is no `corrected`, if a correction was asked for; "" if there is one.
    """

    age: float | None
    low: float | None
    high: float | None
    raw: float
    corrected: float | None
    gap: float | None
    flags: list[Flag]
    out_of_distribution: float
    error: str = ""
    uncorrected: str = ""


@dataclass(frozen=True)
class BrainAge:
    """A model with everything around it, loaded once; may be used by several threads.

    Attributes:
        model: the networks.
        reference: of the training scans' intensities; None if the file has none.
        sha256: of the networks and their weights: what site profiles belong to. Intervals,
            corrections and descriptions may change without a new one.
        trained_ages: youngest and oldest of the training scans.
    """

    model: BrainAgeModel
    reference: IntensityReference | None
    sha256: str
    trained_ages: tuple[float, float] = ANY_AGE

    @classmethod
    def load(cls, path: Path | str | None = None) -> BrainAge:
        """Read a model file of `enn brain train`; the shipped one by default.

        Raises:
            ModelError: it is damaged or no brain-age model.
            NotInstalledError: there is no shipped one here.
            FileNotFoundError: there is none.
        """
        path = shipped_weights() if path is None else Path(path)
        model = BrainAgeModel.load(path)
        ages = model.about.get("ages", ANY_AGE)
        return cls(model, model.reference, weights_sha256(path), (float(ages[0]), float(ages[1])))

    @torch.no_grad()
    def look(self, prepared: Prepared, *, name: str = "", age: float | None = None) -> Seen:
        """The forward pass: about 1 s on one core.

        Args:
            prepared: a brain on the template's grid.
            name: of the scan, for people.
            age: of the person in years, if known.
        """
        volume = crop(prepared.image)
        distance = math.nan
        if self.reference is not None:
            # As the reference was fitted: training sets are kept cropped.
            distance = self.reference.distance(uncrop(volume))
        flags = self.judge(prepared, distance, age)
        x = torch.from_numpy(as_input(volume[None]))
        said, read = [], []
        stems: dict[str, torch.Tensor] = {}  # without parameters: those alike give the same
        for member in self.model.members:
            stem = member.net.stem
            if repr(stem) not in stems:
                stems[repr(stem)] = stem(x)
            heads, last = both_sides(member.net, member.target, stems[repr(stem)])
            said.append(heads[0])
            read.append(last[0].half().numpy())
        heads = np.stack(said)
        if len({inputs.shape for inputs in read}) > 1:
            raise ModelError(
                "the model's networks differ in what their last block reads; give a model of one "
                "architecture"
            )
        raw = float(answer(heads, self.model.answer).mean())
        return Seen(name, raw, heads, np.stack(read), flags, distance, age)

    def judge(self, prepared: Prepared, distance: float, age: float | None) -> list[Flag]:
        """What is odd about a brain for this model, gravest first.

        Args:
            prepared: a brain on the template's grid.
            distance: of its intensities, `Seen.distance`.
            age: of the person in years, if known.
        """
        return judge(
            prepared.quality,
            image=prepared.image,
            distance=None if math.isnan(distance) else distance,
            contrast=(
                deviation(uncrop(crop(prepared.image))) if self.sha256 == FITTED_TO else None
            ),
            age=age,
            trained_ages=self.trained_ages,
        )

    def estimate(
        self,
        seen: Seen,
        *,
        site: Corrects | None = None,
        bias: BiasCorrection | None = None,
        confidence: float = 0.9,
        any_scan: bool = False,
    ) -> Estimate:
        """What is said of a brain.

        Args:
            seen: of `look`.
            site: what a scanner's labelled scans have taught.
            bias: correction for `Estimate.corrected`, which is None without it, and if it needs
                the person's age and that is not known.
            confidence: share of people whose age lies in the interval, 0 to 1.
            any_scan: give a number even where the scan is refused; its flags say why it is.

        Raises:
            CalibrationError: a confidence outside of 0..1.
        """
        raw = max(0.0, seen.raw_age)
        fatal = next((flag for flag in seen.flags if flag.fatal), None)
        if fatal is not None and not any_scan:
            return Estimate(
                None, None, None, raw, None, None, seen.flags, seen.distance, fatal.text
            )
        age = raw
        if site is not None:
            age = max(0.0, seen.raw_age + float(site.corrections([seen])[0]))
        low, high = interval(self.model.conformal, age, confidence)
        gap = None if seen.age is None else age - seen.age
        flags = list(seen.flags)
        if not any(flag.name == "age" for flag in flags):
            flags += self.beyond(age)
        if fatal is not None:
            text = (
                "no age is given of such a scan unless it is asked for: the number may mean nothing"
            )
            flags.insert(0, Flag("refused", text, fatal=True))
        corrected, why = self._corrected(age, seen.age, flags, bias)
        return Estimate(age, low, high, raw, corrected, gap, flags, seen.distance, uncorrected=why)

    def _corrected(
        self, age: float, known: float | None, flags: Sequence[Flag], bias: BiasCorrection | None
    ) -> tuple[float | None, str]:
        """`Estimate.corrected` and, without it, the reason."""
        if bias is None:
            return None, ""
        if flags:
            return None, "the scan or its age is flagged, and the bias is known of ordinary scans"
        if bias.needs_age and known is None:
            return None, f"{bias.method} needs the known age"
        without = float(bias.apply(np.array([age]), None if known is None else [known])[0])
        youngest, oldest = self.trained_ages
        if youngest <= without <= oldest:
            return without, ""
        return None, f"it would be beyond the trained ages, {youngest:.0f} to {oldest:.0f}"

    def beyond(self, age: float) -> list[Flag]:
        """What is odd about a predicted age: that the model has learnt from no such ages."""
        youngest, oldest = self.trained_ages
        if youngest <= age <= oldest:
            return []
        told, first, last = told_apart(age, youngest, oldest, digits=0)
        text = (
            f"the model has learnt from ages {first} to {last}, {told} lies "
            "beyond; for children and the very old it is not made"
        )
        return [Flag("predicted_age", text)]


def interval(
    conformal: Conformal | None, age: float, confidence: float
) -> tuple[float | None, float | None]:
    """Ends of the interval around an age; None, None if there are too few residuals for it.

    Raises:
        CalibrationError: a confidence outside of 0..1.
    """
    if not 0 < confidence < 1:
        raise CalibrationError(f"got confidence {confidence}, valid is between 0 and 1")
    if conformal is None or not conformal.suffices(confidence):
        return None, None
    low, high = conformal.interval([age], confidence)[0]
    return max(0.0, float(low)), float(high)


_SHIPPED_SHA256 = "147044a2de033f86d5bb937508fba3670d82709409ad6cc0729a00f0ec5e314d"


def shipped_weights() -> Path:
    """The model file that comes with the package.

    Raises:
        NotInstalledError: this installation has none.
        ShippedDamage: it has another one than this version was released with.
    """
    return shipped(
        "neuro/weights/brain-age-ixi.safetensors",
        "the brain-age model",
        "give a file of `enn brain train`",
        {"": _SHIPPED_SHA256},
    )
