"""Searching an index with words, pictures, or both.

>>> import retrieval                                           # doctest: +SKIP
>>> searcher = retrieval.open_index("photos")                  # doctest: +SKIP
>>> for hit in searcher.search("a dog in the snow", k=5):      # doctest: +SKIP
...     print(hit.id, hit.score, hit.path)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from enn_core.files.closing import Closing
from retrieval.index.eigen_index import EigenIndex
from retrieval.queries import QueryError, Ranked, image_vectors, query_coordinates, rank
from retrieval.teach.profiles import check_name

if TYPE_CHECKING:
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.queries import Mapping, Picture
    from retrieval.teach.teacher import Effect, HistoryEntry, Lesson, Teacher

__all__ = ["Hit", "Searcher", "open_index", "rank_captions"]


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


class Searcher(Closing):
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

    def close(self) -> None:
        """Close the index and the profile."""
        self.index.close()
        if self.teacher is not None:
            self.teacher.close()

    def search(
        self,
        text: str | None = None,
        *,
        image: Picture | None = None,
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
        ranked = rank(self.model, self.index, text, image, mapping=mapping, k=k, ids=ids)
        return self._hits(ranked)

    def similar(self, id: int, k: int = 20, *, taught: bool = True) -> list[Hit]:
        """The k images closest to an indexed one, without itself.

        Raises:
            KeyError: if no searchable image has that id.
        """
        self.index.refresh()
        mapping = self.mapping(taught)
        return self._hits(rank(self.model, self.index, like=id, mapping=mapping, k=k))

    def query_vector(
        self,
        text: str | None = None,
        image: Picture | None = None,
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
        text: str | None = None,
        good: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        image: Picture | None = None,
        like: int | None = None,
        unmark: Iterable[int] = (),
        rule: str | None = None,
        force: bool = False,
    ) -> Lesson:
        """Learn that these pictures are good and bad answers; see `Teacher.teach`."""
        teacher = self._teacher()
        self.index.refresh()
        asked: dict[str, Any] = {"image": image, "like": like}
        return teacher.teach(
            self.index, text, good, bad, **asked, unmark=unmark, rule=rule, force=force
        )

    def preview(
        self,
        text: str | None = None,
        good: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        image: Picture | None = None,
        like: int | None = None,
        unmark: Iterable[int] = (),
        rule: str | None = None,
    ) -> Lesson:
        """What `teach` would do, without doing it."""
        teacher = self._teacher()
        self.index.refresh()
        asked: dict[str, Any] = {"image": image, "like": like}
        return teacher.preview(self.index, text, good, bad, **asked, unmark=unmark, rule=rule)

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

    def answering(
        self, text: str | None = None, image: Picture | None = None
    ) -> list[tuple[str, float]]:
        """The taught queries that a search follows now; see `Teacher.answering`."""
        teacher = self._teacher()
        teacher.refresh()
        ranked = rank(self.model, self.index, text, image, k=1)
        return teacher.answering(ranked.asked, ranked.kind)

    def effects(self) -> list[Effect]:
        """Where the marked pictures stand without and with what was taught."""
        teacher = self._teacher()
        self.index.refresh()
        return teacher.effects(self.index)

    def _teacher(self) -> Teacher:
        if self.teacher is None:
            from retrieval.teach.teacher import TeachError

            raise TeachError(
                "no profile is open that could be taught; open the index with a profile, as in "
                "open_index(path, profile='me')"
            )
        return self.teacher

    def caption(
        self,
        image: Picture,
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

    def _hits(self, found: Ranked) -> list[Hit]:
        root = self.index.root or Path()
        entries = self.index.entries_of([id_ for id_, _ in found.hits])
        return [
            Hit(id_, score, root / entries[id_].path)
            for id_, score in found.hits
            if id_ in entries  # else compacted away since
        ]


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
    from retrieval.model.loading import load

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
            from retrieval.teach.teacher import Teacher

            teacher = Teacher.open(model, profile)
    except BaseException:
        index.close()
        raise
    return Searcher(index, model, teacher)


def rank_captions(
    model: RetrievalModel,
    image: Picture,
    captions: Sequence[str],
    k: int = 5,
) -> list[tuple[int, float, str]]:
    """`Searcher.caption` without an index: the k captions closest to an image."""
    if isinstance(captions, str) or not len(captions):
        raise QueryError("captions must be a list of at least one text")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    scores = model.text_vectors(captions) @ image_vectors(model, image)[0]
    order = np.argsort(-scores, kind="stable")[:k]
    return [(int(i), float(scores[i]), captions[i]) for i in order]
