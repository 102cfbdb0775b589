"""Vectors of a stopped evaluation, kept on disk until it is complete.

One file per part of a data set, named by a hash of everything that decides its content: model,
preprocessing and runtime; path, size and time of every image, or the texts. A part that is found
is therefore right, and nothing ever has to be invalidated. It ends with a digest: what is damaged
is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from enn_core.files.atomic import replacing
from retrieval.datasets.captioned import TarImage

if TYPE_CHECKING:
    from retrieval.model.retrieval_model import RetrievalModel

__all__ = ["FeatureCache", "default_cache_dir"]

_DIGEST = hashlib.sha256().digest_size


def default_cache_dir() -> Path:
    """Where vectors of unfinished evaluations of this user lie."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("eigen-suite", appauthor=False)) / "eval"


class FeatureCache:
    """Vectors of one model in a directory.

    Attributes:
        images: how many image vectors were found so far.
    """

    def __init__(self, folder: str | os.PathLike[str], model: RetrievalModel) -> None:
        """Nothing is written before the first `add`."""
        self.folder = Path(folder)
        self.images = 0
        self._dim = model.dim
        self._model = json.dumps(
            {
                **model.fingerprint(),
                "runtime": model.runtime,
                "context": model.context_length,
                "vectors": 2,  # of the files' form
            },
            sort_keys=True,
        )
        self._used: set[Path] = set()

    def find_images(self, images: Sequence[Path | TarImage]) -> npt.NDArray[np.float32] | None:
        """(N, r) vectors of these images, if they are there."""
        found = self._read(self._image_file(images), len(images), self._dim)
        if found is not None:
            self.images += len(images)
        return found

    def add_images(self, images: Sequence[Path | TarImage], vectors: np.ndarray) -> None:
        """Keep vectors."""
        self._write(self._image_file(images), vectors)

    def find_texts(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], int] | None:
        """(N, r) vectors of these texts and how many of them were cut, if they are there."""
        # The count is the last column of the first row.
        found = self._read(self._text_file(texts), len(texts), self._dim + 1)
        return None if found is None else (found[:, :-1], int(found[0, -1]))

    def add_texts(self, texts: Sequence[str], vectors: np.ndarray, cut: int) -> None:
        """Keep vectors, and how many of the texts were cut."""
        column = np.zeros((len(vectors), 1), dtype=np.float32)
        column[0] = cut
        self._write(self._text_file(texts), np.concatenate([vectors, column], axis=1))

    def drop(self) -> None:
        """Delete what this run used, and the directory if nothing else is in it."""
        for file in self._used:
            with contextlib.suppress(OSError):
                file.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _image_file(self, images: Sequence[Path | TarImage]) -> Path:
        digest = self._digest("images")
        for image in images:
            path = image.tar if isinstance(image, TarImage) else image
            place = f"{image.offset}|{image.size}" if isinstance(image, TarImage) else ""
            info = path.stat()
            name = os.fsencode(path.absolute())
            digest.update(name + f"|{place}|{info.st_size}|{info.st_mtime_ns}\0".encode())
        return self._file(digest)

    def _text_file(self, texts: Sequence[str]) -> Path:
        digest = self._digest("texts")
        for text in texts:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return self._file(digest)

    def _digest(self, kind: str) -> hashlib._Hash:
        return hashlib.sha256(f"{kind}|{self._model}|".encode())

    def _file(self, digest: hashlib._Hash) -> Path:
        file = self.folder / f"{digest.hexdigest()[:40]}.npy"
        self._used.add(file)
        return file

    @staticmethod
    def _read(file: Path, rows: int, columns: int) -> npt.NDArray[np.float32] | None:
        try:
            content = file.read_bytes()
        except OSError:
            return None
        content, digest = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            warnings.warn(f"{file} is damaged; its vectors are computed again", stacklevel=2)
            return None
        try:
            vectors = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError):
            return None
        fits = vectors.shape == (rows, columns) and vectors.dtype == np.float32
        return vectors if fits and np.isfinite(vectors).all() else None

    @staticmethod
    def _write(file: Path, vectors: np.ndarray) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary, open(temporary, "wb") as out:
                content = io.BytesIO()
                np.save(content, np.asarray(vectors, dtype=np.float32))
                out.write(content.getbuffer())
                out.write(hashlib.sha256(content.getbuffer()).digest())
        except OSError as error:
            # Hours of work must not end because they cannot be kept for a second run.
            warnings.warn(
                f"vectors are not kept for a later run: {file}: {error.strerror}", stacklevel=2
            )
