"""The reserve: room on the disk that is kept so that something can be forgotten when it is full.

SQLite needs room to delete. The reserve lies beside the journal; who forgets on a full disk deletes
it first, and it is made again when there is room.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from enn_core.files.atomic import replacing, sync_folder
from enn_core.files.sqlite import no_room_in

__all__ = ["make_reserve", "make_room", "reserve_file"]

SIZE = 2**19
"""Bytes: the log of a thousand erased entries, and what processes share of it."""
_FREE = 4 * SIZE  # below, others need the room more
_NEEDED = 2**17


def reserve_file(file: Path) -> Path:
    """Where the reserve of a journal lies."""
    return file.with_name(f"{file.name}.reserve")


def make_reserve(file: Path) -> None:
    """Make a journal's reserve, if there is room."""
    target = reserve_file(file)
    with contextlib.suppress(OSError):
        if target.exists() or shutil.disk_usage(file.parent).free < _FREE:
            return
        with replacing(target) as temporary:
            rights = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(os.open(temporary, rights, 0o600), "wb") as out:
                out.write(os.urandom(SIZE))  # some file systems keep no room for zeros


def make_room(file: Path) -> None:
    """Give the reserve up if the disk is full."""
    with contextlib.suppress(OSError):
        if reserve_file(file).exists() and no_room_in(file.parent, _NEEDED) is not None:
            reserve_file(file).unlink()
            sync_folder(file.parent)
