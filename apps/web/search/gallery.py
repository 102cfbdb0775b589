"""The sample photos that come along: where they lie, and whose they are."""

from __future__ import annotations

import csv
from pathlib import Path

from enn_core.files.shipped import shipped

__all__ = ["credits_of", "gallery"]


def gallery() -> Path:
    """The folder of the sample photos, each of them the one that was released.

    Raises:
        NotInstalledError: they are not here.
        ShippedDamage: one is damaged, or of another version.
        OSError: one is missing.
    """
    what = "apps/gallery", "the sample gallery", "give a folder of pictures"
    # Photos of an older package have no digests beside them.
    rows = [row for row in _rows(shipped(*what)) if "sha256" in row]
    return shipped(*what, {row["file"]: row["sha256"] for row in rows})


def credits_of(folder: Path) -> dict[str, str]:
    """Author and licence of every photo by its name, which their licences ask to be shown."""
    return {row["file"]: f"{row['author']}, {row['licence']}" for row in _rows(folder)}


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "credits.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
