"""Files and folders that are complete or not there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["clear_strays", "new_folder", "own_name", "replacing", "sync_folder"]

_OWN = re.compile(r"\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp$")
# What another machine left in a shared folder is dead after this: nothing is written for so long.
_DAY = 24 * 3600


@contextlib.contextmanager
def replacing(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `target`, which takes its place when the block ends well.

    What was written is on the disk before the rename, and the new name when this returns; after an
    error the old file is untouched and the temporary one is gone. What a killed process left of the
    same file is gone, too.

    Args:
        target: the file to write.
        shared: several processes may write it at once; the last one wins.
    """
    if shared:
        clear_strays(target.parent, f"{target.name}.")
    temporary = target.with_name(own_name(target.name) if shared else f"{target.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # some file systems cannot say it of folders
            sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its name when the block ends well.

    What killed processes left beside it is deleted.

    Args:
        target: must not exist, or be an empty folder, by then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_strays(target.parent, ".new.")
    new = target.parent / own_name(".new")
    new.mkdir(mode=0o700)
    try:
        yield new
        new.chmod(0o755)
        os.replace(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def own_name(begin: str) -> str:
    """A name for a temporary file or folder, that tells `clear_strays` whose it is."""
    return f"{begin}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def clear_strays(folder: Path, begin: str) -> None:
    """Delete what processes that are no more left under names of `own_name` that begin so."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _OWN.search(entry.name)
            if found is None or not entry.name.startswith(begin) or _lives(entry, *found.groups()):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _lives(entry: os.DirEntry[str], machine: str, process: str) -> bool:
    """Whether a temporary file may still be written."""
    if machine != _machine() or os.name == "nt":  # there, asking for a process would end it
        return time.time() - entry.stat(follow_symlinks=False).st_mtime < _DAY
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable, where the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
