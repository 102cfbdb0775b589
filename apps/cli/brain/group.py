"""What the commands of `enn brain` share: the group, its options, running over scans, tables."""

from __future__ import annotations

import contextlib
import csv
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.options import show_help
from apps.cli.terminal import (
    CommandError,
    Interrupted,
    ProgressLine,
    absolute,
    counted,
    note,
    printable,
    quote,
)

if TYPE_CHECKING:
    from neuro.age.predict import BrainAge
    from neuro.scans.batch import Outcome
    from neuro.scans.find import Scan
    from neuro.scans.preprocess import InputKind
    from neuro.scans.quality import Flag
    from neuro.teach import Site

__all__ = [
    "QC",
    "BrainModelOption",
    "CacheOption",
    "InputOption",
    "JobsOption",
    "NoCacheOption",
    "ScansArgument",
    "brain_app",
    "cache_folder",
    "flag_text",
    "load_brain",
    "note_text",
    "open_site",
    "output_folder",
    "prepare",
    "qc_columns",
    "write_table",
]

brain_app = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    name="brain",
    rich_markup_mode=None,
    help="Brain age from T1-weighted MRI: a research tool, not a medical device.",
    epilog="""\b
Examples:
  enn brain predict scan.nii.gz
  enn brain predict ~/study --out ages.csv --pictures qc
  enn brain preprocess ~/study --out ~/study-prepared --jobs 2
  enn brain train ~/study --out runs/mine""",
)


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

BrainModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FILE",
        help="Model that `enn brain train` wrote. [default: the shipped one]",
        show_default=False,
    ),
]

QC = tuple(
    f"qc_{name}"
    for name in ("dice", "brain_ml", "field_of_view", "stretch_low", "stretch_high", "spacing_mm")
)
"""Columns of `qc_columns`."""


def cache_folder(cache: Path | None, no_cache: bool) -> Path | None:
    """Folder of the options `--cache` and `--no-cache`; None keeps nothing."""
    from neuro.scans.prep_cache import default_cache_dir

    if no_cache:
        if cache is not None:
            raise CommandError("--cache and --no-cache exclude each other; give one of them")
        return None
    return default_cache_dir() if cache is None else absolute(cache)


def prepare(
    scans: Sequence[Scan],
    kind: InputKind,
    *,
    jobs: int,
    cache: Path | None,
    stage: str,
    each: Callable[[Outcome], dict[str, Any]],
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Prepare scans under a progress bar; a row of the table for each, in the order of `scans`.

    Args:
        scans, kind, jobs, cache, out: see `neuro.scans.batch.prepare_all`.
        stage: what is being done, for the bar.
        each: makes the row of an outcome, as soon as it is there; with `file`, `flags`, `error`.
    """
    from neuro.scans.batch import prepare_all
    from neuro.scans.prep_cache import PrepCache

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
                    row = rows[outcome.scan.name] = each(outcome)
                    if outcome.remark:
                        line.say(f"note: {printable(row['file'])}: {printable(outcome.remark)}")
                    if odd := note_text(outcome):
                        line.say(f"note: {printable(row['file'])}: {printable(odd)}")
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
        return dict.fromkeys(QC)
    quality = outcome.prepared.quality
    low, high = quality.stretch
    values = (quality.dice, quality.brain_ml, quality.field_of_view, low, high, quality.spacing_mm)
    return dict(zip(QC, values, strict=True))


def flag_text(flags: Sequence[Flag]) -> str:
    """Flags as one cell of a table."""
    return "; ".join(f"{flag.name}: {flag.text}" for flag in flags)


def note_text(outcome: Outcome) -> str:
    """How a scan and its entry in a table were read, where that is odd, as one cell of a table."""
    notes = [outcome.scan.note]
    if outcome.prepared is not None:
        notes += outcome.prepared.record["input"]["notes"]
    return " ".join(text for text in notes if text)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV (tab-separated if the name ends so), complete or not at all."""
    from enn_core.files.atomic import replacing

    text = io.StringIO()
    delimiter = "\t" if path.suffix == ".tsv" else ","
    writer = csv.DictWriter(
        text, columns, delimiter=delimiter, lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))


def output_folder(out: Path) -> Path:
    """The folder of an `--out` option, made if it is not there."""
    folder = absolute(out)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{quote(out)} is a file; give a folder for --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_brain(model: Path | None) -> BrainAge:
    """The model of a `--model` option with everything around it."""
    import torch

    from neuro.age.predict import BrainAge

    # A brain takes a second; on busy cores, threads that wait for each other take ten.
    torch.set_num_threads(1)
    return BrainAge.load(model)


def open_site(brain: BrainAge, profile: str | None, *, damaged: bool = False) -> Site | None:
    """The profile of a `--profile` option; without one, "default" if something was taught there.

    Raises:
        CommandError: there is no such profile.
    """
    from neuro.teach import Site, list_sites

    names = list_sites(brain)
    name = "default" if profile is None else profile
    if name not in names:
        if profile is None:
            return None
        there = ", ".join(names[:10]) if names else "none yet"
        raise CommandError(
            f"there is no profile {name!r}; there are, for this model: {there}; the first "
            "`enn brain teach` makes one"
        )
    site = Site.open(brain, name, damaged=damaged)
    if profile is None:
        note(f"with what {counted(len(site), 'labelled scan')} taught (profile default)")
    return site
