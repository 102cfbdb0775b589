"""Searching an index with words, pictures, or both.

>>> import retrieval                                           # doctest: +SKIP
>>> searcher = retrieval.open_index("photos")                  # doctest: +SKIP
>>> for hit in searcher.search("a dog in the snow", k=5):      # doctest: +SKIP
...     print(hit.id, hit.score, hit.path)

Queries have parts with weights, positive or negative:

>>> parse_query("2:golden retriever + snow - person")
[Part(text='golden retriever', weight=2.0), Part(text='snow', weight=1.0), Part(text='person', \
weight=-1.0)]
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from retrieval.index import EigenIndex
from retrieval.manifest import EmbeddingModel
from retrieval.profiles import check_name

if TYPE_CHECKING:
    from PIL.Image import Image

    from retrieval.guard import Mapping
    from retrieval.models import RetrievalModel
    from retrieval.teaching import Effect, HistoryEntry, Lesson, Teacher

__all__ = [
    "Hit",
    "Part",
    "QueryError",
    "QueryModel",
    "Searcher",
    "open_index",
    "parse_query",
    "query_coordinates",
    "rank_captions",
]

# Spaces before a sign make it an operator; a hyphen inside a word is text.
_OPERATOR = re.compile(r"(?:^|(?<=\s))[+-]")
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+):(?!\d)\s*")
_MAX_WEIGHT = 1000.0

# A part whose scores vary less than this over the gallery (as in a gallery of one image) is not
# blown up further.
_LEAST_SPREAD = 0.01


class QueryError(ValueError):
    """A query that cannot be searched for; one line, fit to show."""


@dataclass(frozen=True)
class Part:
    """One part of a query: a text and its weight, negative for what should not be there."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        id: stable id of the image in its index.
        score: cosine with the query, -1..1.
        path: full path, or relative to the unknown photo folder if the index does not know it.
    """

    id: int
    score: float
    path: Path


def parse_query(text: str) -> list[Part]:
    """Split a query into weighted parts.

    " + " and " - " between parts (or "-word" after a space) add and subtract; "2:" before a part
    is its weight; double quotes protect signs and colons. A hyphen inside a word is text, and so
    is a colon between digits, as in "at 10:30".

    Raises:
        QueryError: if nothing is left to search for, or a weight is out of range.
    """
    pieces: list[tuple[float, list[str]]] = [(1.0, [])]
    for i, segment in enumerate(_outside_quotes(text)):
        quoted = i % 2 == 1
        if quoted:
            pieces[-1][1].append(f'"{segment}"')
            continue
        start = 0
        for match in _OPERATOR.finditer(segment):
            if match.start() == 0 and i > 0:
                continue  # right behind a closing quote: part of the same word
            pieces[-1][1].append(segment[start : match.start()])
            pieces.append((-1.0 if match.group() == "-" else 1.0, []))
            start = match.end()
        pieces[-1][1].append(segment[start:])
    parts = []
    for sign, fragments in pieces:
        content = "".join(fragments).strip()
        weight = 1.0
        prefix = _WEIGHT.match(content)
        if prefix:
            weight = float(prefix.group(1))
            content = content[prefix.end() :]
            if not 0 < weight <= _MAX_WEIGHT:
                raise QueryError(
                    f"weight {prefix.group(1)} is out of range; valid: above 0, up to "
                    f"{_MAX_WEIGHT:.0f}"
                )
        content = " ".join(_unquote(content).split())
        if content:
            parts.append(Part(content, sign * weight))
    if not parts:
        raise QueryError("the query is empty: give some words, an image, or both")
    return parts


class QueryModel(EmbeddingModel, Protocol):
    """What queries ask of a model; `retrieval.models.RetrievalModel` has it."""

    def text_vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


class Searcher:
    """An open index with the model that belongs to it; may be used from several threads.

    Attributes:
        index: the index.
        model: the model.
        teacher: the profile whose teaching applies to every search, or None.
    """

    def __init__(
        self, index: EigenIndex, model: RetrievalModel, teacher: Teacher | None = None
    ) -> None:
        """Use `open_index`."""
        self.index = index
        self.model = model
        self.teacher = teacher

    def with_teacher(self, teacher: Teacher | None) -> Searcher:
        """The same index under another profile, or under none; close only one of them."""
        return Searcher(self.index, self.model, teacher)

    def __enter__(self) -> Searcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the index and the profile."""
        self.index.close()
        if self.teacher is not None:
            self.teacher.close()

    def search(
        self,
        text: str | None = None,
        *,
        image: str | os.PathLike[str] | bytes | Image | None = None,
        k: int = 20,
        ids: Sequence[int] | np.ndarray | None = None,
        taught: bool = True,
    ) -> list[Hit]:
        """The k images closest to a text, an image, or both.

        Args:
            text: words, with weights and negatives as `parse_query` reads them.
            image: path, file bytes or PIL image.
            k: number of results, fewer if the index is smaller.
            ids: rank these images only.
            taught: whether what the profile was taught applies.

        Returns:
            Best first, equal scores by id. For one text the score is its cosine with the image;
            for several parts, the cosine with their combination.

        Raises:
            QueryError: if the query is empty or contradicts itself.
            ImageError: if the image cannot be read.
        """
        self.index.refresh()
        mapping = self.mapping(taught)
        q = query_coordinates(self.model, self.index, text, image, mapping)
        delta = mapping.delta if mapping is not None else None
        return self._hits(self.index.search(q, k, delta=delta, ids=ids))

    def similar(self, id: int, k: int = 20, *, taught: bool = True) -> list[Hit]:
        """The k images closest to an indexed one, without itself.

        Raises:
            KeyError: if no searchable image has that id.
        """
        self.index.refresh()
        mapping = self.mapping(taught)
        delta = mapping.delta if mapping is not None else None
        q = _under(delta, self.index.vectors([id]))[0]
        found = self.index.search(q, k + 1, delta=delta)
        return self._hits([(other, score) for other, score in found if other != id][:k])

    def query_vector(
        self,
        text: str | None = None,
        image: str | os.PathLike[str] | bytes | Image | None = None,
        *,
        taught: bool = True,
    ) -> npt.NDArray[np.float32]:
        """(r,) eigen-coordinates of a query; see `query_coordinates`.

        To rank by it, give `EigenIndex.search` the `delta` of `mapping(taught)` too.
        """
        return query_coordinates(self.model, self.index, text, image, self.mapping(taught))

    def mapping(self, taught: bool = True) -> Mapping | None:
        """What applies to a search: the profile as it is now, or None."""
        if self.teacher is None or not taught:
            return None
        self.teacher.refresh()
        return self.teacher.mapping

    # --- teaching ------------------------------------------------------------------------------

    def teach(
        self,
        text: str,
        good: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        unmark: Iterable[int] = (),
        rule: str | None = None,
        force: bool = False,
    ) -> Lesson:
        """Learn that these pictures are good and bad answers; see `Teacher.teach`."""
        teacher = self._teacher()
        self.index.refresh()
        return teacher.teach(self.index, text, good, bad, unmark=unmark, rule=rule, force=force)

    def preview(
        self,
        text: str,
        good: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        unmark: Iterable[int] = (),
        rule: str | None = None,
    ) -> Lesson:
        """What `teach` would do, without doing it."""
        teacher = self._teacher()
        self.index.refresh()
        return teacher.preview(self.index, text, good, bad, unmark=unmark, rule=rule)

    def undo(self, entry: int | None = None) -> HistoryEntry:
        """Take back a lesson, by default the newest; see `Teacher.undo`."""
        teacher = self._teacher()
        self.index.refresh()
        return teacher.undo(entry, index=self.index)

    def history(self) -> list[HistoryEntry]:
        """All lessons of the profile, oldest first."""
        return self._teacher().history()

    def forget(self, text: str | None = None) -> int:
        """Erase a query's lessons, or all, for good; returns how many there were."""
        return self._teacher().forget(text)

    def effects(self) -> list[Effect]:
        """Where the marked pictures stand without and with what was taught."""
        teacher = self._teacher()
        self.index.refresh()
        return teacher.effects(self.index)

    def _teacher(self) -> Teacher:
        if self.teacher is None:
            from retrieval.teaching import TeachError

            raise TeachError(
                "no profile is open that could be taught; open the index with a profile, as in "
                "open_index(path, profile='me')"
            )
        return self.teacher

    def caption(
        self,
        image: str | os.PathLike[str] | bytes | Image,
        captions: Sequence[str],
        k: int = 5,
    ) -> list[tuple[int, float, str]]:
        """The k captions closest to an image, which need not be indexed.

        Args:
            image: path, file bytes or PIL image.
            captions: any texts; weights and signs mean nothing here.
            k: number of results, at least 1.

        Returns:
            (position in captions, cosine, caption), best first, equal scores by position.

        Raises:
            QueryError: if there are no captions.
            ValueError: if k < 1.
            ImageError: if the image cannot be read.
        """
        return rank_captions(self.model, image, captions, k)

    def _hits(self, found: list[tuple[int, float]]) -> list[Hit]:
        root = self.index.root
        hits = []
        for id_, score in found:
            try:
                path = Path(self.index.entry(id_).path)
            except KeyError:
                continue  # compacted away since
            hits.append(Hit(id_, score, path if root is None else root / path))
        return hits


def open_index(
    path: str | os.PathLike[str],
    model: RetrievalModel | str | None = None,
    profile: str | None = None,
) -> Searcher:
    """Open an index for searching.

    Args:
        path: the index directory, or a photo folder with its index inside.
        model: a loaded model or its name; None loads the one the index names. What is loaded
            here has the precision of the index.
        profile: name of the profile whose teaching applies and that can be taught; one that does
            not exist yet is made by its first lesson.

    Raises:
        NoIndex: if there is none.
        IndexMismatch: if the model is not the one that the index was built with.
        IndexCorrupt: if files are damaged.
        ModelError: if the model cannot be loaded.
        ProfileError: if a profile cannot have that name.
        JournalError: if the profile cannot be read.
    """
    from retrieval.models import load

    if profile is not None:
        check_name(profile)
    index = EigenIndex.open(path)
    try:
        if model is None or isinstance(model, str):
            name = str(index.manifest["model"]) if model is None else model
            model = load(name, precision=str(index.manifest["precision"]))
        index.check_model(model)
        teacher = None
        if profile is not None:
            from retrieval.teaching import Teacher

            teacher = Teacher.open(model, profile)
    except BaseException:
        index.close()
        raise
    return Searcher(index, model, teacher)


def query_coordinates(
    model: QueryModel,
    index: EigenIndex,
    text: str | None = None,
    image: str | os.PathLike[str] | bytes | Image | None = None,
    mapping: Mapping | None = None,
) -> npt.NDArray[np.float32]:
    """(r,) eigen-coordinates of a query.

    One part alone is taken as it is. Several are first divided by the spread of their own scores
    over the gallery: cosines of texts lie close together and those of images far apart, and a sum
    of both would be ruled by the image. The sum has unit norm.

    Args:
        model: gives the coordinates of the parts.
        index: whose gallery it is.
        text: words, with weights and negatives as `parse_query` reads them.
        image: path, file bytes or PIL image.
        mapping: what was taught; applies to the sum of the texts, not to the image.

    Raises:
        QueryError: if the query is empty or its parts cancel.
        ImageError: if the image cannot be read.
    """
    parts = parse_query(text) if text and text.strip() else []
    if not parts and image is None:
        raise QueryError("the query is empty: give some words, an image, or both")
    rows = [model.text_vectors([part.text for part in parts])] if parts else []
    weights = [part.weight for part in parts]
    if image is not None:
        rows.append(_image_vectors(model, image))
        weights.append(1.0)
    vectors = np.concatenate(rows)
    delta = mapping.delta if mapping is not None else None
    if len(vectors) == 1:
        alone = vectors * np.float32(np.sign(weights[0]))
        if mapping is not None:
            alone = mapping.map(alone) if parts else _under(delta, alone)
        return alone[0]
    _, covariance = index.moments()
    exact = vectors.astype(np.float64)
    spread = np.sqrt(np.einsum("ir,rs,is->i", exact, covariance, exact).clip(min=0))
    norms = np.linalg.norm(exact, axis=1)
    scale = np.maximum(spread, _LEAST_SPREAD * norms)
    shares = np.asarray(weights) / np.where(scale > 0, scale, 1)
    total = shares[: len(parts)] @ exact[: len(parts)]
    if mapping is not None and parts:
        total = mapping.map(total[None])[0].astype(np.float64)
    if image is not None:
        total = total + shares[-1] * _under(delta, exact[-1:])[0]
    length = np.linalg.norm(total)
    if length <= 1e-6 * np.abs(np.asarray(weights)).max():
        raise QueryError("the parts of the query cancel each other; change a weight")
    return np.asarray(total / length, dtype=np.float32)


def rank_captions(
    model: RetrievalModel,
    image: str | os.PathLike[str] | bytes | Image,
    captions: Sequence[str],
    k: int = 5,
) -> list[tuple[int, float, str]]:
    """`Searcher.caption` without an index: the k captions closest to an image."""
    if isinstance(captions, str) or not len(captions):
        raise QueryError("captions must be a list of at least one text")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    scores = model.text_vectors(captions) @ _image_vectors(model, image)[0]
    order = np.argsort(-scores, kind="stable")[:k]
    return [(int(i), float(scores[i]), captions[i]) for i in order]


def _under(delta: np.ndarray | None, vectors: np.ndarray) -> np.ndarray:
    """Images (N, r) as queries under a changed spectrum: their own vectors under it."""
    if delta is None:
        return vectors
    changed = vectors * delta
    lengths = np.linalg.norm(changed, axis=1, keepdims=True)
    return np.divide(changed, lengths, out=np.zeros_like(changed), where=lengths > 0)


def _image_vectors(
    model: QueryModel, image: str | os.PathLike[str] | bytes | Image
) -> npt.NDArray[np.float32]:
    """(1, r) stored form of a picture."""
    from retrieval.images import decode

    preprocess = model.preprocess
    if isinstance(image, bytes | str | os.PathLike):
        upright = decode(image, draft_size=preprocess.draft_size)
    else:
        upright = _upright(image)
    return model.image_vectors(preprocess(upright)[None])


def _outside_quotes(text: str) -> list[str]:
    """Pieces outside and inside double quotes, alternating; an unpaired quote is text."""
    pieces = re.split(r'["“”]', text)
    if len(pieces) % 2 == 0:
        pieces[-2:] = [f"{pieces[-2]} {pieces[-1]}"]
    return pieces


def _unquote(text: str) -> str:
    return text.replace('"', "")


def _upright(image: Image) -> Image:
    """A PIL image as `retrieval.images.decode` would give it."""
    from PIL import ImageOps

    from retrieval.images import decode

    turned = ImageOps.exif_transpose(image)
    if turned.mode == "RGB" and not turned.has_transparency_data:
        return turned
    if turned.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        return turned.convert("RGB")
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", compress_level=0)
    return decode(buffer.getvalue())
