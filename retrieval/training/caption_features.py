"""Features of all captions by the frozen text tower: computed once, kept on disk.

One file for a set of texts, named by a hash of everything that decides its content; it appears
complete or not at all. While it is computed, the rows so far lie beside it, and a later run goes on
from there. Several processes may ask for the same texts: one computes, the others wait for it.
The file ends with a digest: what is damaged is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from enn_core.files.atomic import replacing
from enn_core.files.digests import check_seal, sealed
from retrieval.training.settings import TrainError

__all__ = ["text_features"]

# Texts between two notes of progress on disk: some seconds of work on two cores.
_CHUNK = 512
_PIECE = 2**20  # bytes hashed at once


def text_features(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    *,
    key: str,
    folder: Path,
    report: Callable[[str, int, int, str], None],
) -> npt.NDArray[np.float32]:
    """Features of texts, from disk if they are there. Equal texts are encoded once.

    Args:
        texts: M strings.
        encode: N texts -> (N, d).
        key: identifies what `encode` does.
        folder: where files of features are kept; made if missing.
        report: called with ("captions", texts done, texts in all, "").

    Returns:
        (M, d) float32, mapped from the file, read-only.

    Raises:
        TrainError: there are no texts, `encode` gives another shape or numbers that are not
            finite, or the folder cannot be written.
    """
    if not texts:
        raise TrainError("there are no captions to encode")
    digest = hashlib.sha256(json.dumps(key).encode())
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    file = folder / f"{digest.hexdigest()[:40]}.npy"
    try:
        found = _read(file, len(texts))
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "write.lock"):
                found = _read(file, len(texts))  # another process may have been faster
                if found is None:
                    _compute(texts, encode, file, report)
                    found = _read(file, len(texts))
    except OSError as error:
        raise TrainError(f"cannot keep the captions' features in {folder}: {error}") from error
    if found is None:
        raise TrainError(f"{file} cannot be read back: is the disk damaged?")
    return found


def _read(file: Path, rows: int) -> npt.NDArray[np.float32] | None:
    """The features in a complete file; None if there is none, or it is none of ours."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if array.ndim != 2 or len(array) != rows or array.dtype != np.float32:
        return None
    end = array.offset + array.nbytes  # of a memmap
    if file.stat().st_size == end:  # of an earlier version
        return array
    with file.open("rb") as opened:
        opened.seek(end)
        wanted = opened.read()
    if wanted != _digest(file, end):
        warnings.warn(f"{file} is damaged; the captions are encoded again", stacklevel=4)
        return None
    return array


def _digest(file: Path, end: int) -> bytes:
    """SHA-256 of the first bytes of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(min(_PIECE, end - opened.tell())):
            digest.update(piece)
    return digest.digest()


def _compute(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    file: Path,
    report: Callable[[str, int, int, str], None],
) -> None:
    """Fill `file`, going on from what an earlier run left."""
    number: dict[str, int] = {}
    which = np.array([number.setdefault(text, len(number)) for text in texts])
    unique = list(number)
    # Rows of texts[i], texts[i + 1], ... of the unique ones lie next to each other in `rows`.
    rows = np.argsort(which, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(which))])
    part, state = file.with_suffix(".part"), file.with_suffix(".json")
    done, array = _resume(part, state, len(texts), len(unique))
    if done:
        report("captions", done, len(unique), "")
    for start in range(done, len(unique), _CHUNK):
        chunk = unique[start : start + _CHUNK]
        features = np.asarray(encode(chunk), dtype=np.float32)
        if features.ndim != 2 or len(features) != len(chunk):
            raise TrainError(f"encode gave {features.shape} for {len(chunk)} texts")
        if not np.isfinite(features).all():
            raise TrainError("the text tower gives numbers that are not finite: damaged weights?")
        if array is None:
            state.unlink(missing_ok=True)  # that of another, lost part
            array = _create(part, (len(texts), features.shape[1]))
        end = start + len(chunk)
        mine = rows[starts[start] : starts[end]]
        array[mine] = features[which[mine] - start]
        array.flush()  # on the disk before the note of it
        with replacing(state) as temporary:
            note = json.dumps(sealed({"done": end, "chunk": _CHUNK}))
            temporary.write_text(note, encoding="utf-8")
        report("captions", end, len(unique), "")
    end = array.offset + array.nbytes
    del array  # Windows renames no file that is mapped
    with part.open("r+b") as opened:
        opened.truncate(end)  # a run that was killed here may have come further
        opened.seek(end)
        opened.write(_digest(part, end))
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)
    state.unlink()


def _create(part: Path, shape: tuple[int, int]) -> Any:
    array = np.lib.format.open_memmap(part, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):
        # A full disk is an error here; on writing to the mapping it would kill the process.
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _resume(part: Path, state: Path, rows: int, unique: int) -> tuple[int, Any]:
    """(unique texts done, array to go on in), (0, None) if there is nothing usable."""
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError, TypeError):
        noted = json.loads(state.read_text(encoding="utf-8"))
        check_seal(noted)
        array = np.lib.format.open_memmap(part, "r+")
        fits = array.ndim == 2 and len(array) == rows and array.dtype == np.float32
        if fits and noted["chunk"] == _CHUNK and 0 < int(noted["done"]) <= unique:
            return int(noted["done"]), array
    return 0, None
