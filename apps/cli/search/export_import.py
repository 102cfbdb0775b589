"""`enn search export` and `import`: an index's vectors, and what was taught, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apps.cli.options import ForceOption, JsonOption, ProfileOption
from apps.cli.search.group import IndexOption, find_index, open_taught, teacher_of
from apps.cli.search.index import index_place
from apps.cli.terminal import (
    EXIT_OK,
    CommandError,
    absolute,
    counted,
    emit,
    emit_json,
    printable,
    quote,
    refuse_ending,
    refuse_overwrite,
)

__all__ = ["app", "export", "import_"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "export",
    epilog="""\b
Examples:
  enn search export out.parquet                  ids, paths and vectors of the index
  enn search export backup.parquet --index ~/Photos --force
  enn search export lessons.json                 what was taught under "default"
  enn search export anna.json --profile anna

\b
Columns of a .parquet file: id, path (relative to the folder), path_bytes (if the name
is not UTF-8), sha256, size, mtime_ns, read_ns, width, height, vector (float32, unit).
Exit codes: 0 ok, 2 user error.""",
)
def export(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")],
    index: IndexOption = None,
    profile: ProfileOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Write an index's vectors, or a profile's lessons, to a file.

    A name that ends in .parquet gets ids, paths and vectors of all pictures. One that ends in
    .json gets what the profile was taught: every lesson with its words, marks and numbers. So does
    a name without ending.
    """
    from retrieval.index.eigen_index import EigenIndex

    vectors = output.name.lower().endswith(".parquet")
    if vectors and profile is not None:
        raise CommandError(
            f"{quote(output)} would be the vectors of the index; give the lessons of a profile "
            "another ending, .json, or leave --profile out"
        )
    refuse_overwrite(output, force)
    if not vectors:
        return _export_lessons(output, index, profile, json)
    with EigenIndex.open(find_index(index)) as opened:
        count = opened.export_parquet(output)
        source = str(opened.path)
    if json:
        emit_json({"index": source, "file": str(output), "images": count})
    else:
        emit(f"{count:,} pictures written to {printable(output)}")
    return EXIT_OK


def _export_lessons(output: Path, index: Path | None, profile: str | None, json: bool) -> int:
    with open_taught(index, profile) as searcher:
        refuse_ending(output, {".json": "lessons", ".parquet": "vectors"})
        if searcher.teacher is None:
            raise CommandError(
                "nothing was taught yet that could be exported; for the vectors of the index give "
                "a file name that ends in .parquet"
            )
        count, name = searcher.teacher.export(output), searcher.teacher.name
    if json:
        emit_json({"profile": name, "file": str(output), "lessons": count})
    else:
        lessons = counted(count, "lesson")
        emit(f"{lessons} of profile {name} written to {printable(output)}")
    return EXIT_OK


@app.command(
    "import",
    epilog="""\b
Examples:
  enn search import out.parquet                     into the index found here or above
  enn search import out.parquet --folder ~/Photos   a new index inside ~/Photos
  enn search import out.parquet --index /data/idx   a new or existing index there
  enn search import lessons.json                    lessons into the profile "default"
  enn search import anna.json --profile anna        lessons into another profile

\b
Exit codes: 0 ok, 2 user error (other model, damaged file, ...): nothing is changed.""",
)
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file written by export.")],
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
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> int:
    """Add pictures to an index, or lessons to a profile, from a file.

    The content decides, not the name. Pictures go into an index of the same model, or a new one;
    a path that the index has already keeps its id and gets the file's vector. Lessons go into
    --profile, which may be new; those it has already are passed over. The whole file is checked
    before anything is written.
    """
    from retrieval.index.eigen_index import EigenIndex
    from retrieval.index.parquet import manifest_of

    if not _holds_vectors(file):
        if folder is not None:
            raise CommandError(f"{quote(file)} holds lessons, no pictures; leave --folder out")
        return _import_lessons(file, index, profile, json)
    if profile is not None:
        raise CommandError(
            f"{quote(file)} holds the vectors of an index, no lessons; leave --profile out"
        )
    manifest = manifest_of(file)
    if folder is None and index is None:
        directory, root = find_index(None), None
    elif folder is None and index is not None:
        directory, root = absolute(index), None
    else:
        directory, root = index_place(folder, index)
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


def _holds_vectors(file: Path) -> bool:
    """Whether an exported file is a Parquet file of vectors; else it holds lessons.

    Raises:
        CommandError: if it is neither.
    """
    if file.exists() and not file.is_file():
        raise CommandError(f"{quote(file)} is no file; give one written by `enn search export`")
    with open(file, "rb") as opened:
        start = opened.read(64)
    if start.startswith(b"PAR1"):
        return True
    if start.lstrip().startswith(b"{"):
        return False
    raise CommandError(
        f"{quote(file)} holds neither pictures (Parquet) nor lessons (JSON); give a file written "
        "by `enn search export`"
    )


def _import_lessons(file: Path, index: Path | None, profile: str | None, json: bool) -> int:
    with open_taught(index, profile, new=True) as searcher:
        teacher = teacher_of(searcher)
        before = len(teacher.history())
        teacher.import_(file)
        total, name = len(teacher.history()), teacher.name
    count = total - before
    if json:
        emit_json({"profile": name, "file": str(file), "lessons": count, "total": total})
    else:
        lessons = counted(count, "lesson")
        emit(f"{lessons} imported into profile {name}, which has {total:,} now")
    return EXIT_OK
