"""What of a photo folder is left out: thumbnails and bins of systems, and what users name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

__all__ = ["FILE_NAME", "Ignored"]

FILE_NAME = ".ennignore"
"""File in a photo folder that names what is left out, in .gitignore's syntax."""

# Folders that systems fill with copies, thumbnails and deleted files. Others of them (.Trash-1000,
# .thumbnails, .@__thumb) are hidden, and left out as such.
_BY_DEFAULT = (
    *("@eaDir/", r"\#recycle/", r"\#snapshot/", "@sharebin/", "@tmp/"),  # Synology
    *("@Recycle/", "@Recently-Snapshot/"),  # QNAP
    *("~snapshot/", "lost+found/", "Thumbs/"),
    *("$RECYCLE.BIN/", "RECYCLER/", "System Volume Information/"),  # Windows
)


class Ignored:
    """The patterns of one photo folder: ours, then its `.ennignore`, then `patterns`.

    The last one that fits decides, so `!Thumbs/` takes back what is left out by default.

    Args:
        root: the photo folder.
        patterns: more of them, in .gitignore's syntax, relative to root.

    Raises:
        ValueError: if a pattern is none.
        OSError: if there is a `.ennignore` that cannot be read.
    """

    def __init__(self, root: str | os.PathLike[str], patterns: Sequence[str] = ()) -> None:
        try:
            # Names need not be UTF-8; Windows' editors begin files with a mark.
            text = Path(root, FILE_NAME).read_text("utf-8-sig", "surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            text = ""
        try:
            spec = GitIgnoreSpec.from_lines([*_BY_DEFAULT, *text.split("\n"), *patterns])
        except ValueError as error:
            raise ValueError(
                f"{error}; --exclude and {FILE_NAME} take the patterns of .gitignore, such as "
                "'raw/' or '*.gif'"
            ) from None
        self.leaves_out: Callable[[str], bool] = spec.match_file
        """Whether one entry is left out, its parents aside; takes its path relative to the root,
        with forward slashes, that of a folder with one at its end."""

    def hides(self, path: str) -> bool:
        """Whether a walk from the root does not come to a file, because of it or of a parent."""
        return any(
            self.leaves_out(path[: end + 1]) for end, sign in enumerate(path) if sign == "/"
        ) or self.leaves_out(path)
