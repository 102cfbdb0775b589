"""`enn brain calibrate`: corrections of bias and of sites from labelled scans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.brain.evaluate import LabelledArgument, look_at
from apps.cli.brain.group import (
    BrainModelOption,
    CacheOption,
    InputOption,
    JobsOption,
    NoCacheOption,
    cache_folder,
    load_brain,
)
from apps.cli.brain.labelled_scans import Labelled, find_table, read_table
from apps.cli.options import ForceOption, JsonOption
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
    refuse_ending,
    refuse_overwrite,
)

if TYPE_CHECKING:
    import numpy as np

    from neuro.age.calibrate import BiasCorrection
    from neuro.age.predict import BrainAge

__all__ = ["app", "calibrate"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "calibrate",
    epilog="""\b
Examples:
  enn brain calibrate ages.csv --out site-a.json --site a
  enn brain predict more/ --calibration site-a.json --out more.csv
  enn brain calibrate controls/ --out controls.json --method offset
  enn brain calibrate ages.csv --out mine.json --write-model mine.safetensors \\
      --model runs/mine/model.safetensors --intervals

\b
cole fits predicted = slope x age + intercept and turns it around: (predicted -
intercept) / slope; no age is needed to apply it. beheshti and delange take what the
line says off the gap; they need the known age, so their errors say nothing. offset
takes the mean gap off, for a few scans of another scanner.
A table with a column site gets a correction for each, and one for all together.
Errors after a correction are those of scans left out of its fit, one by one.

\b
Exit codes: 0 ok, 1 finished, but some scans have no age, 2 user error (too few scans,
one age only, ...), 130 stopped by Ctrl-C.""",
)
def calibrate(
    inputs: LabelledArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="Calibration to write, .json.", show_default=False
        ),
    ],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="cole, beheshti, delange, or offset.")
    ] = "cole",
    site: Annotated[
        str, typer.Option(metavar="NAME", help="What the site of these scans is called.")
    ] = "all",
    input: InputOption = "head",
    model: BrainModelOption = None,
    write_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a copy of the model with this correction as its own.",
            show_default=False,
        ),
    ] = None,
    intervals: Annotated[
        bool,
        typer.Option("--intervals", help="That copy's intervals come from these scans, too."),
    ] = False,
    jobs: JobsOption = 1,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Fit bias and site corrections from scans of known age."""
    from neuro.age.calibrate import BiasCorrection, Calibration
    from neuro.scans.preprocess import check_kind

    kind = check_kind(input)
    kept = cache_folder(cache, no_cache)
    refuse_ending(out, {".json": "a calibration"})
    refuse_overwrite(out, force)
    if intervals and write_model is None:
        raise CommandError("--intervals go into a copy of the model; give --write-model FILE")
    if write_model is not None:
        refuse_overwrite(write_model, force)
    table = find_table(inputs, "predicted_age")
    brain: BrainAge | None = None
    failed: list[dict[str, Any]] = []
    if table is None:
        brain = load_brain(model)
        labelled, failed = look_at(brain, inputs, kind, jobs=jobs, cache=kept)
    else:
        labelled = read_table(table, "predicted_age")
        if model is not None or write_model is not None:
            brain = load_brain(model)
    fits: dict[str, BiasCorrection] = {}
    rows = []
    for name, chosen in _groups(labelled, site).items():
        bias = BiasCorrection.fit(labelled.predicted[chosen], labelled.ages[chosen], method)  # type: ignore[arg-type]
        fits[name] = bias
        rows.append({"site": name, **bias.to_dict(), **_errors(labelled, chosen, bias)})
    Calibration(fits, brain.sha256 if brain else "").save(absolute(out))
    if write_model is not None and brain is not None:
        _write_model(brain, model, write_model, fits, labelled if intervals else None)
    if json:
        emit_json({"out": str(out), "sites": rows, "left_out": failed})
    else:
        for row in rows:
            emit(_line(row))
        emit(f"give it to `enn brain predict` with --calibration {printable(out)}")
    if brain is None:
        note("without --model, the calibration does not know which model it is for")
    return EXIT_SKIPPED if failed else EXIT_OK


def _groups(labelled: Labelled, site: str) -> dict[str, np.ndarray]:
    """Positions of the scans of each site, and of all of them."""
    import numpy as np

    sites = np.array(labelled.sites)
    named = sorted(set(labelled.sites) - {""})
    everything = np.arange(len(sites))
    if not named or site != "all":
        return {site: everything}
    return {name: np.flatnonzero(sites == name) for name in named} | {"all": everything}


def _errors(
    labelled: Labelled, chosen: np.ndarray, bias: BiasCorrection
) -> dict[str, float | None]:
    """Mean absolute errors before, and after a correction that left the scan out of its fit."""
    import numpy as np

    from neuro.age.calibrate import BiasCorrection, CalibrationError

    predicted, ages = labelled.predicted[chosen], labelled.ages[chosen]
    before = float(np.abs(predicted - ages).mean())
    if bias.needs_age:
        return {"mae_before": before, "mae_after": None}
    left = []
    for i in range(len(ages)):
        others = np.arange(len(ages)) != i
        try:
            fitted = BiasCorrection.fit(predicted[others], ages[others], bias.method)
        except CalibrationError:
            return {"mae_before": before, "mae_after": None}
        left.append(abs(float(fitted.apply(predicted[i : i + 1])[0]) - ages[i]))
    return {"mae_before": before, "mae_after": float(np.mean(left))}


def _write_model(
    brain: BrainAge,
    source: Path | None,
    target: Path,
    fits: dict[str, BiasCorrection],
    labelled: Labelled | None,
) -> None:
    from dataclasses import replace

    from neuro.age.calibrate import Conformal
    from neuro.age.predict import shipped_weights

    changed = replace(brain.model, bias=fits["all"] if "all" in fits else next(iter(fits.values())))
    if labelled is not None:
        changed.conformal = Conformal.fit(labelled.predicted, labelled.ages)
    changed.save_beside(shipped_weights() if source is None else source, absolute(target))


def _line(row: dict[str, Any]) -> str:
    text = f"{printable(row['site'])}: {row['method']}"
    if row["method"] != "offset":
        text += f", slope {row['slope']:.3f}"
    text += f", intercept {row['intercept']:+.2f} years from {counted(row['n'], 'scan')}"
    text += f"; MAE {row['mae_before']:.2f}"
    if row["mae_after"] is not None:
        text += f", corrected {row['mae_after']:.2f}"
    return text
