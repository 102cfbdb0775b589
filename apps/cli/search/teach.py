"""`enn search teach`: marks make this and similar searches better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.options import JsonOption, ManyValues, ProfileOption
from apps.cli.search.group import IndexOption, note_cut, open_taught, teacher_of
from apps.cli.search.query import check_picture, naming, picture_named
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    emit,
    emit_json,
    note,
    printable,
    quote,
)

if TYPE_CHECKING:
    from retrieval.queries import Mapping
    from retrieval.search import Searcher
    from retrieval.teach.reports import Lesson

__all__ = ["app", "teach"]

app = typer.Typer(rich_markup_mode=None)

# Places that are looked at for where a picture came from or went to, and moves shown to people.
_DEPTH = 1000
_SHOWN_MOVES = 40
_SHOWN_IDS = 12
_SHOWN_REACH = 3


@app.command(
    "teach",
    cls=ManyValues,
    epilog="""\b
Examples:
  enn search query "a dog in the snow"                        prints ids
  enn search teach "a dog in the snow" --good 12,40 --bad 7
  enn search teach "a dog in the snow" --good 31 --unmark 7   adds to earlier marks
  enn search teach "my cat" --good 3 8 15 --preview           shows what would move
  enn search teach "my cat" --good 3 --profile anna           apart from other profiles
  enn search teach --image beach.jpg --good 12,40             a search with a picture

\b
Exit codes: 0 ok; 1 refused, because other searches would suffer (also of a preview);
2 user error.""",
)
def teach(
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="The query that the marks are about.", show_default=False
        ),
    ] = None,
    good: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IDS",
            help="Pictures that are good answers: ids that `enn search query` prints, "
            "as 12,40 or 12 40.",
            show_default=False,
        ),
    ] = None,
    bad: Annotated[
        list[str] | None,
        typer.Option(metavar="IDS", help="Pictures that are bad answers.", show_default=False),
    ] = None,
    unmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IDS",
            help="Pictures whose earlier marks for this query are taken back.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The picture that was searched with, alone or beside words.",
            show_default=False,
        ),
    ] = None,
    like: Annotated[
        int | None,
        typer.Option(
            metavar="ID",
            min=1,
            help="The picture of the index that others like it were looked for.",
            show_default=False,
        ),
    ] = None,
    profile: ProfileOption = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what would move, and learn nothing.")
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="lookup|adapter|local",
            help="How to learn: queries move as the taught ones near them; by one map of all "
            "queries, as before; or by steps on the model's last layer. A profile keeps to the "
            "rule of its first lesson. [default: lookup]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Learn even if other searches suffer.")
    ] = False,
    k: Annotated[
        int, typer.Option("-k", metavar="N", min=1, help="Number of best places that are compared.")
    ] = 10,
    index: IndexOption = None,
    json: JsonOption = False,
) -> int:
    """Mark results as good or bad; searches are better from then on.

    Similar queries profit, too. The lesson is kept in a profile, apart from the index: it applies
    to every search with the same model, whatever the index, until it is undone. Without --profile
    it goes into the profile "default", which `enn search query` uses by itself.

    Prints what moved: id, old and new place, mark, path. A lesson by which other searches would
    suffer is refused, with numbers.
    """
    query = " ".join(text or [])
    marks: dict[str, Any] = {
        "good": _ids("--good", good),
        "bad": _ids("--bad", bad),
        "unmark": _ids("--unmark", unmark),
        "rule": rule,
    }
    if not any(marks[name] for name in ("good", "bad", "unmark")):
        raise CommandError(
            "nothing is marked; give ids that `enn search query` prints, with --good or --bad"
        )
    if image is not None:
        check_picture(image)
    named = picture_named(query)
    if named is not None:
        if image is not None:
            raise CommandError(f"{quote(named)} is a picture, and --image gives another; give one")
        query, image = "", named
    if like is not None and (query.strip() or image is not None):
        raise CommandError("--like stands alone; leave out the words and --image, or --like")
    if not query.strip() and image is None and like is None:
        raise CommandError("nothing to teach about; give the words, --image FILE, or --like ID")
    asked: dict[str, Any] = {"text": query or None, "image": image, "like": like}
    if preview and force:
        raise CommandError("--preview and --force exclude each other; a preview writes nothing")
    with open_taught(index, profile, new=True) as searcher, naming(image):
        teacher = teacher_of(searcher)
        before = teacher.mapping
        if preview:
            lesson, after = teacher.draft(searcher.index, **asked, **marks)
        else:
            lesson = searcher.teach(**asked, **marks, force=force)
            after = teacher.mapping
        moves = _moves(searcher, asked, lesson, before, after, k)
        name = teacher.name
        note_cut(searcher.model, "the query")
    if json:
        emit_json(_document(lesson, name, preview, moves))
    else:
        _say_lesson(lesson, name, preview)
        if preview or not lesson.refused:
            _say_moves(moves, k)
        else:
            note("nothing was written: --preview shows what would move, --force learns it anyway")
    return EXIT_SKIPPED if lesson.refused else EXIT_OK


def _ids(option: str, given: Sequence[str] | None) -> list[int]:
    """Ids out of `12,40`, `12 40` and repeated options."""
    words = ",".join(given or []).replace(",", " ").split()
    if given and not words:
        raise CommandError(f"{option} is empty; give ids that `enn search query` prints")
    for word in words:
        if not (word.isascii() and word.isdigit()) or len(word) > 19:
            raise CommandError(
                f"{option} {quote(word[:40])} is no id; give ids that `enn search query` prints, "
                "such as 12,40"
            )
    return [int(word) for word in words]


def _ranking(
    searcher: Searcher, asked: dict[str, Any], mapping: Mapping, depth: int
) -> dict[int, int]:
    """Place of each picture by id, 1 for the best."""
    from retrieval.queries import rank

    found = rank(searcher.model, searcher.index, **asked, mapping=mapping, k=depth)
    return {id_: place for place, (id_, _) in enumerate(found.hits, 1)}


def _moves(
    searcher: Searcher,
    asked: dict[str, Any],
    lesson: Lesson,
    before: Mapping,
    after: Mapping,
    k: int,
) -> list[dict[str, Any]]:
    """Marked pictures, and those that are among the best k before or after, if they moved."""
    depth = max(_DEPTH, k)
    old, new = (_ranking(searcher, asked, mapping, depth) for mapping in (before, after))
    marks = {**dict.fromkeys(lesson.good, "good"), **dict.fromkeys(lesson.bad, "bad")}
    best = [id_ for places in (new, old) for id_, place in places.items() if place <= k]
    moved = [id_ for id_ in dict.fromkeys([*best, *marks]) if old.get(id_) != new.get(id_)]
    moved.sort(key=lambda id_: (new.get(id_, depth + 1), old.get(id_, depth + 1)))
    entries, root = searcher.index.entries_of(moved), searcher.index.root or Path()
    return [
        {
            "id": id_,
            "before": old.get(id_),
            "after": new.get(id_),
            "mark": marks.get(id_),
            "path": str(root / entries[id_].path),
        }
        for id_ in moved
        if id_ in entries
    ]


def _document(
    lesson: Lesson, profile: str, preview: bool, moves: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "profile": profile,
        "query": lesson.query,
        "shown": lesson.shown,
        "rule": lesson.rule,
        "preview": preview,
        "lesson": lesson.entry,
        "refused": lesson.refused,
        "good": list(lesson.good),
        "bad": list(lesson.bad),
        "ignored": [{"id": id_, "reason": why} for id_, why in lesson.ignored.items()],
        "kept_text": lesson.kept_text,
        "marks_before": _number(lesson.marks_before),
        "marks_after": _number(lesson.marks_after),
        "overlap": _number(lesson.overlap),
        "overlap_total": _number(lesson.overlap_total),
        "worse": [
            {"query": query, "before": _number(before), "after": _number(after)}
            for query, before, after in lesson.worse
        ],
        "reaches": [{"query": query, "share": _number(share)} for query, share in lesson.reaches],
        "untouched": lesson.untouched,
        "moved": moves,
        "seconds": round(lesson.seconds, 4),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if value == value else None


def _say_lesson(lesson: Lesson, profile: str, preview: bool) -> None:
    about = f"{quote(lesson.shown)} ({len(lesson.good):,} good, {len(lesson.bad):,} bad)"
    say = emit
    if preview:
        say(f"preview of a lesson on {about} for profile {profile}; nothing is written")
    elif lesson.refused:
        say = note
    else:
        say(f"lesson {lesson.entry} of profile {profile}: {about}")
    if lesson.refused:
        note(f"{'would be refused: ' if preview else ''}{printable(lesson.refused)}")
    for id_, why in list(lesson.ignored.items())[:_SHOWN_IDS]:
        note(f"mark of {id_} left out: {why}")
    if lesson.kept_text:
        say(
            "  the search as it is fits your marks as well as anything learned from them, so it "
            "stays as it is; the marks are kept for later ones"
        )
    elif lesson.marks_after == lesson.marks_after:
        say(
            "  tested on marks put aside: good above bad in "
            f"{lesson.marks_before:.0%} of pairs by the search as it was, "
            f"{lesson.marks_after:.0%} as learned"
        )
    say(f"  other searches: {lesson.overlap:.0%} of their best pictures stay the same")
    if lesson.untouched is not None and not lesson.kept_text:
        total = lesson.untouched + len(lesson.reaches)
        helped = ", ".join(
            f"{quote(q)} ({share:.0%})" for q, share in lesson.reaches[:_SHOWN_REACH]
        )
        also = f"also moves {len(lesson.reaches)} of {total} generic queries, " if helped else ""
        most = f"most of all {helped}; " if helped else ""
        say(f"  {also}{most}leaves {lesson.untouched} of {total} generic queries as they are")
    for query, before, after in lesson.worse[:_SHOWN_IDS]:
        say(f"  less in line with its own marks: {quote(query)} ({before:.0%} -> {after:.0%})")


def _say_moves(moves: list[dict[str, Any]], k: int) -> None:
    if not moves:
        emit(f"  nothing moves among the best {k}")
    for move in moves[:_SHOWN_MOVES]:
        old, new = (move[when] or f">{max(_DEPTH, k)}" for when in ("before", "after"))
        mark = move["mark"] or ""
        emit(f"{move['id']:>7}  {old:>5} -> {new:<5}  {mark:<4}  {printable(move['path'])}")
    if len(moves) > _SHOWN_MOVES:
        emit(f"  and {len(moves) - _SHOWN_MOVES:,} more; --json lists them")
