"""`enn search backup`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from apps.cli.options import JsonOption
from apps.cli.search.group import IndexOption, find_index
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    absolute,
    counted,
    emit,
    emit_json,
    note,
    printable,
    quote,
    size,
)

__all__ = ["app", "backup"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "backup",
    epilog="""\b
Examples:
  enn search backup /media/usb/photos-2026-12
  enn search backup ~/backups/today --index ~/Photos --json

\b
To restore: the folder is an index, so name it with --index, or put it in the place of
PHOTOS/.enn-index; ENN_PROFILES=FOLDER/profiles uses the profiles in it, or copy
FOLDER/profiles to where yours lie.

\b
Exit codes: 0 ok, 1 copied, but a profile is damaged, 2 user error.""",
)
def backup(
    target: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the copy goes: a new or empty folder.")
    ],
    index: IndexOption = None,
    json: JsonOption = False,
) -> int:
    """Copy an index and all that was taught on it, while they are used.

    The copy is consistent, whatever updates and lessons go on meanwhile, and is checked before it
    gets its name. Copying the files of a running index by other means may lose its newest part.
    """
    from retrieval.teach.backup import PROFILES, back_up

    place = absolute(target)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise CommandError(f"{quote(target)} is there already; give a new or empty folder")
    made = back_up(find_index(index), place)
    if json:
        emit_json({"folder": str(place), **asdict(made)})
    else:
        emit(
            f"{counted(made.images, 'picture')} and {counted(len(made.profiles), 'profile')} are "
            f"copied to {printable(place)} ({size(made.bytes)})"
        )
        emit(f"  search it with --index {printable(place)}")
        if made.profiles:
            emit(f"  with what was taught: ENN_PROFILES={printable(place / PROFILES)}")
    for each in made.damage:
        note(f"damaged: {printable(f'{each.file}: {each.part}: {each.lost}')}")
    return EXIT_SKIPPED if made.damage else EXIT_OK
