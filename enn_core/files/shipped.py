"""Weights and photos: beside the code in a clone, else in a package of their own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["NotInstalledError", "shipped"]

# Made by weights/pyproject.toml. Its files do not lie in the folders of the code: a folder
# `retrieval` without `__init__.py` would hide the package of an editable installation.
_PACKAGE = "eigen_suite_weights"


class NotInstalledError(ValueError):
    """The package of weights and photos is not there."""


def shipped(place: str, what: str, instead: str) -> Path:
    """A file or folder that comes with the code.

    Args:
        place: where it lies in the repository, as "apps/gallery".
        what: its name for people.
        instead: what to do without it.

    Raises:
        NotInstalledError: it is not here, with one line that says where it is to be had.
    """
    package = find_spec(_PACKAGE)
    apart = (package.submodule_search_locations if package is not None else None) or ()
    for root in (Path(__file__).parents[2], *apart):
        if (found := Path(root, place)).exists():
            return found
    raise NotInstalledError(
        f"{what} is not installed; it is in the package of weights and photos: "
        f"`pip install ./weights` in a clone of the repository, or {instead}"
    )
