"""An indexed folder behind a web page: searched by many threads, updated by one in the background.

Nothing a visitor does changes a collection except "update", which re-reads the folder that the
server was started with. Searches go on meanwhile and see the new state once it is published.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web.search.html import Card
from apps.web.search.pictures import ImageRef

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex, Entry
    from retrieval.index.update import Progress
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.search import Searcher
    from retrieval.teach.teacher import Teacher

__all__ = ["Collection", "Found", "Job", "UpdateRunning", "share"]


AVERAGED = 256  # pictures whose mean score stands for all, where there is no formula


class UpdateRunning(RuntimeError):
    """An update was asked for while one is running."""


class _Cancelled(Exception):
    pass


@dataclass(frozen=True)
class Job:
    """State of a background update, as a value that can be shown.

    Args:
        state: "idle", "running", "cancelling", "done", "cancelled" or "failed".
        done, total: files looked at; total is None until it is known.
        started, ended: seconds of `time.monotonic`.
        text: one line for the user.
    """

    state: str = "idle"
    done: int = 0
    total: int | None = None
    started: float = 0.0
    ended: float = 0.0
    text: str = ""

    @property
    def active(self) -> bool:
        return self.state in {"running", "cancelling"}


@dataclass(frozen=True)
class Found:
    """The answer to a search.

    Args:
        hits: (id, score), best first.
        average: score of an average picture of the collection.
        follows: the taught queries that it follows, and the share of each.
    """

    hits: tuple[tuple[int, float], ...]
    average: float
    follows: tuple[tuple[str, float], ...] = ()

    @cached_property
    def ids(self) -> tuple[int, ...]:
        return tuple([id for id, _ in self.hits])


class Collection:
    """One folder, its index and its searcher.

    Args:
        name: shown to visitors.
        searcher: an opened searcher.
        root: the folder of the images, or None when it is not known (then there is no update and
            there are no pictures, only names).
        number: position among the server's collections.
        token: makes the opaque id under which a browser knows an image.
        credits: author and licence by path, for pictures that must name them.
    """

    def __init__(
        self,
        name: str,
        searcher: Searcher,
        root: Path | None,
        *,
        number: int = 0,
        token: Callable[[ImageRef], str],
        credits: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.root = root
        self.number = number
        self._searcher = searcher
        self._token = token
        self._credits = credits or {}
        self._job = Job()
        self._job_lock = threading.Lock()
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def model(self) -> RetrievalModel:
        return self._searcher.model

    @property
    def index(self) -> EigenIndex:
        """The index as it is now; another process may have published a newer state."""
        index = self._searcher.index
        index.refresh()
        return index

    def __len__(self) -> int:
        return len(self._searcher.index)

    @property
    def identity(self) -> str:
        """Tells the index from every other one, at this start of the server and the next."""
        index = self._searcher.index
        return json.dumps([str(index.path), str(self.root), index.manifest], sort_keys=True)

    # -- searching ---------------------------------------------------------------------------

    def find(
        self,
        text: str | None,
        image: bytes | None = None,
        like: int | None = None,
        k: int = 24,
        *,
        teacher: Teacher | None = None,
    ) -> Found:
        """What fits a text, a picture (bytes) or an image of the collection, and combinations.

        Args:
            text: words, empty or None for none.
            image: bytes of a picture.
            like: id of an image of the collection.
            k: number of results.
            teacher: what it knows now counts; None for the model as it is.

        Raises:
            ValueError: the query cannot be understood; the message is fit to show.
            LookupError: the image `like` is gone.
        """
        from retrieval.queries import rank

        if like is not None and text:
            (image, _), like = self.read(self.ref(like)), None
        index, mapping = self.index, teacher.mapping if teacher is not None else None
        ranked = rank(self.model, index, text, image, like=like, mapping=mapping, k=k)
        query, delta = ranked.query, ranked.delta
        if delta is None:
            average = float(query.astype("float64") @ index.moments()[0])
        else:
            few = self._spread(AVERAGED)
            scores = [score for _, score in index.search(query, AVERAGED, delta=delta, ids=few)]
            average = sum(scores) / max(1, len(scores))
        follows = teacher.answering(ranked.asked, ranked.kind) if teacher is not None else ()
        return Found(tuple(ranked.hits), average, tuple(follows))

    def cards(
        self,
        found: Found,
        *,
        marks: Mapping[int, bool] | None = None,
        before: Sequence[int] | None = None,
    ) -> list[Card]:
        """Cards for what was found.

        Args:
            found: the results.
            marks: what the visitor said of images, by id.
            before: ids of the ranking that this one is compared with, best first.
        """
        marks = marks or {}
        places = {id: place for place, id in enumerate(before)} if before is not None else None
        best = found.hits[0][1] if found.hits else 0.0
        known = self._cards(found.ids)
        cards = []
        for place, (id, score) in enumerate(found.hits):
            if id in known:
                new = places is not None and id not in places
                moved = places[id] - place if places is not None and not new else 0
                card = replace(known[id], mark=marks.get(id), moved=moved, new=new)
                part = share(score, found.average, best)
                cards.append(replace(card, score=score, share=part))
        return cards

    def browse(self, k: int) -> list[Card]:
        """Cards of pictures spread evenly over the collection, without scores."""
        self._searcher.index.refresh()
        return list(self._cards(self._spread(k)).values())

    def _spread(self, k: int) -> list[int]:
        """Ids of k pictures spread evenly over the collection."""
        ids = self._searcher.index.ids()
        return ids[:: max(1, len(ids) // max(1, k))][:k].tolist()

    def caption(self, image: bytes, captions: Sequence[str]) -> list[tuple[str, float]]:
        """All captions with their scores, best first."""
        ranked = self._searcher.caption(image, list(captions), k=len(captions))
        return [(caption, float(score)) for _, score, caption in ranked]

    def skipped(self, limit: int) -> list[tuple[str, str]]:
        """(path, reason) of the first files that were left out."""
        entries = itertools.islice(self.index.entries("skipped"), limit)
        return [(_printable(e.path), _printable(e.error or "unknown reason")) for e in entries]

    def stats(self) -> dict[str, Any]:
        return self.index.stats()

    def _cards(self, ids: Sequence[int]) -> dict[int, Card]:
        """Cards by id, without those that an update has deleted since they were found."""
        entries = self._searcher.index.entries_of(ids)
        refs = [ImageRef(self.number, id, _version(entry)) for id, entry in entries.items()]
        return {
            entry.id: Card(
                token=token,
                path=_printable(entry.path),
                width=entry.width or 0,
                height=entry.height or 0,
                size=entry.size or 0,
                credit=self._credits.get(entry.path, ""),
            )
            for entry, token in zip(entries.values(), list(map(self._token, refs)), strict=True)
        }

    # -- pictures ----------------------------------------------------------------------------

    def ref(self, id: int) -> ImageRef:
        """Raises LookupError for an image that is not indexed."""
        entry = self._searcher.index.entry(id)
        if entry.state != "indexed" or not entry.sha256:
            raise LookupError(f"image {id} is not indexed")
        return ImageRef(self.number, id, _version(entry))

    def has(self, ref: ImageRef) -> bool:
        """Whether the index has that version of an image."""
        with contextlib.suppress(LookupError):
            return ref.id < 2**63 and self.ref(ref.id) == ref
        return False

    def read(self, ref: ImageRef) -> tuple[bytes, bool]:
        """The file behind a reference, and whether it still is the version that was indexed.

        Raises:
            LookupError: it is not indexed (any more), or its folder is not known.
            OSError, retrieval.images.ImageError: it cannot be read.
        """
        from retrieval.images import read_stable

        entry = self._searcher.index.entry(ref.id)
        if self.root is None or entry.state != "indexed" or not entry.sha256:
            raise LookupError(f"image {ref.id} is not available")
        # The catalog holds relative paths; anything else did not come from an update.
        relative = Path(entry.path)
        if relative.is_absolute() or ".." in relative.parts:
            raise LookupError(f"image {ref.id} has a path outside its folder")
        found = read_stable(self.root / relative)
        return found.data, _version(entry) == ref.version and found.sha256 == entry.sha256

    # -- updating ----------------------------------------------------------------------------

    @property
    def job(self) -> Job:
        return self._job

    def start_update(self) -> None:
        """Reads the folder again in the background.

        Raises:
            UpdateRunning: one is running already.
            ValueError: the folder is not known.
        """
        if self.root is None:
            raise ValueError("the folder of these pictures is not known to the server")
        with self._job_lock:
            if self._job.active:
                raise UpdateRunning("an update is already running")
            self._cancel.clear()
            self._job = Job("running", started=time.monotonic(), text="Looking at the folder…")
        self._thread = threading.Thread(target=self._update, name="index-update", daemon=True)
        self._thread.start()

    def cancel_update(self) -> None:
        """Asks a running update to stop; what it has finished stays."""
        with self._job_lock:
            if self._job.state == "running":
                self._job = replace(self._job, state="cancelling", text="Stopping…")
                self._cancel.set()

    def wait(self, timeout: float) -> bool:
        """Waits for a running update; True if none is running afterwards."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self._job.active

    def _update(self) -> None:
        def show(progress: Progress) -> None:
            if self._cancel.is_set():
                raise _Cancelled
            with self._job_lock:
                if self._job.state == "running":
                    self._job = replace(
                        self._job,
                        done=progress.done,
                        total=progress.total,
                        text=_progress_text(progress),
                    )

        try:
            report = self._searcher.index.update(self.root, self.model, progress=show)
        except _Cancelled:
            self._finish("cancelled", "Stopped. Everything finished until then is kept.")
        except Exception as error:  # a thread has nobody else to tell
            self._finish("failed", f"The update stopped: {_printable(str(error))}")
        else:
            self._finish("done", _report_text(report))

    def _finish(self, state: str, text: str) -> None:
        with self._job_lock:
            self._job = replace(self._job, state=state, text=text, ended=time.monotonic())


def share(score: float, average: float, best: float) -> float:
    """How far a score is on the way from the average to the best, 0..1."""
    if best - average <= 1e-6:
        return 1.0
    return min(1.0, max(0.0, (score - average) / (best - average)))


def _version(entry: Entry) -> str:
    return (entry.sha256 or "").ljust(14, "0")[:14]


def _printable(text: str) -> str:
    """File names may hold bytes that are no UTF-8; they must not break a page."""
    return text.encode("utf-8", "replace").decode()


def _progress_text(progress: Progress) -> str:
    if progress.stage == "scan":
        return f"Looking at the folder… {progress.done:,} files"
    if progress.stage == "save":
        return "Saving…"
    text = f"{progress.done:,} of {progress.total or 0:,} files"
    if progress.rate:
        text += f", {progress.rate:,.0f} per second"
    if progress.eta is not None:
        seconds = max(1, round(progress.eta))
        left = f"{seconds} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"
        text += f", about {left} left"
    return text


def _report_text(report: Any) -> str:
    from retrieval.formats import left_out_text

    parts = [
        f"{count:,} {name}"
        for name, count in (
            ("new", report.added),
            ("changed", report.changed),
            ("moved", report.moved),
            ("removed", report.deleted),
            ("left out", report.skipped),
        )
        if count
    ]
    changes = ", ".join(parts) if parts else "nothing has changed"
    text = f"Up to date: {changes} ({report.seconds:.1f} s)."
    if report.left_out:
        text += f" No pictures: {_printable(left_out_text(report.left_out))}."
    return text
