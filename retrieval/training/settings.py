"""Named training configurations: JSON files that come with the package, and the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from enn_core.files import settings

__all__ = ["TrainError", "list_configs", "make_settings", "read_config"]

_CONFIGS = Path(__file__).parent / "configs"

Settings = TypeVar("Settings")


class TrainError(ValueError):
    """A configuration or data set that cannot be trained on; one line."""


def list_configs() -> dict[str, str]:
    """Names of the shipped configurations, and what each is for."""
    return settings.list_configs(_CONFIGS)


def read_config(name: str | Path) -> dict[str, Any]:
    """The JSON object of a named configuration, or of a .json file.

    Besides the settings of its recipe it may hold "recipe" ("contrastive" if there is none) and
    "description".

    Raises:
        TrainError: if there is no such configuration, or its file cannot be read.
    """
    given = settings.read_config(name, _CONFIGS, TrainError)
    return {"recipe": "contrastive", "description": "", **given}


def make_settings(cls: type[Settings], given: Mapping[str, Any], where: str) -> Settings:
    """A settings dataclass from a JSON object; "recipe" and "description" are left out.

    Raises:
        TrainError: for unknown fields and ill-typed or invalid values.
    """
    values = {key: value for key, value in given.items() if key not in ("recipe", "description")}
    return settings.make_settings(cls, values, where, TrainError)
