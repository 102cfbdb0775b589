"""A consistent copy of an index and of what was taught on it, made while others use them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enn_core.files.atomic import new_folder, sync_folder
from enn_core.files.digests import Damage
from enn_core.files.sqlite import connect
from enn_core.lessons.check import check_journal
from enn_core.lessons.journal_file import copy_journal
from retrieval.index import manifest as manifests
from retrieval.index.catalog import FILE_NAME, Catalog
from retrieval.index.check import check_index
from retrieval.index.manifest import IndexCorrupt, Manifest, NoIndex
from retrieval.index.writer import Writer, damage, read_root
from retrieval.teach.profiles import journal_of_weights, profiles_dir

__all__ = ["PROFILES", "Backup", "back_up"]

PROFILES = "profiles"
"""Folder of the journals in a copy, in the form of `profiles_dir`."""

# Writers replace the files of a snapshot now and then, never many times in a row.
_TRIES = 20
_PATIENCE = 30.0


@dataclass(frozen=True)
class Backup:
    """What a copy holds.

    Attributes:
        images: that are searchable.
        profiles: SCOPE/NAME of each.
        damage: of profiles; they are copied as they are.
        bytes: of all files.
    """

    images: int
    profiles: list[str]
    damage: list[Damage]
    bytes: int


def back_up(folder: Path, target: Path) -> Backup:
    """Copy an index as it is at one moment, and each profile of its model as it is at another.

    The copy is an index of the same photo folder, and is checked before it gets its name.

    Args:
        folder: the index directory.
        target: of the copy; must not exist, or be an empty folder.

    Raises:
        NoIndex: there is no index.
        IndexMismatch: it is of a newer version.
        IndexCorrupt: it is damaged; `enn check` tells more.
        JournalError: a profile cannot be read at all.
        OSError: the copy cannot be written, or would lie inside the index.
    """
    if not (folder / manifests.FILE_NAME).is_file():
        raise NoIndex(f"there is no index in {str(folder)!r}; give an index or an indexed folder")
    if folder.resolve() in (target.resolve(), *target.resolve().parents):
        raise OSError(
            errno.EINVAL,
            f"{str(target)!r} lies inside the index that is copied; give a folder elsewhere, on "
            "another disk if you can",
        )
    manifest = Manifest.read(folder)
    with new_folder(target) as new:
        shutil.copy(folder / manifests.FILE_NAME, new / manifests.FILE_NAME)
        with damage(folder):
            root = _copy_index(folder, new)
        found = check_index(new)
        if found:
            what = found[0].part or Path(found[0].file).name
            raise IndexCorrupt(
                f"the index in {str(folder)!r} is damaged ({what}: {found[0].lost}), so no copy is "
                "made; `enn check --repair` puts right what can be"
            )
        with Writer(new, manifest) as writer:
            if root is not None:
                # In full: it may be known by its place beside the index.
                writer.set_root(root)
            images = writer.catalog.counts()["indexed"]
        profiles, broken = _copy_profiles(manifest.weights, new / PROFILES)
        size = _sync(new)
    return Backup(images, profiles, broken, size)


def _copy_index(folder: Path, new: Path) -> Path | None:
    """Copy the catalog and the files that it names; returns the photo folder."""
    missing: list[str] = []
    for _ in range(_TRIES):
        with contextlib.closing(Catalog.open(folder)) as catalog, contextlib.ExitStack() as stack:
            with catalog.reading():
                names = [name for name in (catalog.snapshot() or ())[:2] if name is not None]
                files: list[Any] = []
                try:
                    # Once open they stay readable, even if a writer deletes them.
                    files = [stack.enter_context(open(folder / name, "rb")) for name in names]
                except FileNotFoundError:  # a newer snapshot may have been published just now
                    missing = names
                    continue
                copy = stack.enter_context(
                    contextlib.closing(connect(new / FILE_NAME, "rwc", patience=_PATIENCE))
                )
                catalog.copy_to(copy)
                root = read_root(catalog, folder)
            for name, file in zip(names, files, strict=True):
                with open(new / name, "wb") as out:
                    shutil.copyfileobj(file, out, 2**20)
            return root
    raise IndexCorrupt(
        f"the index in {str(folder)!r} lacks a file of {', '.join(missing)}; `enn check` tells more"
    )


def _copy_profiles(weights: str, target: Path) -> tuple[list[str], list[Damage]]:
    names, broken = [], []
    for source in sorted(profiles_dir().glob(f"*/*/{journal_of_weights(weights)}")):
        place = source.relative_to(profiles_dir())
        copy = target / place
        copy.parent.mkdir(parents=True, mode=0o700)
        copy_journal(source, copy, _PATIENCE)
        broken += check_journal(copy)
        names.append(place.parent.as_posix())
    return names, broken


def _sync(new: Path) -> int:
    """Put all files on the disk; returns their bytes."""
    size = 0
    for top, _, names in os.walk(new, topdown=False):
        for name in names:
            with open(Path(top, name), "rb") as file:
                os.fsync(file.fileno())
                size += os.fstat(file.fileno()).st_size
        sync_folder(Path(top))
    return size
