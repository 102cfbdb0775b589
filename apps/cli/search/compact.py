"""`enn search compact`."""

from __future__ import annotations

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

\b
Exit codes: 0 ok, 2 user error (there is no index, another process writes it, ...).""",
)
def compact(index: IndexOption = None, json: JsonOption = False) -> int:
    """Give back the space of pictures that were deleted.

    Updates leave the vectors of few deleted pictures in the files. This writes the files anew
    without them. Ids stay as they are; a deleted picture that comes back gets a new one.
    """
    from retrieval.index.eigen_index import EigenIndex

    with EigenIndex.open(find_index(index)) as opened:
        before = opened.stats()
        opened.compact()
        after = opened.stats()
    forgotten, count, place = before["deleted"], after["images"], after["path"]
    if json:
        sizes = {"bytes_before": before["bytes"], "bytes": after["bytes"]}
        emit_json({"index": place, "images": count, "forgotten": forgotten, **sizes})
    else:
        emit(f"{count:,} pictures are searchable in {printable(place)}")
        gone = counted(forgotten, "deleted picture")
        emit(f"  {gone} forgotten, {size(before['bytes'])} before, {size(after['bytes'])} now")
    return EXIT_OK
