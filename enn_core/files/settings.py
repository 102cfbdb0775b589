"""Settings as data: named JSON files that come with a package, and the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Checks", "list_configs", "make_settings", "read_config"]

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


class Checks:
    """Refuses values of a settings object, in one line that says what is valid.

    Args:
        settings: with a number, a text or a list under each name.
        error: raised.
    """

    def __init__(self, settings: Any, error: type[ValueError]) -> None:
        self._values = settings
        self._error = error

    def one_of(self, name: str, valid: Sequence[str]) -> None:
        """A text that is one of these."""
        self._each([name], lambda given: given in valid, f"must be one of {', '.join(valid)}")

    def at_least_one(self, *names: str) -> None:
        """Numbers from 1."""
        self._each(names, lambda given: given >= 1, "must be at least 1")

    def not_negative(self, *names: str) -> None:
        """Numbers from 0."""
        self._each(names, lambda given: given >= 0, "must not be negative")

    def positive(self, *names: str) -> None:
        """Finite numbers above 0."""
        self._each(names, lambda given: 0 < given < float("inf"), "must be positive")

    def below_one(self, *names: str) -> None:
        """Numbers from 0 to below 1."""
        self._each(names, lambda given: 0 <= given < 1, "must be from 0 to below 1")

    def crop(self, name: str = "crop") -> None:
        """Smallest and largest share of a picture, or an empty list."""
        self._each(
            [name],
            lambda given: not given or (len(given) == 2 and 0 < given[0] <= given[1] <= 1),
            "must be [smallest, largest] in 0..1 or []",
        )

    def randaugment(self, name: str = "randaugment") -> None:
        """Operations and their magnitude, or an empty list."""
        self._each(
            [name],
            lambda given: (
                not given
                or (
                    [type(each) for each in given] == [int, int]
                    and given[0] >= 1
                    and 0 <= given[1] <= 30
                )
            ),
            "must be [operations, magnitude 0..30] or []",
        )

    def _each(self, names: Sequence[str], fits: Callable[[Any], bool], wanted: str) -> None:
        for name in names:
            given = getattr(self._values, name)
            try:
                valid = fits(given)
            except TypeError:  # such as a text in a list of numbers
                valid = False
            if not valid:
                raise self._error(f"{name} {wanted}, got {given!r}")
