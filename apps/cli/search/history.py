"""`enn search history`, `undo`, `forget` and `profiles`: what was taught, and taking it back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.options import JsonOption, ProfileOption
from apps.cli.search.group import IndexOption, find_index, open_taught, teacher_of
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    confirm_erasing,
    counted,
    emit,
    emit_json,
    note,
    note_damaged,
    printable,
    quote,
)

if TYPE_CHECKING:
    from retrieval.teach.reports import HistoryEntry

__all__ = ["app", "forget", "history", "profiles", "undo"]

app = typer.Typer(rich_markup_mode=None)

_SHOWN_IDS = 12


@app.command(
    "history",
    epilog="""\b
Examples:
  enn search history
  enn search history --profile anna --json

\b
Exit codes: 0 ok, also when nothing was taught; 1 a lesson is damaged; 2 user error.""",
)
def history(
    profile: ProfileOption = None, index: IndexOption = None, json: JsonOption = False
) -> int:
    """List what was taught, oldest first.

    Prints number, time, query and marks of every lesson, also of those that are undone.
    """
    with open_taught(index, profile, damaged=True) as searcher:
        lessons = searcher.history() if searcher.teacher is not None else []
        damaged = searcher.teacher.damaged() if searcher.teacher is not None else []
    note_damaged(damaged)
    if json:
        emit_json([_entry(lesson) for lesson in lessons])
        return EXIT_SKIPPED if damaged else EXIT_OK
    if not lessons and not damaged:
        note("nothing was taught yet; `enn search teach` does it")
    for lesson in lessons:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(lesson.at))
        undone = "" if lesson.active else "  (undone)"
        kept = "  (query kept as it is)" if lesson.kept_text and lesson.active else ""
        emit(f"{lesson.entry:>5}  {when}  {_told(lesson)}{undone}{kept}")
    return EXIT_SKIPPED if damaged else EXIT_OK


def _told(lesson: HistoryEntry) -> str:
    kinds = {"good": lesson.good, "bad": lesson.bad, "unmark": lesson.unmarked}
    marks = "; ".join(f"{kind} {_listed(ids)}" for kind, ids in kinds.items() if ids)
    return f"{quote(lesson.shown)}: {marks}"


def _listed(ids: Sequence[int]) -> str:
    shown = ",".join(map(str, ids[:_SHOWN_IDS]))
    return shown if len(ids) <= _SHOWN_IDS else f"{shown} and {len(ids) - _SHOWN_IDS:,} more"


def _entry(lesson: HistoryEntry) -> dict[str, Any]:
    return {
        "lesson": lesson.entry,
        "at": lesson.at,
        "query": lesson.query,
        "shown": lesson.shown,
        "good": list(lesson.good),
        "bad": list(lesson.bad),
        "unmarked": list(lesson.unmarked),
        "rule": lesson.rule,
        "active": lesson.active,
        "kept_text": lesson.kept_text,
    }


@app.command(
    "undo",
    epilog="""\b
Examples:
  enn search undo          the newest lesson that is not undone
  enn search undo 2        lesson 2 of `enn search history`, whatever came after it

\b
Exit codes: 0 ok, 2 user error (no such lesson, undone already, ...).""",
)
def undo(
    lesson: Annotated[
        int | None,
        typer.Argument(metavar="N", min=1, help="Number of the lesson.", show_default=False),
    ] = None,
    profile: ProfileOption = None,
    index: IndexOption = None,
    json: JsonOption = False,
) -> int:
    """Take back a lesson: searches are as if it had never been given."""
    with open_taught(index, profile) as searcher:
        name = teacher_of(searcher).name
        undone = searcher.undo(lesson)
    if json:
        emit_json({"profile": name, **_entry(undone)})
    else:
        emit(f"lesson {undone.entry} of profile {name} is undone: {_told(undone)}")
    return EXIT_OK


@app.command(
    "forget",
    epilog="""\b
Examples:
  enn search forget "a dog in the snow"          every lesson on this query
  enn search forget --profile anna --yes         everything this profile was taught

\b
Exit codes: 0 ok, 2 user error (no lesson on that query, not confirmed, ...).""",
)
def forget(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY", help="Forget this query alone.", show_default=False),
    ] = None,
    profile: ProfileOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    index: IndexOption = None,
    json: JsonOption = False,
) -> int:
    """Erase lessons for good: all, or those on one query.

    Unlike after `undo`, nothing of them stays readable: no words, no marks, no numbers. Files that
    were exported are not touched.
    """
    query = " ".join(" ".join(text or []).split()) or None
    with open_taught(index, profile, damaged=True) as searcher:
        teacher = teacher_of(searcher)
        lessons = [each for each in searcher.history() if query in (None, each.query)]
        broken = [each for each in teacher.damaged() if query in (None, each.subject)]
        what = f"on {quote(query)}" if query is not None else f"of profile {teacher.name}"
        many = len(lessons) + len(broken)
        if query is not None and not many:
            raise CommandError(
                f"profile {teacher.name} has no lesson {what}; `enn search history` lists them"
            )
        if many and not yes:
            confirm_erasing(f"{counted(many, 'lesson')} {what}")
        count = searcher.forget(query)
        name = teacher.name
    if json:
        emit_json({"profile": name, "query": query, "forgotten": count})
    else:
        emit(f"{counted(count, 'lesson')} {what} erased")
    return EXIT_OK


@app.command(
    "profiles",
    epilog="""\b
Examples:
  enn search profiles
  ENN_PROFILES=/data/profiles enn search profiles

\b
Exit codes: 0 ok, 1 a profile cannot be read, 2 user error.""",
)
def profiles(index: IndexOption = None, json: JsonOption = False) -> int:
    """List the profiles that the index's model was taught under.

    Profiles lie in this user's data directory, or in the one that ENN_PROFILES names.
    """
    from enn_core.lessons.errors import JournalError
    from retrieval.search import open_index
    from retrieval.teach.profiles import list_profiles, profiles_dir
    from retrieval.teach.teacher import Teacher

    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    with open_index(find_index(index)) as searcher:
        for name in list_profiles(searcher.model):
            try:
                with Teacher.open(searcher.model, name) as teacher:
                    lessons = sum(lesson.active for lesson in teacher.history())
                    rows.append({"profile": name, "lessons": lessons, "queries": len(teacher)})
                    rows[-1] |= {"rule": teacher.rule, "file": str(teacher.path)}
            except JournalError as error:
                broken.append(f"profile {name} cannot be read: {error}")
    if json:
        emit_json(rows)
    for row in () if json else rows:
        queries = counted(row["queries"], "query", "queries")
        emit(f"{row['profile']:<16} {counted(row['lessons'], 'lesson')} on {queries}")
    if not rows and not broken:
        note(f"no profile in {quote(profiles_dir())} yet; `enn search teach` makes one")
    for line in broken:
        note(printable(line))
    return EXIT_SKIPPED if broken else EXIT_OK
