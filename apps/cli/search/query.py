"""`enn search query`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.cli.options import JsonOption, ProfileOption
from apps.cli.search.group import (
    IndexOption,
    find_index,
    note_cut,
    open_taught,
)
from apps.cli.terminal import (
    EXIT_OK,
    CommandError,
    emit,
    emit_json,
    note,
    printable,
    quote,
    write_paths,
)

if TYPE_CHECKING:
    from retrieval.search import Hit, Searcher

__all__ = ["app", "check_picture", "naming", "picture_named", "query"]

app = typer.Typer(rich_markup_mode=None)

_SHOWN = 3  # taught queries that are named


@app.command(
    "query",
    epilog="""\b
The query language:
  a dog in the snow            plain words
  2:red car                    this part counts twice
  2:golden retriever + snow    several parts, added
  street - people              without people; also "street -people"
  "black - white"              quotes protect signs (quote them for the shell, too)

\b
Examples:
  enn search query "a dog in the snow"
  enn search query "2:red car - people" -k 50
  enn search query --image beach.jpg              pictures like this one
  enn search query beach.jpg                      the same, if there is such a file
  enn search query "at night" --image beach.jpg   like this one, but at night
  enn search query -- "-person"                   begins with '-': put `--` before it
  enn search query cats --paths -0 | xargs -0 cp -t /tmp/cats

\b
Exit codes: 0 ok, also when nothing is found; 2 user error.""",
)
def query(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="What to look for.", show_default=False),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A picture to look for.", show_default=False),
    ] = None,
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Number of results.")] = 20,
    index: IndexOption = None,
    profile: ProfileOption = None,
    no_profile: Annotated[
        bool, typer.Option("--no-profile", help="Search without what was taught.")
    ] = False,
    json: JsonOption = False,
    paths: Annotated[bool, typer.Option("--paths", help="Print the paths alone, one a line.")] = (
        False
    ),
    print0: Annotated[
        bool,
        typer.Option("-0", "--print0", help="Print the paths alone, each ended by a NUL byte."),
    ] = False,
) -> int:
    """Search with words, a picture, or both.

    Prints id, score and path of the best pictures, best first. An id stays the same as long as
    the picture exists, also when it is moved. The score is a cosine: compare scores within one
    query, not between queries.

    Results are better once some are marked, by their ids, with `enn search teach`. What was taught
    under --profile applies, without it what was taught under "default", if anything was; a line on
    stderr tells when that changed the result.
    """
    words = " ".join(text or [])
    if not words.strip() and image is None:
        raise CommandError("nothing to search for; give some words, --image FILE, or both")
    if json and (paths or print0):
        raise CommandError("--json and --paths exclude each other; give one of them")
    if profile is not None and no_profile:
        raise CommandError("--profile and --no-profile exclude each other; give one of them")
    if image is not None:
        check_picture(image)
    named = picture_named(words)
    if named is not None:
        if image is not None:
            raise CommandError(f"{quote(named)} is a picture, and --image gives another; give one")
        words, image = "", named
    elif image is None:
        _note_missing(words)
    directory = find_index(index)
    with _open(directory, profile, no_profile) as searcher:
        started = time.perf_counter()
        with naming(image):
            hits = searcher.search(words or None, image=image, k=k)
        seconds = time.perf_counter() - started
        if named is not None:
            note(f"{quote(named)} is a picture: these are pictures like it")
        taught_by = searcher.teacher.name if searcher.teacher is not None else None
        changed = _is_changed(searcher, words or None, image, hits)
        follows = searcher.answering(words or None, image) if changed else []
        stats = searcher.index.stats() if json else {}
        total = len(searcher.index)
        note_cut(searcher.model, "the query")
    if not total:
        note("the index holds no pictures yet; add some with `enn search index FOLDER`")
    if paths or print0:
        write_paths((hit.path for hit in hits), nul=print0)
    elif json:
        emit_json(
            {
                "query": words or None,
                "image": str(image) if image is not None else None,
                "index": str(directory),
                "model": stats["model"],
                "images": total,
                "profile": taught_by,
                "changed": changed,
                "follows": [{"query": each, "share": round(share, 4)} for each, share in follows],
                "seconds": round(seconds, 4),
                "results": [
                    {"id": hit.id, "score": round(hit.score, 6), "path": str(hit.path)}
                    for hit in hits
                ],
            }
        )
    else:
        for hit in hits:
            emit(f"{hit.id:>7}  {hit.score:7.4f}  {printable(hit.path)}")
    if changed and not json:
        about = ", ".join(f"{quote(each)} ({share:.0%})" for each, share in follows[:_SHOWN])
        about = f" about {about}" if about else ""
        note(
            f"changed by what profile {taught_by} was taught{about}; --no-profile shows it without"
        )
    return EXIT_OK


def _open(directory: Path, profile: str | None, no_profile: bool) -> Searcher:
    from enn_core.lessons.errors import JournalError
    from retrieval.search import open_index

    if no_profile:
        return open_index(directory)
    try:
        return open_taught(directory, profile)
    except JournalError as error:
        raise CommandError(f"{error}; --no-profile searches without what was taught") from None


def _is_changed(searcher: Searcher, words: str | None, image: Path | None, hits: list[Hit]) -> bool:
    """Whether teaching changed which pictures are found, or their order."""
    teacher = searcher.teacher
    if teacher is None or not len(teacher):
        return False
    plain = searcher.search(words, image=image, k=max(1, len(hits)), taught=False)
    return [hit.id for hit in plain] != [hit.id for hit in hits]


def picture_named(words: str) -> Path | None:
    """The picture whose path the words are; None if they are words.

    "cat" is a word, whatever lies here; "./cat" and "cat.jpg" are paths if there is such a picture.
    """
    from retrieval.formats import SUFFIXES
    from retrieval.images import is_picture

    path = Path(words)
    if not (path.suffix or path.parent.name) or not os.path.isfile(words):
        return None
    return path if path.suffix.lower() in SUFFIXES or is_picture(path) else None


def _note_missing(words: str) -> None:
    """Tell who gave what looks like a picture's path that there is none."""
    from retrieval.formats import SUFFIXES

    if Path(words).suffix.lower() in SUFFIXES and not os.path.lexists(words):
        note(f"there is no file {quote(words)}: these are pictures that fit the words")


def check_picture(path: Path) -> None:
    """Refuse what is no file."""
    if not path.exists():
        raise CommandError(f"there is no file {quote(path)}; give a picture")
    if path.is_dir():
        raise CommandError(f"{quote(path)} is a folder; give one picture")


@contextlib.contextmanager
def naming(image: Path | None) -> Iterator[None]:
    """Adds the file to the reason why it cannot be read."""
    from retrieval.images import ImageError, TooManyPixels

    try:
        yield
    except ImageError as error:
        if image is None:
            raise
        remedy = "; give a smaller copy of it" if isinstance(error, TooManyPixels) else ""
        raise CommandError(f"{quote(image)} cannot be read: {error}{remedy}") from None
