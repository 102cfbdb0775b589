"""`enn brain preprocess`: from raw heads to brains on the grid that the networks see."""

from __future__ import annotations

import contextlib
import csv
import io
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli_options import JsonOption
from apps.cli_terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    Interrupted,
    ProgressLine,
    absolute,
    counted,
    duration,
    emit,
    emit_json,
    note,
    printable,
    quote,
)

if TYPE_CHECKING:
    from neuro.batch import Outcome
    from neuro.preprocess import InputKind
    from neuro.quality import Flag
    from neuro.scans import Scan

__all__ = [
    "CacheOption",
    "InputOption",
    "JobsOption",
    "NoCacheOption",
    "ScansArgument",
    "brain_app",
    "preprocess",
    "qc_columns",
    "write_table",
]

brain_app = typer.Typer(
    name="brain",
    rich_markup_mode=None,
    help="Brain age from T1-weighted MRI: a research tool, not a medical device.",
    epilog="""\b
Examples:
  enn brain preprocess scan.nii.gz --out prepared
  enn brain preprocess ~/study --out ~/study-prepared --jobs 2""",
)


@brain_app.callback()
def _brain() -> None:
    """Keeps the group's name although it has a single command."""


ScansArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SCANS",
        help="Files (.nii, .nii.gz, .mgz, Analyze), folders, BIDS roots, or lists (.csv, .tsv "
        "with a column file and, if known, participant_id and age).",
        show_default=False,
    ),
]
InputOption = Annotated[
    str,
    typer.Option(
        "--input",
        metavar="KIND",
        help="What the scans show: head (as the scanner gave it), brain (extracted already), or "
        "mni (extracted and in MNI space).",
    ),
]
JobsOption = Annotated[
    int,
    typer.Option("--jobs", metavar="N", min=1, help="Scans at once; each takes 2 GB, 2 threads."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Where prepared brains are kept. [default: this user's cache]",
        show_default=False,
    ),
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Prepare anew, and keep nothing but what goes to --out.")
]

# What a table says of each scan, in this order.
_QC = ("dice", "brain_ml", "field_of_view", "stretch_low", "stretch_high", "spacing_mm")
_COLUMNS = ("file", "participant_id", "age", "name", *(f"qc_{name}" for name in _QC))
_COLUMNS = (*_COLUMNS, "flags", "notes", "cached", "seconds", "error")


@brain_app.command(
    "preprocess",
    epilog="""\b
Examples:
  enn brain preprocess scan.nii.gz --out prepared
  enn brain preprocess ~/bids --out prepared --jobs 2
  enn brain preprocess list.csv --out prepared --json
  enn brain preprocess sub-01/mri/brain.mgz --input brain --out prepared

\b
Writes to --out, for each scan: NAME_T1w.nii.gz (the brain on the MNI152 2 mm grid),
NAME_T1w.json (steps, versions, measures) and NAME_T1w.png (look at it!); for all of
them qc.csv, and participants.tsv if ages are known.

\b
Exit codes: 0 all scans are prepared, 1 finished, but some failed (qc.csv says why),
2 user error, 130 stopped by Ctrl-C.""",
)
def preprocess(
    scans: ScansArgument,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder to write to.", show_default=False),
    ],
    input: InputOption = "head",
    jobs: JobsOption = 1,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    json: JsonOption = False,
) -> int:
    """Extract brains and bring them to MNI space, on the CPU alone.

    Reorients, extracts the brain (deepbet), registers it to the MNI152 template (ANTs, affine) and
    scales its intensities. A scan that fails is reported and stops nothing. What was prepared
    before is taken from the cache, so a run that was stopped goes on where it ended.
    """
    from neuro.preprocess import check_kind
    from neuro.scans import find_scans

    kind = check_kind(input)
    found = find_scans(scans)
    folder = _output_folder(out, found)
    rows = run(
        found, kind, jobs=jobs, cache=cache_folder(cache, no_cache), out=folder, stage="preparing"
    )
    write_table(folder / "qc.csv", _COLUMNS, rows)
    _write_participants(folder / "participants.tsv", rows)
    failed = [row for row in rows if row["error"]]
    if json:
        emit_json({"out": str(folder), "scans": rows, "failed": len(failed)})
    else:
        _say_rows(rows, folder)
    return EXIT_SKIPPED if failed else EXIT_OK


def cache_folder(cache: Path | None, no_cache: bool) -> Path | None:
    """Folder of the options `--cache` and `--no-cache`; None keeps nothing."""
    from neuro.prep_cache import default_cache_dir

    if no_cache:
        if cache is not None:
            raise CommandError("--cache and --no-cache exclude each other; give one of them")
        return None
    return default_cache_dir() if cache is None else absolute(cache)


def run(
    scans: list[Scan],
    kind: InputKind,
    *,
    jobs: int,
    cache: Path | None,
    out: Path | None,
    stage: str,
) -> list[dict[str, Any]]:
    """Prepare scans under a progress bar; a row of the table for each, in the order of `scans`."""
    from neuro.batch import prepare_all
    from neuro.prep_cache import PrepCache

    rows: dict[str, dict[str, Any]] = {}
    failed = 0
    # Steps are told by another thread than results.
    lock = threading.Lock()
    try:
        with ProgressLine() as line:

            def show(doing: str = "") -> None:
                notes = [f"{failed:,} failed" if failed else "", doing]
                with lock:
                    line.show(stage, len(rows), len(scans), ", ".join(n for n in notes if n))

            show()
            outcomes = prepare_all(
                scans,
                kind=kind,
                jobs=jobs,
                cache=cache,
                out=out,
                on_step=lambda scan, step: show(f"{printable(scan.name)}: {step}"),
            )
            with contextlib.closing(outcomes):
                for outcome in outcomes:
                    row = rows[outcome.scan.name] = _row(outcome)
                    if row["error"]:
                        failed += 1
                        line.say(f"failed: {printable(row['file'])}: {printable(row['error'])}")
                    elif row["flags"]:
                        line.say(f"odd: {printable(row['file'])}: {printable(row['flags'])}")
                    show()
    except KeyboardInterrupt:
        kept = "run the same command again to go on" if cache else "nothing is kept without a cache"
        raise Interrupted(f"stopped after {len(rows)} of {len(scans)}; {kept}") from None
    if cache is not None:
        PrepCache(cache).prune()
    return [rows[scan.name] for scan in scans]


def qc_columns(outcome: Outcome) -> dict[str, Any]:
    """The measures of a scan, as columns; None where there are none."""
    if outcome.prepared is None:
        return {f"qc_{name}": None for name in _QC}
    quality = outcome.prepared.quality
    low, high = quality.stretch
    values = (quality.dice, quality.brain_ml, quality.field_of_view, low, high, quality.spacing_mm)
    return {f"qc_{name}": value for name, value in zip(_QC, values, strict=True)}


def write_table(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV (tab-separated if the name ends so), complete or not at all."""
    from enn_core.atomic import replacing

    text = io.StringIO()
    delimiter = "\t" if path.suffix == ".tsv" else ","
    writer = csv.DictWriter(
        text, columns, delimiter=delimiter, lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))


def _output_folder(out: Path, scans: list[Scan]) -> Path:
    folder = absolute(out)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{quote(out)} is a file; give a folder for --out")
    written = {str(folder / f"{scan.name}_T1w.nii.gz") for scan in scans}
    for scan in scans:
        if str(absolute(scan.path)) in written:
            raise CommandError(
                f"{quote(scan.path)} would be overwritten by a result; give another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _row(outcome: Outcome) -> dict[str, Any]:
    from neuro.quality import judge

    scan = outcome.scan
    flags: list[Flag] = []
    notes = [scan.note]
    if outcome.prepared is not None:
        flags = judge(outcome.prepared.quality)
        notes += outcome.prepared.record["input"]["notes"]
    fatal = [flag.text for flag in flags if flag.fatal]
    return {
        "file": str(scan.path),
        "participant_id": scan.participant_id,
        "age": scan.age,
        "name": scan.name,
        **qc_columns(outcome),
        "flags": "; ".join(f"{flag.name}: {flag.text}" for flag in flags),
        "notes": " ".join(text for text in notes if text),
        "cached": outcome.cached,
        "seconds": round(outcome.seconds, 2),
        "error": outcome.error or (fatal[0] if fatal else ""),
    }


def _write_participants(path: Path, rows: list[dict[str, Any]]) -> None:
    """The table that training reads; its ids are the names of the volumes."""
    known = [row for row in rows if row["age"] is not None and not row["error"]]
    if known:
        table = [{"participant_id": row["name"], "age": row["age"]} for row in known]
        write_table(path, ("participant_id", "age"), table)


def _say_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    done = [row for row in rows if not row["error"]]
    counts = Counter(
        failed=len(rows) - len(done),
        odd=sum(bool(row["flags"]) for row in done),
        cached=sum(row["cached"] for row in done),
    )
    emit(f"{counted(len(done), 'brain')} of {counted(len(rows), 'scan')} in {printable(folder)}")
    parts = [
        f"{counts['failed']:,} failed" if counts["failed"] else "",
        f"{counts['odd']:,} odd" if counts["odd"] else "",
        f"{counts['cached']:,} prepared before" if counts["cached"] else "",
    ]
    if any(parts):
        emit("  " + ", ".join(part for part in parts if part))
    fresh = [row["seconds"] for row in done if not row["cached"]]
    if done:
        overlaps = sorted(row["qc_dice"] for row in done)
        emit(f"  Dice with the template {overlaps[0]:.3f} to {overlaps[-1]:.3f}")
    if fresh:
        emit(f"  {sum(fresh) / len(fresh):.1f} s a scan, {duration(sum(fresh))} in all")
    if counts["odd"] or counts["failed"]:
        note("qc.csv says what is odd; look at the pictures (NAME_T1w.png) before you use them")
