"""`enn search index`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.cli.options import JsonOption
from apps.cli.search.group import (
    ModelOption,
    PrecisionOption,
    PretrainedOption,
    find_index,
    load_model,
)
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    Interrupted,
    ProgressLine,
    absolute,
    emit,
    emit_json,
    note,
    printable,
    quote,
)

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex
    from retrieval.index.update import Progress, UpdateReport
    from retrieval.model.retrieval_model import RetrievalModel

__all__ = ["SHOWN_SKIPS", "app", "index", "index_place"]

app = typer.Typer(rich_markup_mode=None)

SHOWN_SKIPS = 20
"""Skipped files that are shown one by one."""

_STAGES = {"scan": "looking for files", "index": "indexing", "save": "saving"}


@app.command(
    "index",
    epilog="""\b
Examples:
  enn search index ~/Photos
  enn search index ~/Photos --index /data/photos-index
  enn search index ~/Photos --model ViT-B-32 --pretrained laion2b_s34b_b79k
  enn search index ~/Photos --exclude raw/ --exclude '*.gif'
  cd ~/Photos; enn search index            update the index found here or above

\b
Exit codes: 0 all pictures are indexed, 1 finished, but some files were skipped
(`enn search info` says why), 2 user error, 130 stopped by Ctrl-C.""",
)
def index(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="PHOTOS",
            help="Folder of pictures, with all folders below it. "
            "Without it the index found by --index, or here, or above, is updated.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            metavar="DIR",
            help="Where the index lies or shall lie. [default: PHOTOS/.enn-index]",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    pretrained: PretrainedOption = None,
    precision: PrecisionOption = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Pictures per call of the model.")
    ] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Decoding threads. [default: one per core]", show_default=False
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="PATTERN",
            help="Leave out files and folders, in .gitignore's syntax, relative to PHOTOS; may be "
            "repeated. It is not remembered: give it each time, or write the pattern into "
            "PHOTOS/.ennignore, one a line. What was indexed of them is deleted from the index.",
            show_default=False,
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Delete from the index what is gone, even all of it. Without it the index is kept "
            "when all pictures are gone, or more than 100 and a quarter of them: their disk may "
            "not be there. Pictures that come back within 30 days are not read by the model again.",
        ),
    ] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            metavar="N",
            min=1,
            help="Read pictures of up to N pixels whole, at 8 to 16 bytes of memory a pixel, and "
            "files of up to 4 N bytes. "
            "Larger JPEG, JPEG 2000 and TIFF files are read at a part of their size where they can "
            "be, others are skipped. It is not remembered, but what was read stays. The pages show "
            "no view of what is larger than the default. [default: 201000000]",
            show_default=False,
        ),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Discard the index that is there and start anew, for example with another model, "
            "or to read with this version what an earlier one read. Ids are given anew, too, and "
            "nothing is kept of deleted pictures. Refused where so many are gone that their disk "
            "may be, unless --prune is given.",
        ),
    ] = False,
    json: JsonOption = False,
) -> int:
    """Build or update the index of a folder.

    Finds new, changed, moved and deleted pictures: JPEG, PNG, WebP, TIFF, GIF, HEIC, AVIF, JPEG
    2000, BMP, PNM, PSD, TGA and others, by their first bytes, whatever they are called. What else
    there is, such as RAW photos and videos, is counted. What is unchanged is not read again. Can be
    stopped at any time: the next run goes on where this one ended. Hidden files and folders are
    left out, and what systems keep beside pictures, such as @eaDir, #recycle, Thumbs and lost+found
    ('!Thumbs/' takes it back).
    """
    from retrieval.index.eigen_index import EigenIndex

    directory, root = index_place(folder, index)
    if rebuild and (directory / "manifest.json").exists():
        if not prune:
            _check_discarding(directory, root, exclude or ())
        root, loaded = _discard(directory, root, model, pretrained, precision)
        opened = EigenIndex.create(directory, loaded, root=root)
    else:
        opened, loaded = _open_for_update(directory, root, model, pretrained, precision)
    skips: list[tuple[str, str]] = []
    try:
        with opened, ProgressLine() as line:
            report = opened.update(
                root,
                loaded,
                batch_size=batch_size,
                workers=workers,
                progress=lambda state: _show_update(line, state),
                on_skip=lambda path, reason: _note_skip(line, skips, path, reason),
                exclude=exclude or (),
                prune=prune,
                max_pixels=max_pixels,
            )
            stats = opened.stats()
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; what is indexed so far is kept: run the same command again to go on"
        ) from None
    if json:
        emit_json(
            {
                "index": str(directory),
                "folder": stats["root"],
                "model": stats["model"],
                **asdict(report),
                "skipped_files": [{"path": path, "reason": reason} for path, reason in skips],
            }
        )
    else:
        _say_report(report, directory)
    return EXIT_SKIPPED if report.skipped_total else EXIT_OK


def index_place(folder: Path | None, index: Path | None) -> tuple[Path, Path | None]:
    """Index directory and photo folder (None: the one that the index knows)."""
    from retrieval.index.eigen_index import default_index_dir

    if folder is None:
        return find_index(index), None
    root = absolute(folder)
    if not root.exists():
        raise CommandError(f"there is no folder {quote(folder)}; give a folder of pictures")
    if not root.is_dir():
        raise CommandError(f"{quote(folder)} is a file; give the folder that it is in")
    if index is None:
        return default_index_dir(root), root
    directory = absolute(index)
    if directory.exists() and not directory.is_dir():
        raise CommandError(f"{quote(index)} is a file; give a directory for the index")
    known = (directory / "manifest.json").exists()
    inside = default_index_dir(directory)
    if not known and (inside / "manifest.json").exists():
        return inside, root
    if known or not directory.is_dir() or (directory / "catalog.sqlite").exists():
        return directory, root
    if any(directory.iterdir()):
        # An index among somebody's own files would be hard to get rid of.
        raise CommandError(
            f"{quote(index)} holds other files and no index; give a new or empty directory"
        )
    return directory, root


def _open_for_update(
    directory: Path,
    root: Path | None,
    name: str | None,
    pretrained: str | None,
    precision: str | None,
) -> tuple[EigenIndex, RetrievalModel]:
    from retrieval.index.eigen_index import EigenIndex, IndexMismatch

    if (directory / "manifest.json").exists():
        opened = EigenIndex.open(directory)
        try:
            own = str(opened.manifest["model"])
            precision = precision or str(opened.manifest["precision"])
            model = load_model(own if name is None else name, pretrained, precision)
            opened.check_model(model)
        except IndexMismatch as error:
            opened.close()
            raise CommandError(f"{error}, or start anew with --rebuild") from None
        except BaseException:
            opened.close()
            raise
        return opened, model
    parent = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise CommandError(
            f"{quote(parent)} cannot be written; put the index elsewhere with --index DIR"
        )
    model = load_model(name, pretrained, precision)
    return EigenIndex.create(directory, model, root=root), model


def _check_discarding(directory: Path, root: Path | None, exclude: Sequence[str]) -> None:
    """Refuse to take an index away whose pictures' disk may not be there."""
    from retrieval.ignore import Ignored
    from retrieval.index.absence import refuse_to_discard
    from retrieval.index.eigen_index import EigenIndex, IndexCorrupt, IndexMismatch

    try:
        old = EigenIndex.open(directory)
    except (IndexCorrupt, IndexMismatch):
        return  # of no use to this version
    with old:
        root = old.root if root is None else root
        if root is None:
            raise CommandError("the index has no photo folder yet; give the folder to index")
        ignored = Ignored(root, exclude)
        with contextlib.suppress(IndexCorrupt):
            refuse_to_discard(old.entries("indexed"), old.root, root, ignored)


def _discard(
    directory: Path,
    root: Path | None,
    name: str | None,
    pretrained: str | None,
    precision: str | None,
) -> tuple[Path | None, RetrievalModel]:
    """Take an index away once its successor's model is loaded; returns folder and model."""
    from retrieval.index.eigen_index import EigenIndex, IndexCorrupt
    from retrieval.index.writer import index_lock

    own = None
    try:
        with EigenIndex.open(directory) as old:
            own, root = str(old.manifest["model"]), old.root if root is None else root
            precision = precision or str(old.manifest["precision"])
    except (IndexCorrupt, ValueError):
        if root is None:
            raise
    model = load_model(own if name is None else name, pretrained, precision)
    with index_lock(directory):
        # Without its manifest a directory is no index; what else is in it is overwritten.
        (directory / "manifest.json").unlink()
    return root, model


def _show_update(line: ProgressLine, state: Progress) -> None:
    skipped = f"{state.skipped:,} skipped" if state.skipped else ""
    line.show(_STAGES.get(state.stage, state.stage), state.done, state.total, skipped)


def _note_skip(line: ProgressLine, skips: list[tuple[str, str]], path: str, reason: str) -> None:
    skips.append((path, reason))
    if len(skips) <= SHOWN_SKIPS:
        line.say(f"skipped {printable(path)}: {printable(reason)}")
    elif len(skips) == SHOWN_SKIPS + 1:
        line.say("more files are skipped; `enn search info --all` lists them afterwards")


def _say_report(report: UpdateReport, directory: Path) -> None:
    from retrieval.formats import left_out_text

    counts = {
        "added": report.added,
        "changed": report.changed,
        "moved": report.moved,
        "deleted": report.deleted,
        "unchanged": report.unchanged,
        "skipped": report.skipped_total,
    }
    emit(f"{report.total:,} pictures are searchable in {printable(directory)}")
    emit(
        "  "
        + ", ".join(
            f"{count:,} {what}" for what, count in counts.items() if count or what == "added"
        )
    )
    if report.left_out:
        emit(f"  left out: {printable(left_out_text(report.left_out))}")
    rate = f"{report.rate:,.0f}" if report.rate >= 10 else f"{report.rate:.1f}"
    pace = f", {rate} pictures/s" if report.embedded else ""
    emit(f"  took {report.seconds:.1f} s{pace}")
    if not report.total and not report.skipped_total:
        kinds = "JPEG, PNG, WebP, TIFF, GIF, HEIC, AVIF …"
        note(f"warning: the folder holds no pictures ({kinds}); is its disk there?")
