"""Pictures that are gone, so many that their disk may be: their index is kept."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from retrieval.ignore import Ignored
from retrieval.images import is_picture, scan
from retrieval.index.catalog import Entry
from retrieval.index.manifest import PicturesGone

__all__ = ["refusal", "refuse_to_discard", "too_many"]

# More than this many gone, and more than this share of all, are taken for a disk that is not there.
_MANY_GONE = 100
_SHARE_GONE = 0.25


def too_many(gone: int, known: int) -> bool:
    """Whether so many of the known images are gone that their disk may be."""
    return gone > 0 and (gone == known or gone > max(_MANY_GONE, _SHARE_GONE * known))


def refusal(gone: int, known: int, options: str = "--prune") -> PicturesGone:
    """The error that says so; `options` of `enn search index` insist."""
    return PicturesGone(
        f"{gone:,} of the index's {known:,} pictures are gone, so the index keeps them: "
        f"see that their disk is there, or drop them by `enn search index {options}`"
    )


def refuse_to_discard(
    indexed: Iterable[Entry], known: Path | None, root: Path, ignored: Ignored
) -> None:
    """Refuse to build an index anew where that would lose it to a disk that is not there.

    New pictures of the same sizes pass for moved ones. Whoever names another folder than the
    index's, which is there, means that one, unless no picture is in it.

    Args:
        indexed: images of the index that would be discarded.
        known: its photo folder.
        root: the folder to be indexed then.
        ignored: what is left out of it.

    Raises:
        PicturesGone: if too much is gone.
        NotADirectoryError: if root cannot be listed.
    """
    found = {file.path: file for file in scan(root, lambda *_: None, ignored)}
    pictures = (file.size for file in found.values() if file.named or is_picture(root / file.path))
    is_another = known is not None and known.is_dir() and not os.path.samefile(known, root)
    if is_another and next(pictures, None) is not None:
        return
    count = 0
    lost: Counter[int | None] = Counter()
    for entry in indexed:
        if entry.path in found:
            del found[entry.path]
        elif ignored.hides(entry.path):
            continue
        else:
            lost[entry.size] += 1
        count += 1
    # The folder is looked through for others only where that matters.
    gone = lost.total()
    if too_many(gone, count):
        gone = (lost - Counter(pictures)).total()
    if too_many(gone, count):
        raise refusal(gone, count, "--rebuild --prune")
