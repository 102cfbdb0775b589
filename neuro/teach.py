"""Teaching a site: people of known age, scanned there, correct the ages of all its scans.

>>> from neuro.age.predict import BrainAge                                # doctest: +SKIP
>>> brain = BrainAge.load()                                           # doctest: +SKIP
>>> site = Site.open(brain, "site-a")                                 # doctest: +SKIP
>>> lesson = site.teach(brain.look(prepared, name="sub-01"), 63.4)    # doctest: +SKIP
>>> lesson.before, lesson.after                                       # doctest: +SKIP
(51.2, 58.9)
>>> brain.estimate(brain.look(other), site=site).age                  # doctest: +SKIP

Every lesson is an event in the profile's journal, on disk before `teach` returns: what the last
blocks read of the scan, never the scan. What a site knows is a function of its active events
(`neuro.site_rule`), whatever their order; the weights never change.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.lessons.errors import JournalCorrupt
from enn_core.lessons.events import TEACH, Event
from enn_core.lessons.places import (
    DEFAULT,
    LOCAL,
    check_name,
    journal_name,
    journal_path,
    list_journals,
)
from enn_core.lessons.profile import Profile
from neuro.age.model import features_of
from neuro.age.population import Population
from neuro.age.predict import BrainAge, Seen
from neuro.scans.quality import Flag, told_apart
from neuro.site_rule import MOST_MOVED, Correction, Taught

__all__ = [
    "Lesson",
    "Site",
    "SiteEntry",
    "SiteError",
    "check_age",
    "journal_of",
    "list_sites",
    "ready",
]

AGES = (0.0, 120.0)
"""Ages that a person can have."""

USUAL_AGES = (20.0, 90.0)
"""Lessons on people of other ages are learnt only on insistence."""

FAR = 40.0
"""A known age that is as many years from the predicted one is a slip of the hand, most likely."""

_INPUTS = "block_inputs"
# Two forward passes of one scan differ by rounding alone, those of two scans by far more.
_SAME = 0.02


class SiteError(ValueError):
    """What cannot be taught or taken back; one line, fit to show."""


@dataclass(frozen=True)
class Lesson:
    """What one labelled scan does, or would do.

    Attributes:
        entry: its number in the history; None if it was not learnt.
        name: of the scan.
        age: that was told, years.
        before, after: age predicted for this scan, without and with the lesson.
        earlier_before, earlier_after: (n,) the same of the scans that were given as `earlier`.
        protected: root mean square change of predicted ages over the population that the model was
            trained on, by all that this site knows, years.
        refused: why it was not learnt; None if it was, or a preview finds nothing against it.
        stored_bytes: what the journal keeps of the scan.
        seconds: it took.
    """

    entry: int | None
    name: str
    age: float
    before: float
    after: float
    earlier_before: np.ndarray
    earlier_after: np.ndarray
    protected: float
    refused: str | None
    stored_bytes: int
    seconds: float


@dataclass(frozen=True)
class SiteEntry:
    """One lesson of the history.

    Attributes:
        entry: its number.
        at: when, in seconds since 1970.
        name: of the scan.
        age: that was told, years.
        predicted: by the model alone, years.
        active: False once undone, or after the same scan was taught another age.
    """

    entry: int
    at: float
    name: str
    age: float
    predicted: float
    active: bool


@dataclass(frozen=True)
class _State:
    """What a site knows: a consistent value while others go on teaching."""

    version: int | None = None
    events: tuple[Event, ...] = ()
    correction: Correction | None = None


class Site(Profile[_State]):
    """One profile of one model. Safe to use from several threads, and beside other processes."""

    error = SiteError
    undone = "is undone already, or its age was replaced"

    def __init__(self, brain: BrainAge, population: Population, name: str, path: Path) -> None:
        """Use `open`."""
        super().__init__(name, path, {"app": "brain", "weights": brain.sha256}, _State())
        self._brain = brain
        self._population = population
        self._taught: dict[str, np.ndarray] = {}  # features of lessons, by uid

    @classmethod
    def open(
        cls,
        brain: BrainAge,
        profile: str = DEFAULT,
        *,
        scope: str = LOCAL,
        path: str | os.PathLike[str] | None = None,
        create: bool = False,
        damaged: bool = False,
    ) -> Site:
        """Open a profile; nothing is written before the first lesson.

        Args:
            brain: the model that is taught.
            profile: its name.
            scope: whose it is, see `enn_core.lessons.places`.
            path: the journal file, instead of the profile's own place.
            create: make the journal at once.
            damaged: open it even if entries are damaged, to list and forget them.

        Raises:
            ProfileError: the name cannot be one.
            SiteError: the model has no statistics of its training scans.
            JournalMismatch: the journal belongs to another model.
            JournalCorrupt: it is damaged.
        """
        population = brain.model.population
        if population is None:
            raise SiteError(
                "this model file has no statistics of its training scans, which teaching must "
                "protect; write one with `enn brain train`, or use the shipped model"
            )
        check_name(profile)
        place = Path(path) if path is not None else journal_path(profile, journal_of(brain), scope)
        site = cls(brain, population, profile, place)
        if create:
            with site._lock:
                site._made()
        try:
            site.refresh()
        except JournalCorrupt:
            if not damaged:
                raise
        return site

    def __len__(self) -> int:
        """Labelled scans in force."""
        return len(self._state.events)

    def corrections(self, seen: Sequence[Seen]) -> np.ndarray:
        """(n,) years to add to each `raw_age`; 0 where nothing was taught."""
        self.refresh()
        return self._corrections(self._state.correction, seen)

    # --- teaching ------------------------------------------------------------------------------

    def preview(self, seen: Seen, age: float, *, earlier: Sequence[Seen] = ()) -> Lesson:
        """What `teach` would do, without doing it.

        Raises:
            SiteError: it cannot be taught at all.
        """
        started = time.perf_counter()
        age = _checked(seen, age)
        with self._lock:
            self.refresh()
            lesson, _ = self._draft(self._state, seen, age, earlier)
        return replace(lesson, seconds=time.perf_counter() - started)

    def teach(
        self,
        seen: Seen,
        age: float,
        *,
        earlier: Sequence[Seen] = (),
        force: bool = False,
        uid: str | None = None,
    ) -> Lesson:
        """Learn the age of a scan; what is returned is on disk, unless it is refused.

        Args:
            seen: the scan, `BrainAge.look`. The same one again replaces its age.
            age: of the person, years.
            earlier: scans whose predictions before and after are told.
            force: learn even if it is odd, or moves what the model knows of other scanners.
            uid: 32 hex digits by which a lesson that arrives twice is known; a new one by default.

        Raises:
            AlreadyTaught: a lesson of that uid was taught, even if it was undone or erased.
            SiteError: it cannot be taught at all.
            JournalError: the profile cannot be written.
        """
        started = time.perf_counter()
        age = _checked(seen, age)
        with self._lock:
            self.refresh()
            if self._journal is None:
                # The first lesson: if it is refused, not even a file is left behind.
                lesson, _ = self._draft(self._state, seen, age, earlier)
                if lesson.refused and not force:
                    return replace(lesson, seconds=time.perf_counter() - started)
            with self._writing() as (writing, state):
                self._check_new(writing, uid)
                lesson, event = self._draft(state, seen, age, earlier)
                if lesson.refused and not force:
                    return replace(lesson, seconds=time.perf_counter() - started)
                writing.deactivate(e.seq for e in state.events if e.subject == event.subject)
                kept = writing.append(TEACH, event.subject, event.details, event.arrays, uid=uid)
            self._taught[kept.uid] = self._features(seen)
            self._changed()
        lesson = replace(lesson, entry=kept.seq, refused=None)
        return replace(lesson, seconds=time.perf_counter() - started)

    def undo(self, entry: int | None = None) -> SiteEntry:
        """Take back a lesson, by default the newest in force.

        If it had replaced an earlier age of the same scan, that one is in force again.

        Raises:
            SiteError: there is nothing to undo.
            JournalError: the profile cannot be written.
        """
        with self._lock:
            self._needed()
            with self._writing() as (writing, _):
                lessons = [e for e in writing.events(active=None) if e.kind == TEACH]
                event = self._to_undo(lessons, entry)
                writing.deactivate([event.seq])
                same = [e for e in lessons if e.subject == event.subject and e.seq < event.seq]
                replaced = event.details.get("replaces")
                writing.activate(e.seq for e in same if e.uid == replaced)
            self._changed()
        return _entry(replace(event, active=False))

    def forget(self, entry: int | None = None) -> int:
        """Erase every trace of a lesson, or of all; this cannot be undone.

        Returns:
            How many lessons are gone.

        Raises:
            SiteError: there is no such lesson.
        """

        def chosen(events: list[Event]) -> list[Event]:
            found = [event for event in events if entry in (None, event.seq)]
            if entry is not None and not found and entry not in broken:
                raise SiteError(self._no_lesson(entry, events))
            return found

        with self._lock:
            if entry is not None:
                self._needed()
            self._taught.clear()
            broken = {each.seq for each in self.damaged()}
            return self._erase(chosen, lambda each: entry in (None, each.seq))

    def taught(self) -> list[Seen]:
        """The labelled scans in force, as the journal keeps them, with the ages told."""
        self.refresh()
        return [_seen_again(event, len(self._brain.model.members)) for event in self._state.events]

    # --- looking, files ------------------------------------------------------------------------

    def history(self) -> list[SiteEntry]:
        """All lessons, oldest first, undone ones included."""
        return [_entry(event) for event in self._lessons()]

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write all lessons into one file; returns how many.

        Raises:
            SiteError: nothing was taught.
            JournalError: it cannot be written, or would be too large to be read again.
        """
        with self._lock:
            return self._needed().export(path)

    # --- inside --------------------------------------------------------------------------------

    def _accept(self, header: dict[str, Any], events: list[Event]) -> None:
        """Refuse lessons from elsewhere that this site could not use."""
        try:
            for event in events:
                _check_event(event)
                self._features_stored(event)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise JournalCorrupt(f"the file is refused: {reason}; nothing was imported") from None

    def _draft(
        self, state: _State, seen: Seen, age: float, earlier: Sequence[Seen]
    ) -> tuple[Lesson, Event]:
        features = self._features(seen)
        # A journal's arrays have four axes at most: members and channels share one.
        stored = np.concatenate(np.asarray(seen.block_inputs, np.float16))
        same = _same_scan(state.events, stored)
        subject = hashlib.sha256(stored.tobytes()).hexdigest()[:16]
        if same is not None:
            subject = same.subject
        details = {
            "name": seen.name[:200],
            "age": age,
            "raw_age": float(seen.raw_age),
            "replaces": same.uid if same is not None else None,
        }
        seq = state.events[-1].seq + 1 if state.events else 1
        event = Event(
            seq, f"{0:032x}", 0.0, TEACH, subject, details, {_INPUTS: stored}, (seq,), True
        )
        rows = [(e, self._features_stored(e)) for e in state.events if e is not same]
        after = self._fit([*rows, (event, features)])
        own, others = ([seen], earlier)
        before_own, after_own = (self._corrections(c, own) for c in (state.correction, after))
        before, then = (self._corrections(c, others) for c in (state.correction, after))
        raw = np.array([each.raw_age for each in earlier], np.float64)
        protected = after.protected()
        now = max(0.0, seen.raw_age + float(before_own[0]))
        # That the model has learnt from no such ages is said of the age told, not of the scan.
        flags = [*(flag for flag in seen.flags if flag.name != "age"), *self._brain.beyond(now)]
        lesson = Lesson(
            entry=None,
            name=seen.name,
            age=age,
            before=now,
            after=max(0.0, seen.raw_age + float(after_own[0])),
            earlier_before=np.maximum(0.0, raw + before),
            earlier_after=np.maximum(0.0, raw + then),
            protected=protected,
            refused=_verdict(seen.raw_age, age, protected, flags),
            stored_bytes=stored.nbytes,
            seconds=0.0,
        )
        return lesson, event

    def _derive(self, events: Sequence[Event], version: int | None) -> _State:
        taught = sorted((e for e in events if e.kind == TEACH), key=lambda e: e.seq)
        standing = {event.subject: event for event in taught}  # the newest of each scan
        kept = tuple(sorted(standing.values(), key=lambda e: e.seq))
        for event in kept:
            _check_event(event)
        known = {event.uid for event in kept}
        self._taught = {uid: row for uid, row in self._taught.items() if uid in known}
        if not kept:
            return _State(version)
        return _State(version, kept, self._fit([(e, self._features_stored(e)) for e in kept]))

    def _fit(self, rows: Sequence[tuple[Event, np.ndarray]]) -> Correction:
        """By subject, whatever the order of teaching: sums then give the same bits."""
        ordered = sorted(rows, key=lambda row: row[0].subject)
        return Correction.fit(
            self._population,
            Taught(
                np.stack([features for _, features in ordered]),
                np.array([event.details["raw_age"] for event, _ in ordered], np.float64),
                np.array([event.details["age"] for event, _ in ordered], np.float64),
            ),
        )

    def _corrections(self, correction: Correction | None, seen: Sequence[Seen]) -> np.ndarray:
        if correction is None or not len(seen):
            return np.zeros(len(seen))
        raw = np.array([each.raw_age for each in seen], np.float64)
        return correction([self._features(each) for each in seen], raw)

    def _features(self, seen: Seen) -> np.ndarray:
        return _remembered(self._brain, seen)

    def _features_stored(self, event: Event) -> np.ndarray:
        if event.uid not in self._taught:
            inputs = _inputs(event, len(self._brain.model.members))
            self._taught[event.uid] = _checked_features(self._brain, self._population, inputs)
        return self._taught[event.uid]


def list_sites(brain: BrainAge, scope: str = LOCAL) -> list[str]:
    """Names of the profiles that this model was taught under, in alphabetical order.

    Raises:
        ProfileError: the scope cannot be one.
    """
    return list_journals(journal_of(brain), scope)


def journal_of(brain: BrainAge) -> str:
    """File name of the journals of a model's profiles."""
    return journal_name("brain", brain.sha256)


# --- features, kept as long as the scans they are of ---------------------------------------------

_memory: dict[tuple[int, str], np.ndarray] = {}


def ready(brain: BrainAge, seen: Seen) -> None:
    """Compute what teaching reads of a scan, 70 ms, so that a lesson need not wait for it.

    A model without statistics of its training scans cannot be taught; then nothing is done.
    """
    if brain.model.population is not None:
        _remembered(brain, seen)


def _remembered(brain: BrainAge, seen: Seen) -> np.ndarray:
    key = (id(seen), brain.sha256)
    found = _memory.get(key)
    if found is None:
        population = brain.model.population
        if population is None:
            raise SiteError("this model file has no statistics of its training scans")
        found = _checked_features(brain, population, seen.block_inputs)
        _memory[key] = found
        weakref.finalize(seen, _memory.pop, key, None)
    return found


def _checked_features(brain: BrainAge, population: Population, inputs: np.ndarray) -> np.ndarray:
    """Features of what the last blocks read.

    Raises:
        SiteError: it is of another model.
    """
    try:
        features = features_of(brain.model, inputs)
    except (ValueError, RuntimeError):
        features = np.empty(0)
    if features.shape != population.mean.shape or not np.isfinite(features).all():
        raise SiteError(
            f"what the last blocks read has shape {np.shape(inputs)}, which this model cannot "
            "use; look at the scan with the model that is taught"
        )
    return features


# --- what can be taught --------------------------------------------------------------------------


def check_age(age: float) -> float:
    """An age that somebody can have, as a float.

    Raises:
        SiteError: nobody can have it.
    """
    low, high = AGES
    if isinstance(age, bool) or not isinstance(age, int | float | np.floating | np.integer):
        raise SiteError(f"got age {age!r:.40}, give years as a number, such as 63.4")
    if not low <= age <= high:  # NaN, too
        raise SiteError(f"got age {age:g}, valid is {low:.0f} to {high:.0f} years")
    return float(age)


def _checked(seen: Seen, age: float) -> float:
    """The age; SiteError if this cannot be taught, forced or not."""
    age = check_age(age)
    fatal = next((flag for flag in seen.flags if flag.fatal), None)
    if fatal is not None:
        raise SiteError(f"this scan is refused ({fatal.text}), so nothing can be learnt from it")
    if not math.isfinite(seen.raw_age):
        raise SiteError("the model gives this scan no age, so nothing can be learnt from it")
    return age


def _verdict(predicted: float, age: float, protected: float, flags: Sequence[Flag]) -> str | None:
    """Why it is not learnt unless forced: all of it, so that who forces it knows what."""
    low, high = USUAL_AGES
    against = []
    if abs(age - predicted) > FAR:
        against.append(
            f"the age told is {age:.1f}, the model says {predicted:.1f}: more than {FAR:.0f} "
            "years apart; is it this person's age, in years?"
        )
    if not low <= age <= high:
        against.append(
            f"the age told is {age:g}, and lessons from outside {low:.0f} to {high:.0f} years move "
            "later ages far"
        )
    if protected > MOST_MOVED:
        moved, _ = told_apart(protected, MOST_MOVED, digits=2)
        against.append(
            f"ages of scans like those the model was trained on would move by {moved} "
            f"years (root mean square), more than {MOST_MOVED:g}"
        )
    if flags:
        against.append(f"the scan is flagged: {flags[0].text}")
    return "; ".join(against) or None


def _check_event(event: Event) -> None:
    """Raise JournalCorrupt unless the lesson is one of ours."""
    details, inputs = event.details, event.arrays.get(_INPUTS)
    numbers = [details.get(key) for key in ("age", "raw_age")]
    right = event.kind == TEACH and set(event.arrays) == {_INPUTS} and inputs is not None
    right = right and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
    right = right and isinstance(details.get("name"), str) and len(details["name"]) <= 200
    right = right and isinstance(details.get("replaces"), str | None)
    if not right or not AGES[0] <= details["age"] <= AGES[1] or abs(details["raw_age"]) > 1000:
        raise JournalCorrupt(f"entry {event.seq} is no lesson of a brain's age; forget it to go on")


def _same_scan(events: Sequence[Event], stored: np.ndarray) -> Event | None:
    row = stored.astype(np.float32).ravel()
    for event in events:
        other = event.arrays[_INPUTS]
        if other.shape == stored.shape:
            gap = np.linalg.norm(other.astype(np.float32).ravel() - row)
            if gap <= _SAME * np.linalg.norm(row):
                return event
    return None


def _seen_again(event: Event, members: int) -> Seen:
    details = event.details
    return Seen(
        details["name"],
        details["raw_age"],
        np.full((members, 1), details["raw_age"]),
        _inputs(event, members),
        [],
        math.nan,
        details["age"],
    )


def _inputs(event: Event, members: int) -> np.ndarray:
    """(members, channels, i, j, k) of a lesson.

    Raises:
        SiteError: it is of another model.
    """
    stored = event.arrays[_INPUTS]
    if stored.ndim != 4 or len(stored) % members:
        raise SiteError(f"entry {event.seq} was taught to another model; forget it to go on")
    return stored.reshape(members, -1, *stored.shape[1:])


def _entry(event: Event) -> SiteEntry:
    details = event.details
    return SiteEntry(
        event.seq,
        event.at,
        details["name"],
        details["age"],
        max(0.0, details["raw_age"]),
        event.active,
    )
