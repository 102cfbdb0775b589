"""`enn brain preprocess`: from raw heads to brains on the grid that the networks see."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.brain.group import (
    QC,
    CacheOption,
    InputOption,
    JobsOption,
    NoCacheOption,
    ScansArgument,
    cache_folder,
    flag_text,
    note_text,
    output_folder,
    prepare,
    qc_columns,
    write_table,
)
from apps.cli.options import JsonOption
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
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
    from neuro.scans.batch import Outcome
    from neuro.scans.find import Scan
    from neuro.scans.quality import Flag

__all__ = ["app", "preprocess"]

app = typer.Typer(rich_markup_mode=None)

# What a table says of each scan, in this order.
_COLUMNS = ("file", "participant_id", "age", "name", *QC)
_COLUMNS = (*_COLUMNS, "flags", "notes", "cached", "seconds", "error")


@app.command(
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
    from neuro.scans.find import find_scans
    from neuro.scans.preprocess import check_kind

    kind = check_kind(input)
    found = find_scans(scans)
    kept = cache_folder(cache, no_cache)
    folder = _folder_beside(out, found)
    rows = prepare(found, kind, jobs=jobs, cache=kept, out=folder, stage="preparing", each=_row)
    write_table(folder / "qc.csv", _COLUMNS, rows)
    _write_participants(folder / "participants.tsv", rows)
    failed = [row for row in rows if row["error"]]
    if json:
        emit_json({"out": str(folder), "scans": rows, "failed": len(failed)})
    else:
        _say_rows(rows, folder)
    return EXIT_SKIPPED if failed else EXIT_OK


def _folder_beside(out: Path, scans: list[Scan]) -> Path:
    """The folder to write to, in which none of the scans lies that is read."""
    folder = absolute(out)
    written = {str(folder / f"{scan.name}_T1w.nii.gz") for scan in scans}
    for scan in scans:
        if str(absolute(scan.path)) in written:
            raise CommandError(
                f"{quote(scan.path)} would be overwritten by a result; give another --out"
            )
    return output_folder(out)


def _row(outcome: Outcome) -> dict[str, Any]:
    from neuro.scans.quality import judge

    scan = outcome.scan
    flags: list[Flag] = []
    if outcome.prepared is not None:
        flags = judge(outcome.prepared.quality, image=outcome.prepared.image)
    fatal = [flag.text for flag in flags if flag.fatal]
    return {
        "file": str(scan.path),
        "participant_id": scan.participant_id,
        "age": scan.age,
        "name": scan.name,
        **qc_columns(outcome),
        "flags": flag_text(flags),
        "notes": note_text(outcome),
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
