"""Named training configurations: JSON files that come with the package, and the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["TrainError", "list_configs", "make_settings", "read_config"]

_CONFIGS = Path(__file__).parents[1] / "configs"

Settings = TypeVar("Settings")


class TrainError(ValueError):
    """A configuration or data set that cannot be trained on; one line."""


def list_configs() -> dict[str, str]:
    """Names of the shipped configurations, and what each is for."""
    return {file.stem: read_config(file)["description"] for file in sorted(_CONFIGS.glob("*.json"))}


def read_config(name: str | Path) -> dict[str, Any]:
    """The JSON object of a named configuration, or of a .json file.

    Besides the settings of its recipe it may hold "recipe" ("contrastive" if there is none) and
    "description".

    Raises:
        TrainError: if there is no such configuration, or its file cannot be read.
    """
    path = Path(name)
    if path.suffix != ".json":
        path = _CONFIGS / f"{name}.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        named = ", ".join(sorted(p.stem for p in _CONFIGS.glob("*.json")))
        raise TrainError(
            f"no training configuration {str(name)!r}; give one of {named}, or a .json file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise TrainError(f"cannot read {path}: {error}") from error
    if not isinstance(given, dict):
        raise TrainError(f"{path} must hold a JSON object of training options")
    return {"recipe": "contrastive", "description": "", **given}


def make_settings(cls: type[Settings], given: Mapping[str, Any], where: str) -> Settings:
    """A settings dataclass from a JSON object; "recipe" and "description" are left out.

    Args:
        cls: a dataclass with a default for every field; the defaults say which types are valid.
        given: field -> value.
        where: for errors.

    Raises:
        TrainError: for unknown fields and ill-typed or invalid values.
    """
    values = {key: value for key, value in given.items() if key not in ("recipe", "description")}
    defaults = cls()
    valid = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(valid))
    if unknown:
        raise TrainError(f"{where}: unknown {', '.join(unknown)}; valid: {', '.join(valid)}")
    for key, value in values.items():
        default = getattr(defaults, key)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise TrainError(f"{where}: {key} must be like {default!r}, got {value!r}")
    return cls(**values)
