"""A trained brain-age model: one or several networks, their target, intervals and bias correction.

One safetensors file holds everything: plain (fused) weights that eigen layers factor again exactly,
and as metadata the JSON that says what the networks are and what they were trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.convert import fuse
from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.files.tensors import (
    TensorFileError,
    read_metadata,
    read_stored,
    read_tensors,
    write_tensors,
)
from neuro.age.calibrate import BiasCorrection, Conformal
from neuro.age.networks import BrainNet, build
from neuro.age.population import GRID, Population
from neuro.age.targets import AgeBins, AgeValue, Target, make_target, target_settings
from neuro.scans.grid import as_input
from neuro.scans.quality import IntensityReference

__all__ = [
    "BrainAgeModel",
    "Member",
    "ModelError",
    "Prediction",
    "answer",
    "both_sides",
    "by_head",
    "features_of",
    "last_inputs",
    "weights_sha256",
]

FORMAT: Content = Content()
"""Steps from older descriptions to today's. They leave alone what `weights_sha256` reads: what a
site was taught belongs to it."""
_BATCH = 4
_POPULATION = "population."

Answer = Literal["mean", "last"]


class ModelError(ValueError):
    """A weights file that is not a brain-age model of this version."""


@dataclass(frozen=True)
class Member:
    """One network and the target that reads its heads."""

    net: BrainNet
    target: Target


@dataclass(frozen=True)
class Prediction:
    """What a model says of n brains.

    Attributes:
        ages: (n,) years.
        by_head: (n, members, heads) years.
    """

    ages: np.ndarray
    by_head: np.ndarray


@dataclass
class BrainAgeModel:
    """Networks that answer together.

    Attributes:
        members: at least one; the answer is their mean.
        answer: of each member: "mean" of all heads, or the "last" head.
        conformal: residuals that intervals come from, if there are any.
        bias: a fitted correction that may be applied on demand, never by `predict`.
        about: JSON of how it was trained: configuration, subjects, ages, scores, licence.
        reference: of the training scans' intensities, to tell scans that are unlike them.
        population: what the last blocks make of the training scans, which teaching protects.
    """

    members: Sequence[Member]
    answer: Answer = "mean"
    conformal: Conformal | None = None
    bias: BiasCorrection | None = None
    about: dict[str, Any] = field(default_factory=dict)
    reference: IntensityReference | None = None
    population: Population | None = None

    def predict(self, volumes: np.ndarray, mirror: bool = True) -> Prediction:
        """Ages of brains, raw: without bias correction.

        Args:
            volumes: (n, 80, 96, 80) uint8 as `BrainDataset` holds them; other sizes work as well.
            mirror: average with the prediction for the left-right mirror image.
        """
        said: list[list[np.ndarray]] = [[] for _ in self.members]
        for batch in np.array_split(volumes, max(1, -(-len(volumes) // _BATCH))):
            x = torch.from_numpy(as_input(batch))
            read: dict[str, Tensor] = {}  # stems have no parameters: those alike give the same
            for member, parts in zip(self.members, said, strict=True):
                stem = member.net.stem
                if repr(stem) not in read:
                    with torch.no_grad():
                        read[repr(stem)] = stem(x)
                with evaluating(member.net):
                    parts.append(by_head(member.net, member.target, read[repr(stem)], mirror))
        heads = np.stack([np.concatenate(parts) for parts in said], axis=1)
        return Prediction(answer(heads, self.answer).mean(1), heads)

    def save(self, path: Path | str) -> Path:
        """Write the model, in one atomic step."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        members = []
        for number, member in enumerate(self.members):
            if not isinstance(member.target, (AgeValue, AgeBins)):
                raise ModelError(f"target {type(member.target).__name__} has no form on disk")
            for name, value in fuse(member.net).state_dict().items():
                tensors[f"{number}.{name}"] = value.float()
            members.append(
                {"network": member.net.settings, "target": target_settings(member.target)}
            )
        content = {
            "format": FORMAT.number,
            "members": members,
            "answer": self.answer,
            **self._surroundings(),
        }
        tensors |= self._population_tensors()
        write_tensors(path, tensors, {"model": json.dumps(content)})
        return path

    def save_beside(self, source: Path | str, path: Path | str) -> Path:
        """Write the weights of `source`, bit by bit, with this model's intervals and descriptions.

        `save` would round eigen layers anew, and site profiles of `source` would not fit.

        Args:
            source: file that this model was loaded from.
            path: to write; may be `source`.
        """
        content, tensors = _read(Path(source))
        content.update(self._surroundings())
        tensors = {k: value for k, value in tensors.items() if not k.startswith(_POPULATION)}
        tensors |= self._population_tensors()
        write_tensors(Path(path), tensors, {"model": json.dumps(content)})
        return Path(path)

    def _population_tensors(self) -> dict[str, Tensor]:
        own = {} if self.population is None else self.population.to_tensors()
        return {f"{_POPULATION}{name}": value for name, value in own.items()}

    def _surroundings(self) -> dict[str, Any]:
        return {
            "residuals": list(self.conformal.residuals) if self.conformal else None,
            "bias": self.bias.to_dict() if self.bias else None,
            "about": self.about,
            "reference": self.reference.as_record() if self.reference else None,
        }

    @classmethod
    def load(cls, path: Path | str) -> BrainAgeModel:
        """Read a model that `save` wrote.

        Raises:
            ModelError: the file is damaged, of another kind or format, or its weights do not fit.
            FileNotFoundError: there is none.
        """
        content, tensors = _read(Path(path))
        members = []
        for number, stored in enumerate(content["members"]):
            prefix = f"{number}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            net = build(**stored["network"])
            try:
                net.load_state_dict(own)
            except RuntimeError as error:
                raise ModelError(
                    f"{path}: the weights of network {number + 1} do not fit its description "
                    f"({' '.join(str(error).split())[:160]})"
                ) from None
            members.append(Member(net.eval(), make_target(stored["target"])))
        residuals, bias = content["residuals"], content["bias"]
        # Files of the first version have no reference.
        reference = content.get("reference")
        return cls(
            members,
            content["answer"],
            Conformal(tuple(residuals)) if residuals else None,
            BiasCorrection(**bias) if bias else None,
            content["about"],
            IntensityReference.from_record(reference) if reference else None,
            _population(tensors, path),
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a model file."""
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}")
    try:
        tensors = read_tensors(path)
        content = json.loads(read_metadata(path).get("model", "{}"))
    except TensorFileError as error:
        raise ModelError(str(error)) from None
    except ValueError as error:
        raise ModelError(f"{path}: its description is damaged ({error})") from None
    if "format" not in content:
        raise ModelError(
            f"{path}: got format None, this version reads {FORMAT.number}; is it a model that "
            "`enn brain train` wrote?"
        )
    try:
        return upgraded(content, content["format"], FORMAT), tensors
    except FormatError as error:
        raise ModelError(f"{path}: the model {error}") from None


def _population(tensors: dict[str, Tensor], path: Path | str) -> Population | None:
    """The statistics in a file; None in files without them, which are older."""
    own = {
        name.removeprefix(_POPULATION): value
        for name, value in tensors.items()
        if name.startswith(_POPULATION)
    }
    try:
        return Population.from_tensors(own) if own else None
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None


def answer(by_head: np.ndarray, kind: Answer) -> np.ndarray:
    """(..., heads) years -> (...) years."""
    return by_head.mean(-1) if kind == "mean" else by_head[..., -1]


@torch.no_grad()
def by_head(net: BrainNet, target: Target, inputs: Tensor, mirror: bool = True) -> np.ndarray:
    """Ages by each head of a network.

    Args:
        net: in evaluation mode.
        target: reads its heads.
        inputs: (n, ...) as the first block reads them, `net.stem(volumes)`.
        mirror: average the head's output with that for the left-right mirror image.

    Returns:
        (n, heads) years, float64.
    """
    rows = []
    for part in inputs.split(_BATCH):
        part = part.float()
        said = [target.ages(p) for p in net.heads_say(part)]
        if mirror:
            other = [target.ages(p) for p in net.heads_say(part.flip(2))]
            said = [(a + b) / 2 for a, b in zip(said, other, strict=True)]
        rows.append(torch.stack(said, dim=1))
    return torch.cat(rows).double().numpy()


@torch.no_grad()
def both_sides(net: BrainNet, target: Target, inputs: Tensor) -> tuple[np.ndarray, Tensor]:
    """`by_head` of few scans, with what the last block reads of them (unmirrored).

    Args:
        net: in evaluation mode.
        target: reads its heads.
        inputs: (n, ...) as the first block reads them, `net.stem(volumes)`.

    Returns:
        (n, heads) years, float64, and (n, channels, i, j, k) float32.
    """
    mirrored, _ = net.run(inputs.flip(2))
    said, last = net.run(inputs)
    ages = torch.stack([target.ages(head) for head in (*mirrored, *said)], dim=1)
    other, own = ages.chunk(2, dim=1)
    return ((own + other) / 2).double().numpy(), last


@torch.no_grad()
def last_inputs(model: BrainAgeModel, volume: np.ndarray) -> np.ndarray:
    """What the last block of each member reads of one brain (not of its mirror image).

    Args:
        model: networks of one architecture.
        volume: (i, j, k) uint8 as `BrainDataset` holds it.

    Returns:
        (members, channels, i, j, k) float16.
    """
    x = torch.from_numpy(as_input(volume[None]))
    parts = []
    for member in model.members:
        with evaluating(member.net):
            parts.append(member.net.block_input(x, -1)[0].half().numpy())
    return np.stack(parts)


@torch.no_grad()
def features_of(model: BrainAgeModel, block_inputs: np.ndarray) -> np.ndarray:
    """What the last block of every member makes of one scan.

    Args:
        model: the networks.
        block_inputs: (members, channels, i, j, k), `Seen.block_inputs`.

    Returns:
        (d,) float32.
    """
    parts = []
    for member, inputs in zip(model.members, block_inputs, strict=True):
        # One scan at a time: other sizes of a batch give other bits.
        h = torch.from_numpy(np.asarray(inputs, np.float32))[None]
        last = member.net.blocks[-1].block(h)  # type: ignore[operator]
        parts.append(F.adaptive_avg_pool3d(last.float(), GRID).flatten())
    return torch.cat(parts).numpy()


def weights_sha256(path: Path | str) -> str:
    """Hash of a model file's networks and weights, whatever else its description says.

    Raises:
        ModelError: no safetensors file.
    """
    path = Path(path)
    try:
        stored = read_stored(path)
        said = json.loads(read_metadata(path)["model"])
        digest = hashlib.sha256(json.dumps([said["members"], said["answer"]]).encode())
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: no intact safetensors file of a brain-age model") from None
    for name in sorted(stored):
        if not name.startswith(_POPULATION):
            dtype, shape, values = stored[name]
            digest.update(json.dumps([name, dtype, shape]).encode())
            digest.update(values)
    return digest.hexdigest()


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)
