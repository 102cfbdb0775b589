"""Files and folders that are complete or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["new_folder", "replacing", "sync_folder"]


@contextlib.contextmanager
def replacing(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `target`, which takes its place when the block ends well.

    What was written is on the disk before the rename, and the new name when this returns; after an
    error the old file is untouched and the temporary one is gone.

    Args:
        target: the file to write.
        shared: several processes may write it at once; the last one wins.
    """
    own = f".{uuid.uuid4().hex}" if shared else ""
    temporary = target.with_name(f"{target.name}{own}.tmp")
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

    Args:
        target: must not exist, or be an empty folder, by then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        yield new
        new.chmod(0o755)
        os.replace(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable, where the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
