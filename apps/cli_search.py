"""`enn search ...`: index, query, caption, info, export, import."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli_terminal import (
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
    refuse_overwrite,
    size,
    write_paths,
)

if TYPE_CHECKING:
    from retrieval.catalog import Entry
    from retrieval.index import EigenIndex
    from retrieval.models import RetrievalModel
    from retrieval.update import Progress, UpdateReport

__all__ = [
    "ForceOption",
    "JsonOption",
    "ModelOption",
    "PretrainedOption",
    "find_index",
    "load_model",
    "search_app",
]

# Skipped files that are shown one by one.
_SHOWN_SKIPS = 20

_STAGES = {"scan": "looking for files", "index": "indexing", "save": "saving"}

search_app = typer.Typer(
    name="search",
    rich_markup_mode=None,
    help="Index and search folders of pictures.",
    epilog="""\b
Examples:
  enn search index ~/Photos
  cd ~/Photos; enn search query "a dog in the snow"
  enn search info --index ~/Photos""",
)

IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        help="Index directory, or a folder that has its index inside. "
        "By default that of the current folder or of one above it.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="long-eclip-mini (shipped), an open_clip architecture with its weights "
        "(ViT-B-32:laion2b_s34b_b79k or ViT-B-32:FILE), hf-hub:ORG/NAME, or a directory.",
        show_default=False,
    ),
]
PretrainedOption = Annotated[
    str | None,
    typer.Option(
        "--pretrained",
        metavar="TAG|FILE",
        help="Weights for --model, if it is an architecture alone.",
        show_default=False,
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the output file.")]


@search_app.callback(invoke_without_command=True)
def _search(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# --- finding things ----------------------------------------------------------------------------


def find_index(given: Path | None) -> Path:
    """The index directory for a `--index` option, or that of the current folder.

    Looks, as git does, in the folder itself and in those above it.

    Raises:
        CommandError: if there is none.
    """
    from retrieval.index import default_index_dir

    start = absolute(given if given is not None else Path())
    if given is not None and not start.is_dir():
        raise CommandError(
            f"there is no directory {quote(given)}; give an index directory or an indexed folder"
        )
    if (start / "manifest.json").is_file():
        return start
    for folder in (start, *start.parents):
        inside = default_index_dir(folder)
        if (inside / "manifest.json").is_file():
            return inside
    raise CommandError(
        f"no index in {quote(start)} or above it; build one with `enn search index FOLDER`, "
        "or name one with --index DIR"
    )


def load_model(name: str | None, pretrained: str | None) -> RetrievalModel:
    """A model by its `--model` and `--pretrained`, the shipped one without them."""
    from retrieval.models import MINI, load

    name = MINI if name is None else name
    _say_loading(name)
    return load(name, checkpoint=pretrained)


def _say_loading(name: str) -> None:
    # It takes seconds, and the first time on a machine longer: the network is compiled.
    if sys.stderr.isatty():
        note(f"loading {printable(name)} ...")


# --- index -------------------------------------------------------------------------------------


@search_app.command(
    "index",
    epilog="""\b
Examples:
  enn search index ~/Photos
  enn search index ~/Photos --index /data/photos-index
  enn search index ~/Photos --model ViT-B-32 --pretrained laion2b_s34b_b79k
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
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Pictures per call of the model.")
    ] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Decoding threads. [default: one per core]", show_default=False
        ),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Discard the index that is there and start anew, for example with another model. "
            "Ids are given anew, too.",
        ),
    ] = False,
    json: JsonOption = False,
) -> int:
    """Build or update the index of a folder.

    Finds new, changed, moved and deleted pictures (JPEG, PNG, WebP, TIFF, GIF, HEIC). What is
    unchanged is not read again. Can be stopped at any time: the next run goes on where this one
    ended. Hidden files and folders are left out.
    """
    from retrieval.index import EigenIndex

    directory, root = _index_place(folder, index)
    if rebuild and (directory / "manifest.json").exists():
        root, loaded = _discard(directory, root, model, pretrained)
        opened = EigenIndex.create(directory, loaded, root=root)
    else:
        opened, loaded = _open_for_update(directory, root, model, pretrained)
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


def _index_place(folder: Path | None, index: Path | None) -> tuple[Path, Path | None]:
    """Index directory and photo folder (None: the one that the index knows)."""
    from retrieval.index import default_index_dir

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
    directory: Path, root: Path | None, name: str | None, pretrained: str | None
) -> tuple[EigenIndex, RetrievalModel]:
    from retrieval.index import EigenIndex, IndexMismatch

    if (directory / "manifest.json").exists():
        opened = EigenIndex.open(directory)
        try:
            own = str(opened.manifest["model"])
            model = load_model(own if name is None else name, pretrained)
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
    model = load_model(name, pretrained)
    return EigenIndex.create(directory, model, root=root), model


def _discard(
    directory: Path, root: Path | None, name: str | None, pretrained: str | None
) -> tuple[Path | None, RetrievalModel]:
    """Take an index away once its successor's model is loaded; returns folder and model."""
    from retrieval.index import EigenIndex, IndexCorrupt
    from retrieval.writer import index_lock

    own = None
    try:
        with EigenIndex.open(directory) as old:
            own, root = str(old.manifest["model"]), old.root if root is None else root
    except (IndexCorrupt, ValueError):
        if root is None:
            raise
    model = load_model(own if name is None else name, pretrained)
    with index_lock(directory):
        # Without its manifest a directory is no index; what else is in it is overwritten.
        (directory / "manifest.json").unlink()
    return root, model


def _show_update(line: ProgressLine, state: Progress) -> None:
    skipped = f"{state.skipped:,} skipped" if state.skipped else ""
    line.show(_STAGES.get(state.stage, state.stage), state.done, state.total, skipped)


def _note_skip(line: ProgressLine, skips: list[tuple[str, str]], path: str, reason: str) -> None:
    skips.append((path, reason))
    if len(skips) <= _SHOWN_SKIPS:
        line.say(f"skipped {printable(path)}: {printable(reason)}")
    elif len(skips) == _SHOWN_SKIPS + 1:
        line.say("more files are skipped; `enn search info --all` lists them afterwards")


def _say_report(report: UpdateReport, directory: Path) -> None:
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
    pace = f", {report.rate:,.0f} pictures/s" if report.embedded else ""
    emit(f"  took {report.seconds:.1f} s{pace}")
    if not report.total and not report.skipped_total:
        note("warning: the folder holds no pictures (JPEG, PNG, WebP, TIFF, GIF, HEIC)")


# --- query -------------------------------------------------------------------------------------


@search_app.command(
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
    """
    from retrieval.search import open_index

    words = " ".join(text or [])
    if not words.strip() and image is None:
        raise CommandError("nothing to search for; give some words, --image FILE, or both")
    if json and (paths or print0):
        raise CommandError("--json and --paths exclude each other; give one of them")
    if image is not None:
        _check_image(image)
    directory = find_index(index)
    with open_index(directory) as searcher:
        started = time.perf_counter()
        with _naming(image):
            hits = searcher.search(words or None, image=image, k=k)
        seconds = time.perf_counter() - started
        stats = searcher.index.stats() if json else {}
        total = len(searcher.index)
        _note_cut(searcher.model, "the query")
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
    return EXIT_OK


def _check_image(path: Path) -> None:
    if not path.exists():
        raise CommandError(f"there is no file {quote(path)}; give a picture")
    if path.is_dir():
        raise CommandError(f"{quote(path)} is a folder; give one picture")


@contextlib.contextmanager
def _naming(image: Path | None) -> Iterator[None]:
    """Adds the file to the reason why it cannot be read."""
    from retrieval.images import ImageError

    try:
        yield
    except ImageError as error:
        if image is None:
            raise
        raise CommandError(f"{quote(image)} cannot be read: {error}") from None


def _note_cut(model: RetrievalModel, what: str) -> None:
    if model.truncated_texts:
        note(
            f"warning: {what} is longer than the {model.context_length} tokens that "
            f"{model.name} reads; the rest is left out"
        )


# --- caption -----------------------------------------------------------------------------------


@search_app.command(
    "caption",
    epilog="""\b
Examples:
  enn search caption photo.jpg --captions list.txt
  enn search caption photo.jpg --captions list.txt -k 1 --json
  printf 'a cat\\na dog\\n' | enn search caption photo.jpg --captions -

\b
Exit codes: 0 ok, 2 user error.""",
)
def caption(
    image: Annotated[Path, typer.Argument(metavar="PHOTO", help="A picture.")],
    captions: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Text file (UTF-8), one caption a line; - reads standard input."
        ),
    ],
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Number of results.")] = 5,
    model: ModelOption = None,
    pretrained: PretrainedOption = None,
    json: JsonOption = False,
) -> int:
    """Find the captions of a list that fit a picture best.

    Prints line number, score and caption, best first. Needs no index.
    """
    from retrieval.search import rank_captions

    _check_image(image)
    lines = _read_captions(captions)
    loaded = load_model(model, pretrained)
    with _naming(image):
        ranked = rank_captions(loaded, image, [text for _, text in lines], k=k)
    found = [(lines[i][0], score, text) for i, score, text in ranked]
    _note_cut(loaded, "a caption")
    if json:
        emit_json(
            {
                "image": str(image),
                "model": loaded.name,
                "captions": len(lines),
                "results": [
                    {"line": line, "score": round(score, 6), "caption": text}
                    for line, score, text in found
                ],
            }
        )
    else:
        for line, score, text in found:
            emit(f"{line:>7}  {score:7.4f}  {printable(text)}")
    return EXIT_OK


def _read_captions(file: Path) -> list[tuple[int, str]]:
    """(line number, text) of the lines that are not blank."""
    name = "standard input" if str(file) == "-" else quote(file)
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise CommandError(
            f"cannot read {name}: {error.strerror}; give a text file, one caption a line"
        ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise CommandError(f"{name} is not UTF-8 text (line {line}); save it as UTF-8") from None
    # Not splitlines(): it also cuts at characters that a caption may hold.
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1)]
    lines = [(i, line) for i, line in lines if line]
    if not lines:
        raise CommandError(f"{name} holds no captions; write one a line")
    return lines


# --- info --------------------------------------------------------------------------------------


@search_app.command(
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
        bool, typer.Option("--all", help=f"List all skipped files, not the first {_SHOWN_SKIPS}.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Show what an index holds: sizes, model, counts, and skipped files with the reasons."""
    from retrieval.index import EigenIndex

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
        ("vectors", f"{stats['dim']} numbers each"),
        ("size", size(stats["bytes"])),
        ("search", "approximate, then exact" if stats["ann"] else "exact"),
        ("created", f"{stats['created']} (format {stats['format']})"),
    ]
    for name, value in rows:
        emit(f"{name:<14} {value}")
    if root is not None and not Path(root).is_dir():
        note(f"warning: the folder {quote(root)} is not there now")
    shown = skipped if everything else skipped[:_SHOWN_SKIPS]
    if shown:
        emit("skipped files")
    for entry in shown:
        emit(f"  {printable(entry.path) or '.'}: {printable(entry.error or 'unknown reason')}")
    if len(shown) < len(skipped):
        emit(f"  and {len(skipped) - len(shown):,} more; --all lists them")
    return EXIT_OK


def _skip_record(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "path": entry.path, "reason": entry.error}


# --- export and import -------------------------------------------------------------------------


@search_app.command(
    "export",
    epilog="""\b
Examples:
  enn search export out.parquet
  enn search export backup.parquet --index ~/Photos --force

\b
Columns: id, path (relative to the folder), path_bytes (if the name is not UTF-8),
sha256, size, mtime_ns, read_ns, width, height, vector (float32, unit length).
Exit codes: 0 ok, 2 user error.""",
)
def export(
    output: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="File to write.")],
    index: IndexOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Write ids, paths and vectors of all pictures to a Parquet file."""
    from retrieval.index import EigenIndex

    refuse_overwrite(output, force)
    with EigenIndex.open(find_index(index)) as opened:
        count = opened.export_parquet(output)
        source = str(opened.path)
    if json:
        emit_json({"index": source, "file": str(output), "images": count})
    else:
        emit(f"{count:,} pictures written to {printable(output)}")
    return EXIT_OK


@search_app.command(
    "import",
    epilog="""\b
Examples:
  enn search import out.parquet                     into the index found here or above
  enn search import out.parquet --folder ~/Photos   a new index inside ~/Photos
  enn search import out.parquet --index /data/idx   a new or existing index there

\b
Exit codes: 0 ok, 2 user error (other model, damaged file, ...): nothing is changed.""",
)
def import_(
    file: Annotated[Path, typer.Argument(metavar="IN.parquet", help="A file written by export.")],
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="PHOTOS",
            help="Folder that the paths in the file are relative to, for a new index.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            metavar="DIR",
            help="Index directory; made if it is new. "
            "[default: PHOTOS/.enn-index, or the index found here or above]",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> int:
    """Add the pictures of an exported file to an index of the same model, or to a new one.

    A path that the index has already keeps its id and gets the file's vector. The whole file is
    checked before anything is written.
    """
    from retrieval.index import EigenIndex
    from retrieval.transfer import manifest_of

    manifest = manifest_of(file)
    if folder is None and index is None:
        directory, root = find_index(None), None
    elif folder is None and index is not None:
        directory, root = absolute(index), None
    else:
        directory, root = _index_place(folder, index)
    if (directory / "manifest.json").exists():
        opened = EigenIndex.open(directory)
    else:
        opened = EigenIndex.create(directory, manifest, root=root)
    with opened:
        count = opened.import_parquet(file)
        total = len(opened)
    if json:
        emit_json({"index": str(directory), "file": str(file), "images": count, "total": total})
    else:
        emit(f"{count:,} pictures imported, {total:,} searchable in {printable(directory)}")
    return EXIT_OK
