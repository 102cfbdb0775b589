"""A temporary folder that goes with its server, or with the next one if the server was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows; there only a server that ends well cleans up
    fcntl = None  # type: ignore[assignment]

__all__ = ["make_private_folder"]

_LOCK = ".lock"


def make_private_folder(prefix: str) -> tuple[Path, IO[str]]:
    """Makes a folder that only this user can read, and removes those of servers that are gone.

    Args:
        prefix: of its name, the same for all servers of a kind.

    Returns:
        The folder, and a file that must stay open as long as it is in use.
    """
    _remove_orphans(Path(tempfile.gettempdir()), prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    lock = open(folder / _LOCK, "w", encoding="ascii")  # noqa: SIM115
    if fcntl is not None:
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _remove_orphans(parent: Path, prefix: str) -> None:
    """Folders of this user whose lock nobody holds: a process that dies lets go of its locks."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            info = os.lstat(folder)
            if info.st_uid != os.getuid() or folder.is_symlink():
                continue
            with open(folder / _LOCK, encoding="ascii") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
