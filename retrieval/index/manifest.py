"""What an index is made of: the model it belongs to, and the errors of opening it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from enn_core.files.atomic import replacing
from enn_core.files.digests import SEAL, DigestError, check_seal, sealed
from enn_core.files.migrations import Content, FormatError, upgraded
from retrieval.eigen_coordinates import EigenBasis

__all__ = [
    "EmbeddingModel",
    "IndexCorrupt",
    "IndexExists",
    "IndexLocked",
    "IndexMismatch",
    "Manifest",
    "NoIndex",
    "repair_command",
]

FILE_NAME = "manifest.json"


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Format 2: the catalog's rows and the snapshots have checksums, which 0.1 would not keep."""
    return content


FORMAT: Content = Content(_sealed)
"""Steps from older manifests to today's. One that is for the other files of the directory changes
nothing in the manifest but its number: older versions then refuse the index."""

# Largest difference of a probe coordinate between two factorisations that count as the same. A
# flipped sign or a turned pair of components changes some coordinate by about 1/sqrt(d) > 0.01.
_PROBE_TOLERANCE = 1e-4


def repair_command(folder: Path) -> str:
    """What to type to have an index repaired."""
    return f"`enn check {shlex.quote(str(folder))} --repair`"


class NoIndex(FileNotFoundError):
    """There is no index in that directory."""


class IndexExists(FileExistsError):
    """There is an index in that directory already."""


class IndexMismatch(ValueError):
    """The index was built with another model or preprocessing, or from another folder."""


class IndexCorrupt(RuntimeError):
    """Files of the index are damaged or missing."""


class IndexLocked(RuntimeError):
    """Another process is writing the index."""


class PicturesGone(RuntimeError):
    """So many files of the index are missing that their disk may be: the index is kept."""


class EmbeddingModel(Protocol):
    """What the index asks of a model; `retrieval.model.loading.RetrievalModel` has it."""

    @property
    def basis(self) -> EigenBasis: ...

    @property
    def dim(self) -> int: ...

    @property
    def preprocess(self) -> Any: ...

    def fingerprint(self) -> dict[str, Any]: ...

    def image_vectors(self, pixels: npt.NDArray[np.uint8]) -> np.ndarray: ...


@dataclass(frozen=True)
class Manifest:
    """Written once when an index is created, never changed.

    Attributes:
        model: the name it was loaded by.
        weights: sha256 of the model's tensors.
        preprocess: hash of the preprocessing.
        dim: r, length of the stored vectors.
        probe: (r,) a fixed direction in eigen-coordinates. Another linear algebra library may
            factor the same weights with other signs; then it differs and the index is refused
            instead of answering nonsense.
        precision: "f32" or "bf16", what the image tower computed in. Rounded vectors are near the
            others, not equal: both in one index would score copies of a photo differently.
        created: UTC, ISO 8601.
        format: version of the directory's layout.
    """

    model: str
    weights: str
    preprocess: str
    dim: int
    probe: tuple[float, ...]
    precision: str = "f32"
    created: str = ""
    format: int = field(default_factory=lambda: FORMAT.number)

    @classmethod
    def of_model(cls, model: EmbeddingModel) -> Manifest:
        fingerprint = model.fingerprint()
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(
            model=str(fingerprint["model"]),
            weights=str(fingerprint["weights"]),
            preprocess=str(fingerprint["preprocess"]),
            dim=int(fingerprint["dim"]),
            probe=_probe(model.basis),
            precision=str(fingerprint.get("precision", "f32")),
            created=created,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """From `as_dict`'s result.

        Raises:
            IndexCorrupt: if fields are missing or of another type.
            IndexMismatch: if it is of a newer format.
        """
        try:
            check_seal(values)
            values = upgraded(values, int(values["format"]), FORMAT)
            return cls(
                model=str(values["model"]),
                weights=str(values["weights"]),
                preprocess=str(values["preprocess"]),
                dim=int(values["dim"]),
                probe=tuple(float(value) for value in values["probe"]),
                precision=str(values.get("precision", "f32")),
                created=str(values["created"]),
            )
        except FormatError as error:
            raise IndexMismatch(f"the index {error}") from None
        except DigestError as error:
            raise IndexCorrupt(f"the index's manifest {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise IndexCorrupt(f"the index's manifest is damaged ({error!r})") from None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of an index directory.

        Raises:
            NoIndex: if there is none.
            IndexCorrupt: if it cannot be understood.
        """
        try:
            values = _read(folder)
            if values.get("format") != 1 and SEAL not in values:
                raise IndexCorrupt("the index's manifest is damaged: it has no digest")
            return cls.from_dict(values)
        except IndexCorrupt as error:
            raise IndexCorrupt(f"{error}; {repair_command(folder)} restores it") from None

    @classmethod
    def bring_up_to_date(cls, folder: Path) -> str:
        """Rewrite a manifest of an older format; only the one writer may. Returns its text."""
        values = _read(folder)
        if values.get("format") != FORMAT.number:
            manifest = cls.from_dict(values)
            manifest.write(folder)
            return manifest.text()
        return json.dumps(values, indent=1)

    def write(self, folder: Path) -> None:
        """Write it into an index directory, complete or not at all."""
        with replacing(folder / FILE_NAME) as new:
            new.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """What `write` writes."""
        return json.dumps(sealed(self.as_dict()), indent=1)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "probe": [round(value, 7) for value in self.probe]}

    def check(self, other: Manifest, what: str) -> None:
        """Refuse to mix with vectors of another origin.

        Args:
            other: the manifest of a model or file.
            what: how to name it in the message.

        Raises:
            IndexMismatch: in one line, what differs and what to do.
        """
        remedy = "use the index's own model, or index the folder again into a new directory"
        if other.weights != self.weights or other.dim != self.dim:
            ours, theirs = self.model, other.model
            if ours == theirs:
                ours += f" (weights {self.weights[:8]}, {self.dim} numbers)"
                theirs += f" (weights {other.weights[:8]}, {other.dim} numbers)"
            raise IndexMismatch(
                f"the index was built with model {ours}, {what} is of {theirs}; {remedy}"
            )
        if other.preprocess != self.preprocess:
            raise IndexMismatch(
                f"the index was built with other image preprocessing than {what} "
                f"(hash {self.preprocess[:8]} against {other.preprocess[:8]}); {remedy}"
            )
        if other.precision != self.precision:
            raise IndexMismatch(
                f"the index was built in precision {self.precision}, {what} is in "
                f"{other.precision}; {remedy}"
            )
        if not _close(self.probe, other.probe):
            raise IndexMismatch(
                f"the index and {what} factor the same weights differently (another linear algebra "
                "library?); index the folder again into a new directory"
            )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise NoIndex(f"no index in {str(folder)!r}; build one with `enn search index`") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise IndexCorrupt(f"{str(path)!r} is damaged")
    return values


def _probe(basis: EigenBasis) -> tuple[float, ...]:
    direction = np.cos(0.5 + np.arange(basis.Q.shape[0], dtype=np.float64))
    direction /= np.linalg.norm(direction)
    return tuple(float(value) for value in direction @ basis.Q)


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=_PROBE_TOLERANCE))
