"""`enn search info`: what an index holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.options import JsonOption
from apps.cli.search.group import IndexOption, find_index
from apps.cli.search.index import SHOWN_SKIPS
from apps.cli.terminal import EXIT_OK, emit, emit_json, note, printable, quote, size

if TYPE_CHECKING:
    from retrieval.index.catalog import Entry

__all__ = ["app", "info"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "info",
    epilog="""\b
Examples:
  enn search info
  enn search info --index ~/Photos --all
  enn search info --json | jq -r '.skipped_files[].path'

\b
Exit codes: 0 ok, 2 user error (there is no index, it is damaged, ...).""",
)
def info(
    index: IndexOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help=f"List all skipped files, not the first {SHOWN_SKIPS}.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Show what an index holds: sizes, model, counts, and skipped files with the reasons."""
    from retrieval.index.eigen_index import EigenIndex

    with EigenIndex.open(find_index(index)) as opened:
        stats = opened.stats()
        skipped = opened.skipped()
    if json:
        emit_json({**stats, "skipped_files": [_skip_record(entry) for entry in skipped]})
        return EXIT_OK
    root = stats["root"]
    rows = [
        ("index", printable(stats["path"])),
        ("folder", printable(root) if root is not None else "not known yet"),
        ("model", printable(stats["model"])),
        ("weights", stats["weights"][:16]),
        ("preprocessing", stats["preprocess"][:16]),
        ("pictures", f"{stats['images']:,} searchable, {stats['skipped']:,} skipped"),
        ("vectors", f"{stats['dim']} numbers each, computed in {stats['precision']}"),
        ("size", size(stats["bytes"])),
        ("search", "approximate, then exact" if stats["ann"] else "exact"),
        ("created", f"{stats['created']} (layout {stats['format']})"),
    ]
    if stats["kept"]:
        kept = f"{stats['kept']:,} deleted, vectors until {stats['kept_until']} at the latest"
        rows.insert(6, ("kept", kept))
    for name, value in rows:
        emit(f"{name:<14} {value}")
    if root is not None and not Path(root).is_dir():
        note(f"warning: the folder {quote(root)} is not there now")
    shown = skipped if everything else skipped[:SHOWN_SKIPS]
    if shown:
        emit("skipped files")
    for entry in shown:
        emit(f"  {printable(entry.path) or '.'}: {printable(entry.error or 'unknown reason')}")
    if len(shown) < len(skipped):
        emit(f"  and {len(skipped) - len(shown):,} more; --all lists them")
    return EXIT_OK


def _skip_record(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "path": entry.path, "reason": entry.error}
