"""`enn search compact`."""

from __future__ import annotations

from typing import Annotated

import typer

from apps.cli.options import JsonOption
from apps.cli.search.group import IndexOption, find_index
from apps.cli.terminal import EXIT_OK, counted, emit, emit_json, printable, size

__all__ = ["app", "compact"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "compact",
    epilog="""\b
Examples:
  enn search compact
  enn search compact --index ~/Photos --json
  enn search compact --drop-deleted        nothing of deleted pictures stays

\b
Exit codes: 0 ok, 2 user error (there is no index, another process writes it, ...).""",
)
def compact(
    index: IndexOption = None,
    drop_deleted: Annotated[
        bool,
        typer.Option(
            "--drop-deleted",
            help="Drop what is kept of pictures deleted in the last 30 days, too, and the copy of "
            "the catalog that an upgrade left.",
        ),
    ] = False,
    json: JsonOption = False,
) -> int:
    """Give back the space of pictures that were deleted.

    Updates leave the vectors of few deleted pictures in the files. This writes the files anew
    without them. Vectors of pictures deleted in the last 30 days stay for their return. Ids stay
    as they are; a picture that comes back after that gets a new one.
    """
    from retrieval.index.eigen_index import EigenIndex

    with EigenIndex.open(find_index(index)) as opened:
        before = opened.stats()
        opened.compact(drop_deleted=drop_deleted)
        after = opened.stats()
    forgotten = before["deleted"] - after["deleted"]
    count, place = after["images"], after["path"]
    if json:
        sizes = {"bytes_before": before["bytes"], "bytes": after["bytes"]}
        kept = {"kept": after["kept"], "kept_until": after["kept_until"]}
        emit_json({"index": place, "images": count, "forgotten": forgotten, **kept, **sizes})
    else:
        emit(f"{count:,} pictures are searchable in {printable(place)}")
        gone = counted(forgotten, "deleted picture")
        emit(f"  {gone} forgotten, {size(before['bytes'])} before, {size(after['bytes'])} now")
        if after["kept"]:
            emit(f"  {after['kept']:,} deleted are kept until {after['kept_until']} at the latest")
    return EXIT_OK
