"""`enn brain predict`: ages with intervals from raw scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.brain.group import (
    QC,
    BrainModelOption,
    CacheOption,
    InputOption,
    JobsOption,
    NoCacheOption,
    ScansArgument,
    cache_folder,
    flag_text,
    load_brain,
    note_text,
    open_site,
    output_folder,
    prepare,
    qc_columns,
    write_table,
)
from apps.cli.options import JsonOption, ProfileOption
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
    refuse_overwrite,
)

if TYPE_CHECKING:
    from neuro.age.calibrate import BiasCorrection
    from neuro.age.predict import BrainAge, Estimate
    from neuro.scans.batch import Outcome

__all__ = [
    "BiasOption",
    "CalibrationOption",
    "SiteOption",
    "app",
    "choose_bias",
    "predict",
    "score_text",
]

app = typer.Typer(rich_markup_mode=None)

BiasOption = Annotated[
    str | None,
    typer.Option(
        "--bias",
        metavar="METHOD",
        help="Fills the column corrected_age: cole, or beheshti or delange, which use the known "
        "age. [default: none, or the calibration's]",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Correct by what `enn brain calibrate` wrote, instead of the model's own line.",
        show_default=False,
    ),
]
SiteOption = Annotated[
    str | None,
    typer.Option(
        "--site", metavar="NAME", help="Which of the calibration's sites.", show_default=False
    ),
]

_COLUMNS = (
    *("file", "participant_id", "predicted_age", "flags", "interval_low", "interval_high", "age"),
    *("gap", "corrected_age", "untaught_age", *QC, "out_of_distribution", "notes", "error"),
)


@app.command(
    "predict",
    epilog="""\b
Examples:
  enn brain predict scan.nii.gz
  enn brain predict ~/bids --out ages.csv --pictures qc --jobs 2
  enn brain predict list.csv --out ages.csv --bias cole
  enn brain predict sub-01/mri/brain.mgz --input brain
  enn brain predict odd.nii.gz --any-scan
  enn brain predict ~/site-a --profile site-a --out ages.csv

\b
The table has, for each scan: the predicted age, what is odd about the scan (flags: do
not rely on such an age), and the interval; age and gap (predicted minus known age)
where the age is known; measures of quality; the distance to the training scans'
intensities (1 is the farthest of these); why it was refused.
corrected_age never replaces predicted_age; flagged scans and ages beyond the trained
ones have none. untaught_age is what the model says without what was taught under the
profile.
Scans that were prepared before come from the cache: a run that was stopped goes on.
Research use only, not a medical device.

\b
Exit codes: 0 every scan has an age, 1 finished, but some have none (the column error
says why), 2 user error, 130 stopped by Ctrl-C.""",
)
def predict(
    scans: ScansArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Table to write, .csv or .tsv. [default: ages are printed]",
            show_default=False,
        ),
    ] = None,
    input: InputOption = "head",
    profile: ProfileOption = None,
    no_profile: Annotated[
        bool, typer.Option("--no-profile", help="Leave out what was taught under any profile.")
    ] = False,
    model: BrainModelOption = None,
    confidence: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Of people whose age lies in the interval, between 0 and 1."
        ),
    ] = 0.9,
    bias: BiasOption = None,
    calibration: CalibrationOption = None,
    site: SiteOption = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            metavar="DIR",
            help="Folder for a picture of each registered brain, in three planes.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = 1,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    any_scan: Annotated[
        bool,
        typer.Option(
            "--any-scan",
            help="Give a number even for scans that are refused as odd (not T1-weighted, upside "
            "down, an impossible volume); the column flags says why they are.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite the table of --out; without one, --any-scan."),
    ] = False,
    json: JsonOption = False,
) -> int:
    """Predict ages from T1-weighted scans, with intervals and what is odd about each scan."""
    from neuro.scans.find import find_scans
    from neuro.scans.preprocess import check_kind

    kind = check_kind(input)
    if not 0 < confidence < 1:
        raise CommandError(f"got --confidence {confidence}, valid is between 0 and 1, as 0.9")
    kept = cache_folder(cache, no_cache)
    if out is not None:
        refuse_overwrite(out, force)
        if out.suffix not in (".csv", ".tsv"):
            raise CommandError(f"--out is a table: give a name that ends with .csv, not {out.name}")
    any_scan |= force and out is None
    found = find_scans(scans)
    brain = load_brain(model)
    flagged: dict[str, str] = {}  # names of the flags, by scan: a list may give a file twice
    correction = choose_bias(brain, bias, calibration, site)
    taught = None if no_profile else open_site(brain, profile)
    folder = None if pictures is None else output_folder(pictures)

    def estimate(outcome: Outcome) -> tuple[Estimate | None, str]:
        if outcome.prepared is None:
            return None, outcome.error
        if folder is not None:
            from neuro.scans.quality import save_picture

            save_picture(outcome.prepared.image, folder / f"{outcome.scan.name}.png")
        seen = brain.look(outcome.prepared, name=outcome.scan.name, age=outcome.scan.age)
        said = brain.estimate(
            seen, site=taught, bias=correction, confidence=confidence, any_scan=any_scan
        )
        flagged[outcome.scan.name] = ", ".join(flag.name for flag in said.flags)
        return said, f"{said.error} (--any-scan gives a number)" if said.error else ""

    rows = prepare(found, kind, jobs=jobs, cache=kept, stage="predicting", each=_row_of(estimate))
    _tell_gaps(brain, confidence, correction, rows)
    if out is not None:
        write_table(absolute(out), _COLUMNS, rows)
    scores = score(rows)
    failed = sum(bool(row["error"]) for row in rows)
    if json:
        document = {"model": brain.sha256, "confidence": confidence, "scores": scores}
        emit_json({**document, "failed": failed, "scans": rows})
    else:
        _say(rows, [flagged.get(scan.name, "") for scan in found], out, scores)
    return EXIT_SKIPPED if failed else EXIT_OK


def choose_bias(
    brain: BrainAge, method: str | None, calibration: Path | None, site: str | None
) -> BiasCorrection | None:
    """The correction that `--bias`, `--calibration` and `--site` ask for, if any."""
    from neuro.age.calibrate import Calibration

    if calibration is None:
        if site is not None:
            raise CommandError("--site names a site of a --calibration; give that too")
        if method in (None, "none"):
            return None
        if brain.model.bias is None:
            raise CommandError(
                "this model has no stored bias correction; fit one with `enn brain calibrate` and "
                "give it with --calibration"
            )
        return brain.model.bias.as_method(str(method))
    if not calibration.is_file():
        raise CommandError(f"there is no file {printable(calibration)}")
    chosen = Calibration.load(calibration).of(site, brain.sha256)
    if method == "none":
        raise CommandError("--bias none leaves out the --calibration; give one of them")
    return chosen if method is None else chosen.as_method(method)


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How far the ages of a table are off; None if fewer than two are known."""
    from neuro.metrics import evaluate

    known = [row for row in rows if row["gap"] is not None]
    if len(known) < 2:
        return None
    scores = evaluate([row["predicted_age"] for row in known], [row["age"] for row in known])
    inside = [
        row["interval_low"] <= row["age"] <= row["interval_high"]
        for row in known
        if row["interval_low"] is not None
    ]
    scores["coverage"] = sum(inside) / len(inside) if inside else math.nan
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def score_text(scores: dict[str, Any]) -> str:
    """Scores in one line."""
    parts = [f"MAE {scores['mae']:.2f} years", f"bias {scores['bias']:+.1f}"]
    for name, text in (("r", "r {:.3f}"), ("r2", "R2 {:.3f}"), ("bias_slope", "slope {:+.2f}")):
        if scores[name] is not None and math.isfinite(scores[name]):
            parts.append(text.format(scores[name]))
    if scores.get("coverage") is not None:
        parts.append(f"{scores['coverage']:.0%} within their intervals")
    return f"{', '.join(parts)} ({counted(scores['n'], 'known age')})"


def _row_of(
    estimate: Callable[[Outcome], tuple[Estimate | None, str]],
) -> Callable[[Outcome], dict[str, Any]]:
    def row(outcome: Outcome) -> dict[str, Any]:
        said, error = estimate(outcome)
        return {
            "file": str(outcome.scan.path),
            "participant_id": outcome.scan.participant_id,
            "predicted_age": said and _years(said.age),
            "flags": flag_text(said.flags) if said else "",
            "interval_low": said and _years(said.low),
            "interval_high": said and _years(said.high),
            "age": outcome.scan.age,
            "gap": said and _years(said.gap),
            "corrected_age": said and _years(said.corrected),
            "untaught_age": said and _years(said.raw) if not error else None,
            **qc_columns(outcome),
            "out_of_distribution": said and _years(said.out_of_distribution),
            "notes": _notes(outcome, said),
            "error": error,
        }

    return row


def _notes(outcome: Outcome, said: Estimate | None) -> str:
    """How the scan was read, and why no age is corrected that was to be."""
    notes = note_text(outcome)
    if said is None or not said.uncorrected:
        return notes
    return f"{notes} no corrected age: {said.uncorrected}".strip()


def _years(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 2)


def _tell_gaps(
    brain: BrainAge,
    confidence: float,
    correction: BiasCorrection | None,
    rows: Sequence[dict[str, Any]],
) -> None:
    """What was asked for and is missing in the table."""
    residuals = brain.model.conformal
    if residuals is None or not residuals.suffices(confidence):
        count = len(residuals.residuals) if residuals else 0
        note(
            f"warning: no intervals: the model has {counted(count, 'residual')}, too few for "
            f"{confidence:.0%}"
        )
    missing = sum(row["age"] is None for row in rows if not row["error"])
    if correction is not None and correction.needs_age and missing:
        note(
            f"warning: {correction.method} needs the known age; {counted(missing, 'scan')} without "
            "one have no corrected_age"
        )
    held = sum(row["corrected_age"] is None and row["predicted_age"] is not None for row in rows)
    if correction is not None and held - (missing if correction.needs_age else 0) > 0:
        note(
            "note: flagged scans, and ages beyond the trained ones, have no corrected_age: the "
            "bias is known of ordinary scans alone"
        )


def _say(
    rows: Sequence[dict[str, Any]],
    flagged: Sequence[str],
    out: Path | None,
    scores: dict[str, Any] | None,
) -> None:
    if out is None:
        for row, names in zip(rows, flagged, strict=True):
            emit(_line(row, names))
    else:
        done = sum(not row["error"] for row in rows)
        emit(f"{counted(done, 'age')} of {counted(len(rows), 'scan')} in {printable(out)}")
    if scores is not None:
        emit(score_text(scores))


def _line(row: dict[str, Any], flagged: str) -> str:
    file = printable(row["file"])
    if row["error"]:
        return f"{file}: no age: {printable(row['error'])}"
    text = f"{file}: {row['predicted_age']:.1f} years"
    if flagged:
        text += f" [flagged: {flagged}]"
    if row["interval_low"] is not None:
        text += f" ({row['interval_low']:.1f} to {row['interval_high']:.1f})"
    if row["gap"] is not None:
        text += f", gap {row['gap']:+.1f}"
    if row["corrected_age"] is not None:
        text += f", corrected {row['corrected_age']:.1f}"
    return text
