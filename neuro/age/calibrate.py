"""Intervals around predicted ages, and corrections of their bias with age.

Intervals are split conformal: the quantile of absolute residuals on scans that the model has not
learnt from. Nine in ten intervals hold the age of people like those scans, whatever the model does.

Predicted ages regress to the mean: young brains look older, old ones younger. Three published
corrections exist; they are never applied unasked, since two of them use the age that is predicted.

>>> import numpy as np
>>> ages = np.array([20.0, 40, 60, 80])
>>> bias = BiasCorrection.fit(10 + 0.8 * ages, ages, "cole")
>>> round(bias.slope, 3), round(bias.intercept, 3)
(0.8, 10.0)
>>> bias.apply(np.array([42.0])).round(6)
array([40.])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from enn_core.files.digests import DigestError, check_seal, sealed
from enn_core.files.migrations import Content, FormatError, upgraded

__all__ = ["BiasCorrection", "Calibration", "CalibrationError", "Conformal", "Method", "coverage"]

Method = Literal["offset", "cole", "beheshti", "delange"]

FORMAT: Content = Content()
"""Steps from older files of a `Calibration` to today's."""

_ENOUGH = {"offset": 1, "cole": 3, "beheshti": 3, "delange": 3}


class CalibrationError(ValueError):
    """Labelled scans do not determine a calibration, or one is applied without what it needs."""


@dataclass(frozen=True)
class BiasCorrection:
    """A linear correction of predicted ages, fitted on scans of known age.

    - "offset": `prediction - intercept`, for another scanner with few labelled scans.
    - "cole" (Cole et al. 2018): prediction = slope x age + intercept is fitted; corrected =
      (prediction - intercept) / slope. Needs no age; errors grow by 1/slope.
    - "beheshti" (Beheshti et al. 2019): gap = slope x age + intercept is fitted; corrected =
      prediction - (slope x age + intercept).
    - "delange" (de Lange & Cole 2020): prediction = slope x age + intercept is fitted; corrected =
      prediction + age - (slope x age + intercept).

    The last two are the same map written twice; both take the true age, so the error of a corrected
    age says nothing of how well age is predicted.

    Attributes:
        method: see above.
        slope, intercept: as above, years.
        n: scans fitted on.
    """

    method: Method
    slope: float
    intercept: float
    n: int

    @classmethod
    def fit(
        cls,
        predicted: np.ndarray | Sequence[float],
        ages: np.ndarray | Sequence[float],
        method: Method = "cole",
    ) -> BiasCorrection:
        """Fit on predictions of scans that the model has not learnt from.

        Raises:
            CalibrationError: unknown method, too few scans, one age only, or no relation to age.
        """
        predicted, ages = _pair(predicted, ages)
        if method not in get_args(Method):
            raise CalibrationError(
                f"got correction {method!r}, valid are {', '.join(get_args(Method))}"
            )
        if len(ages) < _ENOUGH[method]:
            raise CalibrationError(
                f"{method} needs {_ENOUGH[method]} labelled scans or more, got {len(ages)}"
            )
        if method == "offset":
            return cls(method, 0.0, float(np.mean(predicted - ages)), len(ages))
        if np.ptp(ages) < 1:
            raise CalibrationError(
                f"the labelled scans span {np.ptp(ages):.1f} years; a slope needs a year or more, "
                "use offset"
            )
        wanted = predicted - ages if method == "beheshti" else predicted
        slope, intercept = (float(value) for value in np.polyfit(ages, wanted, 1))
        if method == "cole" and slope < 0.1:
            raise CalibrationError(
                f"predictions rise by {slope:.2f} years per year of age; dividing by that would "
                "invent differences, use offset"
            )
        return cls(method, slope, intercept, len(ages))

    @property
    def needs_age(self) -> bool:
        """Whether `apply` needs the true ages."""
        return self.method in ("beheshti", "delange")

    def apply(
        self, predicted: np.ndarray, ages: np.ndarray | Sequence[float] | None = None
    ) -> np.ndarray:
        """Corrected ages (n,).

        Raises:
            CalibrationError: the method needs ages and got none.
        """
        predicted = np.asarray(predicted, np.float64)
        if self.method == "offset":
            return predicted - self.intercept
        if self.method == "cole":
            return (predicted - self.intercept) / self.slope
        if ages is None:
            raise CalibrationError(f"{self.method} corrects by the true age; give it, or use cole")
        predicted, ages = _pair(predicted, ages)
        line = self.slope * ages + self.intercept
        return predicted - line if self.method == "beheshti" else predicted + ages - line

    def as_method(self, method: str) -> BiasCorrection:
        """The same fitted line, applied by another method.

        Raises:
            CalibrationError: unknown method, or there is no line in an offset.
        """
        if method == self.method:
            return self
        if method not in get_args(Method):
            raise CalibrationError(
                f"got correction {method!r}, valid are {', '.join(get_args(Method))}"
            )
        if "offset" in (method, self.method):
            raise CalibrationError(
                f"{method} cannot be made of a fitted {self.method}; fit it with "
                "`enn brain calibrate --method`"
            )
        slope = self.slope + {"beheshti": 1.0}.get(self.method, 0.0)
        return BiasCorrection(
            cast(Method, method), slope - {"beheshti": 1.0}.get(method, 0.0), self.intercept, self.n
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `BiasCorrection(**...)` reads it."""
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """Corrections of one or several sites for one model.

    Attributes:
        sites: name of the site -> its correction; "all" for all labelled scans together.
        weights: `BrainAge.sha256` of the model, "" if it is not known.
    """

    sites: Mapping[str, BiasCorrection]
    weights: str = ""

    def of(self, site: str | None, weights: str = "") -> BiasCorrection:
        """The correction of a site; of the only one, or of all together, if None.

        Args:
            site: its name.
            weights: of the model that predicts.

        Raises:
            CalibrationError: it is for another model, or there is no such site.
        """
        if self.weights and weights and self.weights != weights:
            raise CalibrationError(
                "the calibration was fitted for another model; fit one for this model with "
                "`enn brain calibrate`"
            )
        if site is None:
            site = next(iter(self.sites)) if len(self.sites) == 1 else "all"
        if site not in self.sites:
            raise CalibrationError(
                f"the calibration has no site {site!r}, it has {', '.join(self.sites)}; "
                "name one with --site"
            )
        return self.sites[site]

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        from enn_core.files.atomic import replacing

        document = {
            "format": FORMAT.number,
            "weights": self.weights,
            "sites": {name: bias.to_dict() for name, bias in self.sites.items()},
        }
        with replacing(Path(path)) as temporary:
            text = json.dumps(sealed(document), indent=2)
            temporary.write_text(text + "\n", encoding="ascii")

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CalibrationError: no such document.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="ascii"))
            check_seal(document)
            document = upgraded(document, document["format"], FORMAT)
            sites = {str(name): _correction(bias) for name, bias in document["sites"].items()}
            weights = str(document["weights"])
            valid = bool(sites)
        except FormatError as error:
            raise CalibrationError(f"{path}: the calibration {error}") from None
        except DigestError as error:
            raise CalibrationError(
                f"{path}: the calibration {error}; fit it again with `enn brain calibrate`"
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise CalibrationError(f"{path}: no calibration; make one with `enn brain calibrate`")
        return cls(sites, weights)


def _correction(record: Mapping[str, Any]) -> BiasCorrection:
    """`BiasCorrection(**record)`, if that is one.

    Raises:
        ValueError: it is none.
    """
    bias = BiasCorrection(
        record["method"], float(record["slope"]), float(record["intercept"]), int(record["n"])
    )
    finite = np.isfinite([bias.slope, bias.intercept]).all()
    if (
        bias.method not in get_args(Method)
        or not finite
        or (bias.method == "cole" and not bias.slope)
    ):
        raise ValueError
    return bias


@dataclass(frozen=True)
class Conformal:
    """Split-conformal intervals from absolute residuals.

    Attributes:
        residuals: predicted minus true ages of scans that the model has not learnt from, years.
    """

    residuals: tuple[float, ...]

    @classmethod
    def fit(
        cls, predicted: np.ndarray | Sequence[float], ages: np.ndarray | Sequence[float]
    ) -> Conformal:
        """From out-of-fold predictions of scans of known age."""
        predicted, ages = _pair(predicted, ages)
        return cls(tuple(round(float(r), 3) for r in predicted - ages))

    def suffices(self, confidence: float) -> bool:
        """Whether there are residuals enough for intervals of this confidence (0 to 1)."""
        return len(self.residuals) >= _needed(confidence)

    def interval(
        self, predicted: np.ndarray | Sequence[float], confidence: float = 0.9
    ) -> np.ndarray:
        """Lower and upper ends (n, 2), years.

        Raises:
            CalibrationError: a confidence outside of 0..1, or too few residuals for it.
        """
        from crepes import ConformalRegressor

        if not 0 < confidence < 1:
            raise CalibrationError(f"got confidence {confidence}, valid is between 0 and 1")
        if not self.suffices(confidence):
            raise CalibrationError(
                f"{confidence:.0%} intervals need {_needed(confidence)} residuals or more, got "
                f"{len(self.residuals)}"
            )
        regressor = ConformalRegressor().fit(residuals=np.array(self.residuals))
        predicted = np.asarray(predicted, np.float64)
        return np.asarray(regressor.predict_int(predicted, confidence=confidence))


def coverage(intervals: np.ndarray, ages: np.ndarray | Sequence[float]) -> float:
    """Share of ages inside of their intervals (n, 2)."""
    ages = np.asarray(ages, np.float64)
    return float(np.mean((intervals[:, 0] <= ages) & (ages <= intervals[:, 1])))


def _needed(confidence: float) -> int:
    return int(np.ceil(confidence / (1 - confidence)))


def _pair(
    predicted: np.ndarray | Sequence[float], ages: np.ndarray | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    predicted, ages = np.asarray(predicted, np.float64), np.asarray(ages, np.float64)
    if predicted.shape != ages.shape or predicted.ndim != 1:
        raise CalibrationError(
            f"got {predicted.shape} predicted and {ages.shape} true ages; give one of each per scan"
        )
    if not (np.isfinite(predicted).all() and np.isfinite(ages).all()):
        raise CalibrationError("an age is not finite; leave out scans without an age or prediction")
    return predicted, ages
