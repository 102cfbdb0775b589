"""Weights and photos: beside the code in a clone, else in a package of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

__all__ = ["NotInstalledError", "ShippedDamage", "shipped"]

# Made by weights/pyproject.toml. Its files do not lie in the folders of the code: a folder
# `retrieval` without `__init__.py` would hide the package of an editable installation.
_PACKAGE = "eigen_suite_weights"


class NotInstalledError(ValueError):
    """The package of weights and photos is not there."""


class ShippedDamage(ValueError):
    """A file of the package of weights is not the one that was released with this code."""


def shipped(place: str, what: str, instead: str, sha256: Mapping[str, str] | None = None) -> Path:
    """A file or folder that comes with the code.

    Args:
        place: where it lies in the repository, as "apps/gallery".
        what: its name for people.
        instead: what to do without it.
        sha256: hex digests of its files by name, which is "" for the file itself. They are read
            whole each time: 24 MB in 23 ms.

    Raises:
        NotInstalledError: it is not here, with one line that says where it is to be had.
        ShippedDamage: a file has another digest.
        OSError: a file cannot be read.
    """
    package = find_spec(_PACKAGE)
    apart = (package.submodule_search_locations if package is not None else None) or ()
    for root in (Path(__file__).parents[2], *apart):
        if (found := Path(root, place)).exists():
            for name, wanted in (sha256 or {}).items():
                _check(found / name, wanted, what)
            return found
    raise NotInstalledError(
        f"{what} is not installed; it is in the package of weights and photos: "
        f"`pip install ./weights` in a clone of the repository, or {instead}"
    )


def _check(file: Path, wanted: str, what: str) -> None:
    content = file.read_bytes()
    if file.suffix == ".json":
        content = content.replace(b"\r\n", b"\n")  # git may have made them for Windows
    if hashlib.sha256(content).hexdigest() != wanted:
        raise ShippedDamage(
            f"{what} is damaged, or of another version: {str(file)!r} is not what was released "
            "with this code; get it anew: `git checkout` in a clone, else `pip install "
            "--force-reinstall ./weights` there"
        )
