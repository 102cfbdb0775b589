"""Prepared brains on disk, named by everything that they depend on.

The name is a hash of the file's content, the input kind and the parameters with the versions of
what did the work: what is found is right, and nothing has to be invalidated.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np

from neuro.scans.preprocess import InputKind, Prepared, parameters
from neuro.scans.quality import Quality
from neuro.scans.template import MNI_SHAPE

__all__ = ["CacheDamage", "PrepCache", "default_cache_dir", "read_prepared"]

_FORMAT = 1


class CacheDamage(UserWarning):
    """An entry of a cache is damaged, and made again."""


def default_cache_dir() -> Path:
    """Where prepared brains of this user lie; the folder may be deleted at any time."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("eigen-suite", appauthor=False)) / "brain"


def read_prepared(path: Path) -> Prepared:
    """A brain that `PrepCache.add` kept.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is damaged.
    """
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            image = arrays["image"]
            record = json.loads(arrays["record"].tobytes())
        quality = Quality.from_record(record["quality"])
        to_mni = np.array(record["to_mni"], np.float64)
    # A zip file's checksums tell of any damage, its parts' readers of some in ways of their own:
    # zlib.error, BadZipFile, KeyError, NotImplementedError, struct.error ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path.name} is damaged ({reason})") from None
    if image.shape != MNI_SHAPE or image.dtype != np.uint8 or to_mni.shape != (4, 4):
        raise ValueError(f"{path.name} is no prepared brain")
    return Prepared(image, to_mni, quality, record)


class PrepCache:
    """A folder of prepared brains (about 0.4 MB each), for any number of processes."""

    def __init__(self, folder: Path | str | None = None, *, max_bytes: int = 2 * 10**9) -> None:
        """Nothing is written before the first `add`.

        Args:
            folder: `default_cache_dir()` if None.
            max_bytes: what `prune` leaves.
        """
        self.folder = default_cache_dir() if folder is None else Path(folder)
        self.max_bytes = max_bytes

    def find(self, sha256: str, kind: InputKind) -> Prepared | None:
        """The brain of a file with this content, if it is there and whole."""
        path = self._path(sha256, kind)
        try:
            found = read_prepared(path)
        except OSError:
            return None
        except ValueError as error:
            text = f"{path.parent}{os.sep}{error}; the scan is prepared again"
            warnings.warn(text, CacheDamage, stacklevel=2)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def add(self, prepared: Prepared) -> None:
        """Keep a brain. A full or read-only disk is no reason to stop: then it is not kept."""
        from enn_core.files.atomic import replacing

        source = prepared.record["input"]
        path = self._path(source["sha256"], source["kind"])
        record = json.dumps(prepared.record).encode()
        content = io.BytesIO()
        np.savez_compressed(content, image=prepared.image, record=np.frombuffer(record, np.uint8))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(path, shared=True) as temporary:
                temporary.write_bytes(content.getvalue())

    def prune(self) -> int:
        """Delete what was not used for longest, until `max_bytes` are left; returns how many."""
        entries, deleted = [], 0
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    state = path.stat()
                    if path.suffix == ".tmp" and time.time() - state.st_mtime > 86400:
                        path.unlink()
                    elif path.suffix == ".npz":
                        entries.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                deleted += 1
            total -= size
        return deleted

    def _path(self, sha256: str, kind: str) -> Path:
        depends = [_FORMAT, sha256, kind, parameters()]
        name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}.npz"
