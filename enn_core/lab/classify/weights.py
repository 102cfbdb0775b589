"""Weights files of classifiers: plain checkpoints in, plain and eigen safetensors out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from enn_core.files import tensors
from enn_core.lab.classify.config import ClassifyError
from enn_core.lab.classify.datasets import ImageData
from enn_core.lab.classify.networks import build_network

__all__ = ["load_classifier", "load_plain", "own_names", "save_network"]

_HEADS = ("fc", "head", "heads", "classifier")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name, of a .safetensors file or one that torch saved (no code is run).

    Raises:
        ClassifyError: it is missing, damaged, or holds something else.
    """
    if not file.is_file():
        raise ClassifyError(f"there is no weights file '{file}'; give a .safetensors or .pt file")
    try:
        state = tensors.read_weights(file)
    except (OSError, tensors.TensorFileError) as error:
        raise ClassifyError(f"cannot read the weights file: {error}") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ClassifyError(f"'{file}' holds no state dict; give one of the plain network")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_plain(model: nn.Module, file: Path) -> list[str]:
    """Load a plain checkpoint; a classification head of another number of classes is left out.

    Returns:
        Names of the head's tensors that were left as they are.

    Raises:
        ClassifyError: it is an eigen file, or of another network.
    """
    state = read_weights(file)
    if any(name.endswith(".Lambda") for name in state):
        raise ClassifyError(
            f"'{file}' holds eigen layers; give the plain weights, which `enn fuse` makes of it"
        )
    mine = model.state_dict()
    fresh = [
        name
        for name, value in state.items()
        if name in mine
        and name.partition(".")[0] in _HEADS
        and value.shape[1:] == mine[name].shape[1:]
        and value.shape[0] != mine[name].shape[0]
    ]
    kept = {name: value for name, value in state.items() if name not in fresh}
    missing = sorted(set(mine) - set(state))
    unexpected = sorted(set(state) - set(mine))
    shapes = [n for n in kept if n in mine and kept[n].shape != mine[n].shape]
    for what, names in (("lacks", missing), ("also has", unexpected), ("differs in", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ClassifyError(
                f"'{file}' is of another network than --arch: it {what} "
                f"{', '.join(names[:3])}{more}"
            )
    model.load_state_dict({**{name: mine[name] for name in fresh}, **kept})
    return fresh


def own_names(state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """A trained network's plain state under the names of its architecture, if it has those.

    A rule's network is a sequence of parts, in which tensors have the names that they have in the
    model from which the parts are cut.
    """
    inner = {name.partition(".")[2]: value for name, value in state.items()}
    fits = set(inner) == names and len(inner) == len(state) and set(state) != names
    return inner if fits else dict(state)


def save_network(file: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, all or nothing; `about` becomes its metadata, as JSON."""
    tensors.write_tensors(file, state, {"classifier": json.dumps(dict(about))})


def about_network(arch: str, data: ImageData, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What it takes to build a network again and to feed it."""
    return {
        "arch": arch,
        "shape": list(shape),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def load_classifier(file: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The plain network that a run wrote to `model.safetensors`, ready to use.

    Returns:
        The network in evaluation mode, for images of pixels in [0, 1], less "mean" and divided by
        "std" per channel; and what is known of it: "arch", "shape" (C, H, W), "classes" (names),
        "mean", "std".

    Raises:
        ClassifyError: the file is missing or damaged, or no run wrote it.
    """
    file = Path(file)
    state = read_weights(file)
    try:
        about = json.loads(tensors.read_metadata(file)["classifier"])
        model = build_network(about["arch"], tuple(about["shape"]), len(about["classes"]))
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ClassifyError(
            f"'{file}' is no plain model of `enn train classifier`; give its model.safetensors"
        ) from error
    return model.eval(), about
