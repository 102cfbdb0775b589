"""Teaching a model by marking results good or bad; it lasts, and can be undone.

>>> import retrieval                                                    # doctest: +SKIP
>>> photos = retrieval.open_index("Photos", profile="me")               # doctest: +SKIP
>>> photos.teach("a dog in the snow", good=[12, 40], bad=[7])           # doctest: +SKIP
>>> photos.search("dogs playing in winter")                             # doctest: +SKIP
>>> photos.undo()                                                       # doctest: +SKIP

Every lesson is an event in the profile's journal, on disk before `teach` returns. What a profile
knows is a function of its active events: the same on every replay, whatever the order of teaching.
Neither the weights nor the stored vectors change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from enn_core.lessons.errors import JournalCorrupt
from enn_core.lessons.events import TEACH, Event, latest
from enn_core.lessons.journal import Journal
from enn_core.lessons.journal_file import HEADER_LOST
from enn_core.lessons.profile import Profile
from retrieval.index.manifest import Manifest
from retrieval.queries import Asked, Mapping, QueryModel
from retrieval.teach import guard, local_rule
from retrieval.teach.effects import Effect, effects_of
from retrieval.teach.fitting import Fit, fit_marks
from retrieval.teach.knowledge import (
    ADAPTER,
    LOCAL_RULE,
    LOOKUP,
    NOTHING,
    REFIT,
    RULES,
    UPGRADE,
    Knowledge,
    check_event,
    derive,
    lessons_on,
    marks_of,
    merged,
    rule_of,
    settled,
    stored_vectors,
)
from retrieval.teach.lookup import Recalled, near_pictures
from retrieval.teach.marks import (
    BAD,
    GOOD,
    MOST_MARKS,
    WITHDRAWN,
    Mark,
    Subject,
    TeachError,
    checked_ids,
    direction,
    find,
    known,
    merge,
    subject_of,
    words_of,
)
from retrieval.teach.profiles import DEFAULT, LOCAL, check_name, profile_path
from retrieval.teach.reports import HistoryEntry, Lesson, Upgrade, history_entry

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex
    from retrieval.queries import Picture

__all__ = ["RULES", "Effect", "HistoryEntry", "Lesson", "TeachError", "Teacher"]


@dataclass(frozen=True, eq=False)
class _Request:
    """A lesson as it was asked for, checked."""

    subject: Subject
    c: npt.NDArray[np.float16]  # (r,) unit, as it is stored
    marks: list[Mark]  # withdrawals last


@dataclass(frozen=True, eq=False)
class _Draft:
    """A lesson before it is written."""

    lesson: Lesson
    details: dict[str, Any]
    arrays: dict[str, np.ndarray]
    covers: tuple[int, ...]
    state: Knowledge


class Teacher(Profile[Knowledge]):
    """One profile of one model. Safe to use from several threads, and beside other processes."""

    error = TeachError

    def __init__(self, model: QueryModel, name: str, path: Path) -> None:
        """Use `open`."""
        super().__init__(name, path, _identity(model), NOTHING)
        self._model = model
        self._anchors: np.ndarray | None = None
        self._guard = guard.Guard()

    @classmethod
    def open(
        cls,
        model: QueryModel,
        profile: str = DEFAULT,
        *,
        scope: str = LOCAL,
        path: str | PathLike[str] | None = None,
        damaged: bool = False,
    ) -> Teacher:
        """Open a profile; nothing is written before the first lesson.

        Args:
            model: the model that is taught.
            profile: name of the profile.
            scope: whose profile it is, see `retrieval.teach.profiles`.
            path: the journal file, instead of the profile's own place.
            damaged: open it even if entries are damaged, to list and forget them.

        Raises:
            ProfileError: if the name cannot be one.
            JournalMismatch: if the journal belongs to another model.
            JournalCorrupt: if it is damaged.
        """
        place = profile_path(profile, model, scope) if path is None else Path(path)
        teacher = cls(model, check_name(profile), place)
        try:
            teacher.refresh()
        except JournalCorrupt:
            if not damaged:
                raise
        return teacher

    def __len__(self) -> int:
        """Number of taught queries."""
        return len(self._state.taught)

    @property
    def rule(self) -> str | None:
        """One of `RULES`; None before the first lesson."""
        return self._state.rule

    @property
    def mapping(self) -> Mapping:
        """What was taught, as one consistent value while others go on teaching."""
        return self._state.mapping

    @property
    def delta(self) -> npt.NDArray[np.float32] | None:
        """(r,) taught spectrum over the base spectrum; None if it is unchanged."""
        return self._state.mapping.delta

    @property
    def knows_pictures(self) -> bool:
        """Whether something was taught that changes searches with a picture."""
        mapping = self._state.mapping
        if isinstance(mapping, Recalled):
            return len(mapping.pictures) + len(mapping.mixed) > 0
        return mapping.delta is not None

    def map(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """(N, r) taught coordinates of text queries (N, r)."""
        return self._state.mapping.map(rows)

    # --- teaching ------------------------------------------------------------------------------

    def preview(
        self,
        index: EigenIndex,
        text: str | None,
        good: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        image: Picture | None = None,
        like: int | None = None,
        unmark: Iterable[int] = (),
        rule: str | None = None,
    ) -> Lesson:
        """What `teach` would do, without doing it."""
        return self.draft(index, text, good, bad, image=image, like=like, unmark=unmark, rule=rule)[
            0
        ]

    def draft(
        self,
        index: EigenIndex,
        text: str | None,
        good: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        image: Picture | None = None,
        like: int | None = None,
        unmark: Iterable[int] = (),
        rule: str | None = None,
    ) -> tuple[Lesson, Mapping]:
        """`preview` with the mapping that the lesson would lead to, for a look at its ranking."""
        started = time.perf_counter()
        request = self._request(index, (text, image, like), good, bad, unmark)
        with self._lock:
            self.refresh()
            draft = self._draft(index, request, self._state, self._chosen(rule))
        return _timed(draft.lesson, started), draft.state.mapping

    def teach(
        self,
        index: EigenIndex,
        text: str | None,
        good: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        image: Picture | None = None,
        like: int | None = None,
        unmark: Iterable[int] = (),
        rule: str | None = None,
        force: bool = False,
        uid: str | None = None,
    ) -> Lesson:
        """Learn from marks; what is returned is on disk.

        Args:
            index: where the marked pictures are.
            text: words of the query, with weights and signs as in a search; None for a picture.
            good, bad: ids of pictures that are good and bad answers to it.
            image: picture of the query, alone or beside words: path, file bytes or PIL image.
            like: id of the picture in the index that others are looked for by.
            unmark: ids whose earlier marks for this query are taken back.
            rule: one of `RULES`, the first by default; a profile keeps to that of its first lesson.
            force: learn even if it hurts other queries.
            uid: 32 hex digits by which a lesson that arrives twice is known; a new one by default.

        Raises:
            AlreadyTaught: if a lesson of that uid was taught, even if it was undone or erased.
            TeachError, QueryError: if it cannot be taught, one line.
            IndexMismatch: if the index belongs to another model.
            JournalBusy: if another process keeps the profile locked.
            JournalError: if the profile cannot be written.
        """
        started = time.perf_counter()
        request = self._request(index, (text, image, like), good, bad, unmark)
        with self._lock:
            if self._existing() is None:
                # The first lesson: if it is refused, not even a file is left behind.
                draft = self._draft(index, request, self._state, self._chosen(rule))
                if draft.lesson.refused and not force:
                    return _timed(draft.lesson, started)
            with self._writing() as (writing, state):
                self._check_new(writing, uid)
                draft = self._draft(index, request, state, self._chosen(rule))
                if draft.lesson.refused and not force:
                    return _timed(draft.lesson, started)
                event = writing.append(
                    TEACH, request.subject.line, draft.details, draft.arrays, draft.covers, uid=uid
                )
            self._state = settled(draft.state, event)
        lesson = replace(draft.lesson, entry=event.seq, refused=None)
        return _timed(lesson, started)

    def undo(self, entry: int | None = None, *, index: EigenIndex | None = None) -> HistoryEntry:
        """Take back a lesson, by default the newest that is not undone.

        Args:
            entry: its number in the history.
            index: where the pictures are; needed if later lessons on the same query remain, which
                must be fitted again without it.

        Raises:
            TeachError: if there is nothing to undo, or the remaining marks cannot be fitted.
            JournalError: if the profile cannot be written.
        """
        with self._lock:
            self._needed()
            with self._writing() as (writing, state):
                lessons = [e for e in writing.events(active=None) if e.kind == TEACH]
                event = self._to_undo(lessons, entry)
                writing.deactivate([event.seq])
                remaining = [e for e in state.events if e.seq != event.seq]
                refit = self._refit(remaining, event.subject, str(state.rule), index)
                if refit is not None:
                    writing.append(REFIT, event.subject, *refit)
            self._changed()
        return history_entry(replace(event, active=False))

    def forget(self, text: str | None = None) -> int:
        """Erase every trace of a query's lessons, or of all; this cannot be undone.

        Returns:
            How many lessons are gone.
        """
        subject = None if text is None else words_of(text)

        def chosen(events: list[Event]) -> list[Event]:
            return [event for event in events if subject in (None, event.subject)]

        with self._lock:
            self._guard.forget()
            return self._erase(chosen, lambda damaged: subject in (None, damaged.subject))

    def upgrade(self, index: EigenIndex, *, preview: bool = False) -> Upgrade:
        """Look up what was taught by the rule "adapter"; the lessons themselves stay as they are.

        Args:
            index: on whose pictures both rules are compared.
            preview: change nothing.

        Raises:
            TeachError: if nothing was taught by that rule.
            JournalError: if the profile cannot be written.
        """
        index.check_model(self._model)
        with self._lock:
            self._needed()
            with self._writing() as (writing, state):
                if state.rule != ADAPTER:
                    raise TeachError(
                        f"the profile {self.name!r} has nothing to upgrade; its rule is "
                        f"{state.rule or RULES[0]!r}"
                    )
                seq = state.events[-1].seq + 1
                details = {"rule": LOOKUP}
                event = Event(seq, f"{0:032x}", 0.0, UPGRADE, "", details, {}, (), True)
                after = derive((*state.events, event), state.version, self._protected(), state)
                found = self._guard.compare(index, self._protected(), state, after, "")
                if not preview:
                    writing.append(UPGRADE, "", details, {}, ())
            if not preview:
                self._changed()
        return Upgrade(len(state.taught), found["overlap"], found["worse"], not preview)

    # --- looking -------------------------------------------------------------------------------

    def history(self) -> list[HistoryEntry]:
        """All lessons, oldest first, undone ones included."""
        return [history_entry(event) for event in self._lessons()]

    def marks(
        self,
        text: str | None,
        index: EigenIndex | None = None,
        *,
        image: Picture | None = None,
        like: int | None = None,
    ) -> dict[int, bool]:
        """The marks that hold for a query: id -> whether it is good.

        Args:
            text, image, like: the query, as `teach`.
            index: if given, only pictures that it has.
        """
        self.refresh()
        subject = subject_of(text, image, like=like, index=index)
        marks = marks_of(self._state.events, subject.line)
        if index is None:
            return {mark.id: mark.sign == GOOD for mark in marks}
        found = find(index, marks)
        return {**dict.fromkeys(found.good, True), **dict.fromkeys(found.bad, False)}

    def answering(
        self, asked: npt.NDArray[np.floating], kind: Asked = "words"
    ) -> list[tuple[str, float]]:
        """The taught queries that a search follows now, and the share of each, greatest first.

        Args:
            asked: (r,) direction of the search without teaching, see `Ranked`.
            kind: what it consists of.

        Returns:
            nothing where nothing taught is near, and under rules that do not look up.
        """
        state = self._state
        if not isinstance(state.mapping, Recalled):
            return []
        shares = state.mapping.shares(kind, np.asarray(asked, np.float64)[None])[0]
        if not shares.any():
            return []
        lines = state.lines(kind)
        order = np.argsort(-shares, kind="stable")
        return [(lines[i], float(shares[i])) for i in order if shares[i] > 0]

    def effects(self, index: EigenIndex) -> list[Effect]:
        """Where the marked pictures of every taught query stand, without and with teaching."""
        self.refresh()
        return effects_of(self._state, index)

    # --- files ---------------------------------------------------------------------------------

    def export(self, path: str | PathLike[str]) -> int:
        """Write everything taught into one file.

        Returns:
            The number of lessons in it.
        """
        with self._lock:
            self._needed().export(path)
        return len(self.history())

    def _accept(self, header: dict[str, Any], events: list[Event]) -> None:
        """Refuse lessons from elsewhere that this profile could not use."""
        try:
            for event in events:
                check_event(event, self._model.dim)
        except ValueError as error:
            raise JournalCorrupt(f"the file is refused: {error}; nothing was imported") from None
        held = self._journal.events() if self._journal is not None else []
        here, there = rule_of(e for e in held if e.active), rule_of(e for e in events if e.active)
        if None in (here, there) or here == there or (here, there) == (LOOKUP, ADAPTER):
            return
        if (here, there) == (ADAPTER, LOOKUP):
            raise TeachError(
                f"the lessons are of the rule {LOOKUP!r}, those of the profile {self.name!r} of "
                f"{ADAPTER!r}; `enn search upgrade --lessons` first, or import them into another "
                "profile"
            )
        raise TeachError(
            f"the lessons were taught by different rules ({here}, {there}); import them into "
            "another profile"
        )

    # --- inside --------------------------------------------------------------------------------

    def _request(
        self,
        index: EigenIndex,
        asked: tuple[str | None, Picture | None, int | None],
        good: Iterable[int],
        bad: Iterable[int],
        unmark: Iterable[int],
    ) -> _Request:
        index.check_model(self._model)
        text, image, like = asked
        subject = subject_of(text, image, like=like, index=index)
        good_ids, bad_ids, unmark_ids = checked_ids(good, bad, unmark)
        prints = known(index, [*good_ids, *bad_ids])
        # In turns, so that whoever takes the first few takes some of both.
        turns = chain.from_iterable(zip_longest(good_ids, bad_ids))
        liked = set(good_ids)
        marks = [
            Mark(id_, prints[id_], GOOD if id_ in liked else BAD)
            for id_ in turns
            if id_ is not None
        ]
        marks += [Mark(id_, "", WITHDRAWN) for id_ in unmark_ids]
        if subject.kind == "words":
            text = subject.line
        c = direction(self._model, index, text, image, like)
        length = np.linalg.norm(c)
        if not np.isfinite(c).all() or length == 0:
            raise TeachError("the model gives this query no direction; use another one")
        return _Request(subject, (c / length).astype(np.float16), marks)

    def _draft(self, index: EigenIndex, request: _Request, state: Knowledge, rule: str) -> _Draft:
        subject = request.subject
        query = subject.line
        if subject.kind != "words" and rule != LOOKUP:
            others = "`enn search upgrade --lessons` changes that; or " if rule == ADAPTER else ""
            raise TeachError(
                f"the profile {self.name!r} is taught by the rule {rule!r}, which knows words "
                f"alone; {others}use another profile to teach about a picture"
            )
        lessons = lessons_on(state.events, query)
        before = merged(lessons)
        marked = {mark.id for mark in before}
        for mark in request.marks:
            if mark.sign == WITHDRAWN and mark.id not in marked:
                raise TeachError(f"{mark.id} has no mark for this query that could be taken back")
        marks = merge([before, request.marks])
        if len(marks) > MOST_MARKS:
            raise TeachError(f"too many marks; at most {MOST_MARKS:,} are kept per query")
        found = find(index, marks)
        covers = tuple(each.seq for each in lessons)
        details: dict[str, Any] = {
            "marks": [mark.as_json() for mark in request.marks],
            "rule": rule,
            "marks_left": len(marks),
            "kept_text": False,
        }
        if subject.kind != "words":
            near = near_pictures(request.c.astype(np.float64), index.sample(guard.SAMPLE))
            details |= {"kind": subject.kind, "picture": subject.name, "near": list(near)}
        arrays: dict[str, np.ndarray] = {"c": request.c}
        if rule == LOCAL_RULE:
            rows = dict(zip(found.good, found.good_vectors, strict=True))
            rows |= zip(found.bad, found.bad_vectors, strict=True)
            kept = [rows[mark.id] for mark in request.marks if mark.sign != WITHDRAWN]
            marked_rows = np.array(kept[: local_rule.MOST_STORED], np.float16)
            arrays["marked"] = marked_rows.reshape(-1, index.dim)
        seq = state.events[-1].seq + 1 if state.events else 1
        event = Event(seq, f"{0:032x}", 0.0, TEACH, query, details, arrays, (*covers, seq), True)
        if rule == LOCAL_RULE:
            fit = fit_marks(request.c, *stored_vectors([*lessons, event]))
        else:
            start = request.c
            held = state.current.get(query)
            if found.ignored and held is not None and "b" in held.arrays:
                # Marks whose pictures are not here still speak through what was learned from them.
                start = held.arrays["b"]
            fit = fit_marks(
                start, found.good_vectors, found.bad_vectors, index if rule == LOOKUP else None
            )
            if fit is not None:
                arrays["b"] = fit.target.astype(np.float16)
        if fit is None and marks:
            raise TeachError(
                "none of the pictures marked for this query is in this index; open the index that "
                "they were marked in"
            )
        details["kept_text"] = fit is not None and fit.kept_text
        after = derive((*state.events, event), state.version, self._protected(), state)
        lesson = Lesson(
            entry=None,
            query=query,
            shown=subject.shown,
            rule=rule,
            good=found.good,
            bad=found.bad,
            ignored=found.ignored,
            kept_text=bool(details["kept_text"]),
            marks_before=fit.before if fit is not None else math.nan,
            marks_after=fit.after if fit is not None else math.nan,
            **self._guard.compare(index, self._protected(), state, after, query),
            **self._reach(after, event, subject.kind),
            seconds=0.0,
        )
        return _Draft(lesson, details, arrays, covers, after)

    def _reach(self, after: Knowledge, event: Event, kind: Asked) -> dict[str, Any]:
        """The fields of a `Lesson` that tell which generic queries move with it."""
        if not isinstance(after.mapping, Recalled) or kind != "words":
            return {"reaches": (), "untouched": None}
        names, taught = guard.protected_queries(), after.mapping.words
        if event.seq not in after.pairs or len(names) != len(self._protected()):
            return {"reaches": (), "untouched": None}
        # Its pair is the last one.
        shares = taught.shares(self._protected())[:, -1]
        found = sorted(
            ((name, float(share)) for name, share in zip(names, shares, strict=True) if share > 0),
            key=lambda each: -each[1],
        )
        return {"reaches": tuple(found), "untouched": len(names) - len(found)}

    def _refit(
        self, events: Sequence[Event], query: str, rule: str, index: EigenIndex | None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray], tuple[int, ...]] | None:
        """What to append so that a query's remaining lessons hold, None if nothing is missing."""
        lessons = lessons_on(events, query)
        if not lessons or query in latest(events):
            return None
        marks = merged(lessons)
        arrays = {"c": lessons[-1].arrays["c"]}
        if rule == LOCAL_RULE:
            fit = fit_marks(arrays["c"], *stored_vectors(lessons))
        else:
            fit = self._fit_again(arrays["c"], query, marks, index, rule) if marks else None
            if fit is not None:
                arrays["b"] = fit.target.astype(np.float16)
        details = {
            "rule": rule,
            "marks_left": len(marks),
            "kept_text": fit is not None and fit.kept_text,
        }
        newest = lessons[-1].details
        details |= {name: newest[name] for name in ("kind", "picture", "near") if name in newest}
        return details, arrays, tuple(event.seq for event in lessons)

    def _fit_again(
        self, c: np.ndarray, query: str, marks: list[Mark], index: EigenIndex | None, rule: str
    ) -> Fit | None:
        where = "the index that they were marked in"
        again = f"other lessons on {query!r:.80} must be fitted again"
        if index is None:
            raise TeachError(f"{again}: give {where}")
        found = find(index, marks)
        if found.ignored:
            raise TeachError(
                f"{again}, but {len(found.ignored)} of their {len(marks)} marked pictures are not "
                f"in this index; open {where}, or undo those lessons too"
            )
        around = index if rule == LOOKUP else None
        return fit_marks(c, found.good_vectors, found.bad_vectors, around)

    def _protected(self) -> np.ndarray:
        """(m, r) unit coordinates of the protected queries, as the journal keeps them."""
        if self._anchors is None:
            self._anchors = guard.encode_protected(self._model)
        return self._anchors

    def _derive(self, events: Sequence[Event], version: int | None) -> Knowledge:
        if not events:
            return replace(NOTHING, version=version)
        return derive(events, version, self._protected(), self._state)

    # --- the journal ---------------------------------------------------------------------------

    def _header(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {}, {"anchors": self._protected().astype(np.float16)}

    def _opened(self, journal: Journal) -> None:
        header, arrays = journal.header
        anchors = arrays.get("anchors")
        if anchors is None and HEADER_LOST in header:
            return  # today's, where those are lost
        if anchors is None or anchors.ndim != 2 or anchors.shape[1] != self._model.dim:
            raise JournalCorrupt(f"{str(self.path)!r} lacks its protected queries; move it away")
        # Those that this profile was taught with: another version may ship others.
        self._anchors = anchors.astype(np.float64)

    def _chosen(self, rule: str | None) -> str:
        """The rule of a lesson.

        Raises:
            TeachError: if there is no such rule, or the profile keeps another.
        """
        if rule is not None and rule not in RULES:
            raise TeachError(f"no rule is called {rule!r:.40}; valid: {', '.join(RULES)}")
        held = self._state.rule
        if held is not None and rule not in (None, held):
            raise TeachError(
                f"the profile {self.name!r} is taught by the rule {held!r}; leave the rule out, or "
                "use another profile"
            )
        return held or rule or RULES[0]


def _identity(model: QueryModel) -> dict[str, Any]:
    """What a journal belongs to: the weights, and how their last map was factored."""
    manifest = Manifest.of_model(model)
    # Another linear algebra library may factor the same weights with other signs.
    signs = np.packbits(np.asarray(manifest.probe) > 0).tobytes().hex()
    return {"app": "search", "weights": manifest.weights, "dim": manifest.dim, "signs": signs}


def _timed(lesson: Lesson, started: float) -> Lesson:
    return replace(lesson, seconds=time.perf_counter() - started)
