"""Settings as data: named JSON files that come with a package, and the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["list_configs", "make_settings", "read_config"]

Settings = TypeVar("Settings")


def list_configs(folder: Path) -> dict[str, str]:
    """Names of the JSON files in a folder, and their "description"."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stem)
    return {file.stem: read_config(file, folder, ValueError)["description"] for file in files}


def read_config(name: str | Path, folder: Path, error: type[ValueError]) -> dict[str, Any]:
    """The JSON object of a named configuration, or of a .json file.

    Args:
        name: of a file in the folder without its ending, or any path that ends in .json.
        folder: of the named ones.
        error: raised in one line if there is no such file, or no JSON object in it.
    """
    path = Path(name)
    if path.suffix != ".json":
        path = folder / f"{name}.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        named = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
        raise error(
            f"no configuration {str(name)!r}; give one of {named}, or a .json file"
        ) from None
    except (OSError, ValueError, RecursionError) as caught:
        raise error(f"cannot read '{path}': {' '.join(str(caught).split())}") from caught
    if not isinstance(given, dict):
        raise error(f"'{path}' must hold a JSON object of settings")
    return given


def make_settings(
    cls: type[Settings], given: Mapping[str, Any], where: str, error: type[ValueError]
) -> Settings:
    """A settings dataclass from a JSON object.

    Args:
        cls: a dataclass with a default for every field; the defaults say which types are valid.
        given: field -> value.
        where: for errors.
        error: raised in one line for unknown fields and values of another type.
    """
    defaults = cls()
    valid = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(given) - set(valid))
    if unknown:
        raise error(f"{where}: unknown setting {', '.join(unknown)}; valid: {', '.join(valid)}")
    for key, value in given.items():
        default = getattr(defaults, key)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise error(f"{where}: {key} must be like {default!r}, got {value!r}")
    return cls(**given)
