"""An indexed folder behind a web page: searched by many threads, updated by one in the background.

Nothing a visitor does changes a collection except "update", which re-reads the folder that the
server was started with. Searches go on meanwhile and see the new state once it is published.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.pictures import ImageRef
from apps.search_html import Card

if TYPE_CHECKING:
    from retrieval.index import EigenIndex, Entry
    from retrieval.models import RetrievalModel
    from retrieval.search import Searcher
    from retrieval.update import Progress

__all__ = ["Collection", "Job", "UpdateRunning", "share"]


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

    # -- searching ---------------------------------------------------------------------------

    def search(self, text: str, image: bytes | None, like: int | None, k: int) -> list[Card]:
        """Cards for a text, a picture (bytes) or an image of the collection, and combinations.

        Raises:
            ValueError: the query cannot be understood; the message is fit to show.
            LookupError: the image `like` is gone.
        """
        index = self.index
        if like is not None and not text:
            query = index.vectors([like])[0]
            found = [hit for hit in index.search(query, k + 1) if hit[0] != like][:k]
        else:
            if like is not None:
                image, _ = self.read(self.ref(like))
            query = self._searcher.query_vector(text or None, image)
            found = index.search(query, k)
        average = float(query.astype("float64") @ index.moments()[0])
        best = found[0][1] if found else 0.0
        cards = []
        for id, score in found:
            # An update may delete an image between the search and this line.
            with contextlib.suppress(KeyError):
                cards.append(self._card(index.entry(id), score, share(score, average, best)))
        return cards

    def browse(self, k: int) -> list[Card]:
        """Cards of pictures spread evenly over the collection, without scores."""
        index = self.index
        ids = index.ids()
        step = max(1, len(ids) // k)
        cards = []
        for id in ids[::step][:k]:
            with contextlib.suppress(KeyError):
                cards.append(self._card(index.entry(int(id)), None, None))
        return cards

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

    def _card(self, entry: Entry, score: float | None, share: float | None) -> Card:
        return Card(
            token=self._token(ImageRef(self.number, entry.id, _version(entry))),
            path=_printable(entry.path),
            width=entry.width or 0,
            height=entry.height or 0,
            size=entry.size or 0,
            score=score,
            share=share,
            credit=self._credits.get(entry.path, ""),
        )

    # -- pictures ----------------------------------------------------------------------------

    def ref(self, id: int) -> ImageRef:
        """Raises LookupError for an image that is not indexed."""
        entry = self._searcher.index.entry(id)
        if entry.state != "indexed" or not entry.sha256:
            raise LookupError(f"image {id} is not indexed")
        return ImageRef(self.number, id, _version(entry))

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
    return f"Up to date: {changes} ({report.seconds:.1f} s)."
