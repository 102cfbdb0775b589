"""Directories of image towers that stand beside the frozen MiniLM text tower.

A directory holds `config.json`, whose "architecture" says what is built, and `model.safetensors`
with plain (fused) weights: the image tower, its last map `proj`, and the text map `text_mean` and
`text_proj`. `retrieval.load(DIRECTORY)` takes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from enn_core.files.atomic import replacing
from enn_core.files.digests import SEAL, DigestError, check_seal, sealed
from enn_core.files.tensors import read_tensors, write_tensors
from retrieval.model.mini_tower import MiniTower
from retrieval.model.minilm_tower import MINI, VIT, MiniLMTower
from retrieval.model.vit import VitTower

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "build_tower",
    "check_config",
    "load_mini",
    "load_tower",
    "read_config",
    "save_tower",
    "save_vit",
]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_TEXT = "all-MiniLM-L6-v2"


def save_tower(tower: MiniLMTower, directory: Path | str, config: Mapping[str, Any]) -> None:
    """Write a tower's plain weights and its configuration, each file in one atomic step.

    Args:
        tower: with or without eigen layers; written fused, in float32.
        directory: made if missing.
        config: what `build_tower` needs, and the tower's "preprocess".
    """
    from enn_core import fuse

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.float() for name, value in fuse(tower).state_dict().items()}
    write_tensors(directory / WEIGHTS, state)
    with replacing(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(sealed(config), indent=2) + "\n", encoding="utf-8")


def save_vit(tower: VitTower, directory: Path | str, config: Mapping[str, Any]) -> None:
    """Write a tower as a directory that `retrieval.load` takes.

    Args:
        tower: with or without eigen layers; written fused, in float32.
        directory: made if missing.
        config: "preprocess" (`Preprocess`'s fields; mean and std stay at 0.5) and whatever else is
            to be remembered, such as "training"; what the tower itself knows is filled in.
    """
    own = {
        "architecture": VIT,
        "vision": tower.vision,
        "dim": tower.text_proj.out_features,
        "text": "all-MiniLM-L6-v2",
        "context_length": 248,
    }
    save_tower(tower, directory, {**config, **own})


def read_config(directory: Path | str) -> dict[str, Any]:
    """The configuration in a directory, checked as far as that needs no network.

    Raises:
        ValueError: it cannot be read, or is of no known tower.
    """
    file = Path(directory) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{CONFIG} is nested too deeply") from None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} must hold a JSON object, got {type(config).__name__}")
    try:
        check_seal(config)
    except DigestError as error:
        raise ValueError(f"{CONFIG} {error}; if it was edited, delete its {SEAL!r}") from None
    check_config(config)
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what is not a configuration of a tower of this package.

    Raises:
        ValueError: saying which entry, and what is valid.
    """
    # The first directories of the mini did not name it.
    architecture = config.get("architecture", MINI if "hidden" in config else None)
    needed = {MINI: ("hidden", "dim"), VIT: ("vision", "dim")}
    if not isinstance(architecture, str) or architecture not in needed:
        raise ValueError(
            f"{CONFIG} has architecture {architecture!r}; valid: {', '.join(needed)}, "
            "or a directory of open_clip or of transformers' CLIPModel"
        )
    for key in needed[architecture]:
        if key not in config:
            raise ValueError(f"{CONFIG} of {architecture} lacks {key!r}")
    for key in ("hidden", "dim"):
        value = config.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65_536:
            raise ValueError(f"{key} must be a whole number in 1..65536, got {value!r}")
    if config.get("text", _TEXT) != _TEXT:
        raise ValueError(f"text must be {_TEXT!r}, got {config['text']!r}")


def build_tower(config: Mapping[str, Any]) -> MiniLMTower:
    """A tower with random weights.

    Args:
        config: "architecture" with its options: "hidden" and "dim" for long-eclip-mini, "vision"
            and "dim" for vit-minilm.

    Raises:
        ValueError: for anything else.
    """
    check_config(config)
    if config.get("architecture", MINI) == MINI:
        return MiniTower(hidden=config["hidden"], dim=config["dim"])
    return VitTower(config["vision"], dim=config["dim"])


def load_tower(directory: Path | str, device: str | torch.device = "cpu") -> MiniLMTower:
    """Read a tower written by `save_tower`, in evaluation mode, with plain layers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration is not valid, or the weights do not fit it.
    """
    file = Path(directory) / WEIGHTS
    config = read_config(directory)
    state = {name: value.float() for name, value in read_tensors(file).items()}
    # No weights are drawn just to be overwritten, nor memory taken for what the file does not hold.
    with torch.device("meta"):
        tower = build_tower(config)
    try:
        tower.load_state_dict(state, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[:2]]
        raise ValueError(f"{file} does not fit {CONFIG} beside it: {' '.join(lines)}") from error
    return tower.eval().to(device)


def load_mini(directory: Path | str, device: str | torch.device = "cpu") -> MiniTower:
    """Read the mini's directory, in evaluation mode, with plain layers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is of another tower, or the weights do not fit the configuration.
    """
    tower = load_tower(directory, device)
    if not isinstance(tower, MiniTower):
        raise ValueError(f"{directory} holds a {type(tower).__name__}, not a long-eclip-mini")
    return tower
