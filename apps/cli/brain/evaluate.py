"""`enn brain evaluate`: how far predicted ages are off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.brain.group import (
    BrainModelOption,
    CacheOption,
    InputOption,
    JobsOption,
    NoCacheOption,
    cache_folder,
    flag_text,
    load_brain,
    open_site,
    output_folder,
    write_table,
)
from apps.cli.brain.labelled_scans import (
    Labelled,
    find_table,
    labelled_scans,
    prepare_labelled,
    read_table,
)
from apps.cli.brain.predict import score_text
from apps.cli.options import JsonOption, ProfileOption
from apps.cli.terminal import EXIT_OK, EXIT_SKIPPED, counted, emit, emit_json, printable

if TYPE_CHECKING:
    from neuro.age.predict import BrainAge
    from neuro.scans.find import Scan
    from neuro.scans.preprocess import InputKind, Prepared

__all__ = ["LabelledArgument", "app", "evaluate", "look_at"]

app = typer.Typer(rich_markup_mode=None)

LabelledArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SCANS|TABLE",
        help="Scans of known age (files, folders, BIDS roots, lists), or a table of "
        "`enn brain predict` with known ages.",
        show_default=False,
    ),
]


@app.command(
    "evaluate",
    epilog="""\b
Examples:
  enn brain evaluate ages.csv --out scores
  enn brain evaluate ages.csv --column corrected_age --out scores-corrected
  enn brain evaluate ~/bids --out scores --model runs/mine/model.safetensors
  enn brain evaluate ~/bids --out scores --variants --jobs 2

\b
Writes to --out: scores.csv (MAE, r, R2, bias and its slope on age), by_decade.csv,
agreement.png (scatter and Bland-Altman plot), and, of scans, ages.csv.
--variants adds single networks, and both without the mirror image.
Scans that a model was trained on say nothing of how well it does on others.

\b
Exit codes: 0 ok, 1 finished, but some scans have no age (left_out.csv says why),
2 user error, 130 stopped by Ctrl-C.""",
)
def evaluate(
    inputs: LabelledArgument,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder to write to.", show_default=False),
    ],
    column: Annotated[
        str, typer.Option(metavar="NAME", help="The table's column of predicted ages.")
    ] = "predicted_age",
    input: InputOption = "head",
    model: BrainModelOption = None,
    profile: ProfileOption = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="Score single networks and no mirroring, too.")
    ] = False,
    jobs: JobsOption = 1,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    json: JsonOption = False,
) -> int:
    """Score predicted against known ages, over all and by decade, with plots."""
    import numpy as np

    from neuro.metrics import by_decade, plot_agreement
    from neuro.metrics import evaluate as scores_of
    from neuro.scans.preprocess import check_kind

    kind = check_kind(input)
    kept = cache_folder(cache, no_cache)
    table = find_table(inputs, column)
    failed: list[dict[str, Any]] = []
    if table is not None:
        folder = output_folder(out)
        labelled = read_table(table, column)
    else:
        brain = load_brain(model)
        labelled, failed = look_at(
            brain, inputs, kind, jobs=jobs, cache=kept, profile=profile, unmirrored=variants
        )
        folder = output_folder(out)
        write_table(
            folder / "ages.csv",
            ("participant_id", "predicted_age", "flags", "age"),
            _rows(labelled),
        )
    rows = [{"variant": "as predicted", **scores_of(labelled.predicted, labelled.ages)}]
    if variants and labelled.by_head is not None:
        rows += _variants(brain, labelled)
    decades = by_decade(labelled.predicted, labelled.ages)
    write_table(folder / "scores.csv", tuple(rows[0]), rows)
    write_table(folder / "by_decade.csv", tuple(decades[0]), decades)
    write_table(folder / "left_out.csv", ("file", "error"), failed)
    ends = np.stack([labelled.lows, labelled.highs], axis=1)
    drawn = ends if column == "predicted_age" and np.isfinite(ends).all() else None
    plot_agreement(labelled.predicted, labelled.ages, folder / "agreement.png", drawn)
    if drawn is not None:
        inside = (drawn[:, 0] <= labelled.ages) & (labelled.ages <= drawn[:, 1])
        rows[0]["coverage"] = float(inside.mean())
    if json:
        emit_json(
            {
                "out": str(folder),
                "scores": [_finite(row) for row in rows],
                "by_decade": decades,
                "left_out": failed,
            }
        )
    else:
        for row in rows:
            emit(f"{row['variant']}: {score_text(row)}" if len(rows) > 1 else score_text(row))
        for decade in decades:
            emit(
                f"  {decade['decade']}: MAE {decade['mae']:.2f}, bias {decade['bias']:+.1f} "
                f"({counted(decade['n'], 'scan')})"
            )
        emit(f"tables and plots in {printable(folder)}")
    return EXIT_SKIPPED if failed else EXIT_OK


def look_at(
    brain: BrainAge,
    inputs: list[Path],
    kind: InputKind,
    *,
    jobs: int,
    cache: Path | None,
    profile: str | None = None,
    unmirrored: bool = False,
    confidence: float = 0.9,
) -> tuple[Labelled, list[dict[str, Any]]]:
    """Predict the ages of scans of known age; and those that were left out, with the reason."""
    import numpy as np

    from neuro.scans.grid import crop

    site = None if profile is None else open_site(brain, profile)
    scans = labelled_scans(inputs)
    found: dict[str, tuple[Any, ...]] = {}

    def use(scan: Scan, prepared: Prepared) -> str | None:
        seen = brain.look(prepared, name=scan.name, age=scan.age)
        said = brain.estimate(seen, site=site, confidence=confidence)
        if said.age is None:
            return said.error
        plain = None
        if unmirrored:
            plain = brain.model.predict(crop(prepared.image)[None], mirror=False).by_head[0]
        found[scan.name] = (said, seen.by_head, plain)
        return None

    failed = prepare_labelled(scans, kind, jobs=jobs, cache=cache, stage="predicting", use=use)
    used = [scan for scan in scans if scan.name in found]
    said = [found[scan.name][0] for scan in used]
    return Labelled(
        names=[scan.participant_id for scan in used],
        predicted=np.array([one.age for one in said], np.float64),
        ages=np.array([scan.age for scan in used], np.float64),
        sites=[""] * len(used),
        lows=np.array([np.nan if one.low is None else one.low for one in said]),
        highs=np.array([np.nan if one.high is None else one.high for one in said]),
        by_head=np.stack([found[scan.name][1] for scan in used]),
        unmirrored=np.stack([found[scan.name][2] for scan in used]) if unmirrored else None,
        flags=[flag_text(one.flags) for one in said],
    ), failed


def _variants(brain: BrainAge, labelled: Labelled) -> list[dict[str, Any]]:
    """Scores of all networks together and of one alone, with and without the mirror image."""
    import numpy as np

    from neuro.age.model import answer
    from neuro.metrics import evaluate as scores_of

    rows = []
    for views, said in (("mirrored", labelled.by_head), ("not mirrored", labelled.unmirrored)):
        if said is None:
            continue
        ages = answer(said, brain.model.answer)  # (n, members)
        singles = [scores_of(ages[:, member], labelled.ages) for member in range(ages.shape[1])]
        together = scores_of(ages.mean(1), labelled.ages)
        mean = {name: float(np.mean([one[name] for one in singles])) for name in together}
        rows.append({"variant": f"{ages.shape[1]} networks, {views}", **together})
        rows.append({"variant": f"one network (mean of each), {views}", **mean, "n": together["n"]})
    return rows


def _rows(labelled: Labelled) -> list[dict[str, Any]]:
    told = zip(labelled.names, labelled.predicted, labelled.flags, labelled.ages, strict=True)
    return [
        {
            "participant_id": name,
            "predicted_age": round(float(predicted), 2),
            "flags": flags,
            "age": float(age),
        }
        for name, predicted, flags, age in told
    ]


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN is no JSON."""
    import numpy as np

    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in row.items()
    }
