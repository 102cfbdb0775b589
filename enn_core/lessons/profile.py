"""One profile of one model: its journal, and what is known from the events in it."""

from __future__ import annotations

import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from enn_core.files.closing import Closing
from enn_core.lessons.errors import AlreadyTaught, JournalCorrupt, JournalMissing
from enn_core.lessons.events import ERASED, TEACH, DamagedEntry, Event
from enn_core.lessons.journal import Journal, Writing

MOST_ERASED = 10_000  # lessons whose uids are kept after they were erased


class Known(Protocol):
    """What a profile knows: a frozen dataclass, so that readers keep a consistent value."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def version(self) -> int | None:
        """Of the journal that it was derived from; None if it must be derived again."""


K = TypeVar("K", bound=Known)


class Profile(Closing, ABC, Generic[K]):
    """A journal on disk and what it teaches. Safe in several threads, and beside other processes.

    What is known is a function of the journal's active events, derived anew whenever this or
    another process has changed them. Nothing is written before the first lesson; a journal that
    was moved away or replaced is noticed.

    Args:
        name: of the profile.
        path: of the journal, which need not exist.
        identity: what the journal belongs to, see `Journal.open`.
        nothing: what a profile without a journal knows.
    """

    error: type[ValueError] = ValueError
    """Raised where a user asked for what cannot be."""
    undone = "is undone already"
    """What is said of a lesson that is not in force."""

    def __init__(self, name: str, path: Path, identity: Mapping[str, Any], nothing: K) -> None:
        self.name = name
        self.path = path
        self._identity = identity
        self._nothing = self._state = nothing
        self._lock = threading.RLock()
        self._journal: Journal | None = None
        self._file: tuple[int, int] | None = None

    @abstractmethod
    def _derive(self, events: Sequence[Event], version: int | None) -> K:
        """What active events teach, oldest first."""

    @abstractmethod
    def _accept(self, header: dict[str, Any], events: list[Event]) -> None:
        """Raise what refuses lessons of an imported file that could not be used here."""

    def _header(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a new journal keeps beside its events."""
        return {}, {}

    def _opened(self, journal: Journal) -> None:
        """Raise JournalCorrupt unless a journal's header is as it must be; may keep parts of it."""

    def close(self) -> None:
        """Close the journal."""
        with self._lock:
            if self._journal is not None:
                self._journal.close()
            self._journal, self._state = None, self._nothing

    def refresh(self) -> bool:
        """Take over what other processes have taught or undone since; cheap if there is nothing.

        Returns:
            Whether there was something new.
        """
        journal, version = self._journal, self._state.version
        if journal is not None and version is not None and self._is_there():
            if journal.version == version:
                return False
        elif journal is None and not self.path.exists():
            return False
        with self._lock:
            before = self._state.version
            journal = self._existing()
            if journal is None:
                self._state = self._nothing
            elif (version := journal.version) != self._state.version:
                # What is read may be newer than this version: then it is read again.
                self._state = self._derive(journal.events(), version)
            return self._state.version != before

    def import_(self, path: str | os.PathLike[str]) -> int:
        """Add the lessons of an exported file; those already here are passed over.

        Returns:
            How many events were new.

        Raises:
            JournalMismatch: it is of another model.
            JournalCorrupt: it is no export, damaged, or holds what no lesson can.
        """
        with self._lock:
            if self._existing() is None:
                # A file that is refused leaves no empty profile behind.
                with (
                    tempfile.TemporaryDirectory(prefix="enn-import-") as folder,
                    Journal.open(Path(folder) / "trial", identity=self._identity) as trial,
                ):
                    trial.import_(path, accept=self._accept)
            new = self._made().import_(path, accept=self._accept)
            self._changed()
        return new

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a copy of the journal, see `Journal.backup`.

        Raises:
            error: nothing was taught yet.
        """
        with self._lock:
            self._needed().backup(path)

    def damaged(self) -> list[DamagedEntry]:
        """The entries that cannot be used; while there are any, nothing is known of the others."""
        with self._lock:
            journal = self._existing()
            return journal.intact()[1] if journal is not None else []

    def _lessons(self) -> list[Event]:
        """All lessons that are as they were written, oldest first, undone ones included."""
        with self._lock:
            journal = self._existing()
            events = journal.intact()[0] if journal is not None else []
        return [event for event in events if event.kind == TEACH]

    def _needed(self) -> Journal:
        """The journal.

        Raises:
            error: nothing was taught yet.
        """
        journal = self._existing()
        if journal is None:
            raise self.error(f"the profile {self.name!r} was taught nothing yet")
        return journal

    def _existing(self) -> Journal | None:
        """The journal, None if there is none (any more)."""
        if self._journal is not None and not self._is_there():
            self._journal = None  # not closed: another thread may just be reading it
            self._state = self._nothing
        if self._journal is None:
            try:
                self._adopt(Journal.open(self.path, identity=self._identity, create=False))
            except JournalMissing:
                return None
        return self._journal

    def _made(self) -> Journal:
        """The journal, which is made if there is none."""
        journal = self._existing()
        if journal is None:
            journal = Journal.open(self.path, identity=self._identity, header=self._header)
            self._adopt(journal)
        return journal

    @contextmanager
    def _writing(self) -> Iterator[tuple[Writing, K]]:
        """A transaction, and what the profile knows at its beginning."""
        journal = self._made()
        with journal.writing() as writing:
            version = journal.version
            if version != self._state.version:
                self._state = self._derive(writing.events(), version)
            yield writing, self._state

    def _check_new(self, writing: Writing, uid: str | None) -> None:
        """Raise AlreadyTaught if a lesson of that uid was taught, whatever became of it since."""
        if uid is not None and writing.has(uid):
            raise AlreadyTaught("these were learned already, they arrived twice")

    def _erase(
        self,
        chosen: Callable[[list[Event]], list[Event]],
        broken: Callable[[DamagedEntry], bool],
    ) -> int:
        """Erase every trace of some events but their uids.

        Args:
            chosen: picks them among all that are whole.
            broken: whether to erase a damaged one.

        Returns:
            How many lessons are gone, damaged ones included.
        """
        with self._lock:
            journal = self._existing()
            if journal is None:
                return 0
            with journal.writing(erasing=True) as writing:
                held, damaged = writing.intact()
                lost = [each.seq for each in damaged if broken(each)]
                events = chosen([event for event in held if event.kind != ERASED])
                left = [event for event in held if event.kind == ERASED]
                lessons = [event for event in events if event.kind == TEACH]
                over = max(0, len(left) + len(lessons) - MOST_ERASED)
                gone = [event for event in events if event.kind != TEACH]
                writing.erase([*lost, *(event.seq for event in (*gone, *left[:over]))])
                writing.erase([event.seq for event in lessons], keep_uid=True)
            with suppress(JournalCorrupt):  # of entries that are damaged, too
                self._changed()
        return len(lessons) + len(lost)

    def _changed(self) -> None:
        """Derive anew: this profile has just changed its journal."""
        self._state = replace(self._state, version=None)
        self.refresh()

    def _to_undo(self, lessons: Sequence[Event], entry: int | None) -> Event:
        """The lesson of a number, or the newest in force.

        Raises:
            error: there is none.
        """
        active = [event for event in lessons if event.active]
        if entry is None:
            if not active:
                raise self.error("there is nothing left to undo")
            return active[-1]
        for event in lessons:
            if event.seq == entry:
                if not event.active:
                    raise self.error(f"lesson {entry} {self.undone}")
                return event
        raise self.error(self._no_lesson(entry, active))

    def _no_lesson(self, entry: int, known: Sequence[Event]) -> str:
        newest = ", ".join(str(event.seq) for event in known[-5:])
        rest = f"the newest are {newest}" if newest else "none is left"
        return f"there is no lesson {entry}; {rest}"

    def _is_there(self) -> bool:
        """Whether the open journal is still the file in its place."""
        try:
            info = os.stat(self.path)
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == self._file

    def _adopt(self, journal: Journal) -> None:
        try:
            self._opened(journal)
        except BaseException:
            journal.close()
            raise
        info = os.stat(self.path)
        self._journal, self._file = journal, (info.st_dev, info.st_ino)
