"""`enn brain explain`: which places of a brain make it look older or younger."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.brain.group import (
    BrainModelOption,
    CacheOption,
    InputOption,
    JobsOption,
    NoCacheOption,
    ScansArgument,
    cache_folder,
    flag_text,
    load_brain,
    output_folder,
    prepare,
    write_table,
)
from apps.cli.options import JsonOption
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    ProgressLine,
    counted,
    emit,
    emit_json,
    printable,
    stoppable,
)

if TYPE_CHECKING:
    import numpy as np

    from neuro.scans.batch import Outcome
    from neuro.scans.find import Scan
    from neuro.scans.preprocess import Prepared

__all__ = ["app", "explain"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "explain",
    epilog="""\b
Examples:
  enn brain explain scan.nii.gz --out why
  enn brain explain scan.nii.gz --out why --method gradient

\b
Writes to --out, for each scan: NAME_METHOD.nii.gz (a map on the scan's own grid, for
any viewer) and NAME_METHOD.png (slices of the registered brain, what makes it look
older in red); explain.csv has the predicted ages, their flags, and why a scan was
refused.
occlusion hides one place after the other and tells the years that each adds (minutes);
gradient tells the years for 10 % more brightness in 1 cm3 (seconds). Both show what the
model reacts to, which need not be what ages.

\b
Exit codes: 0 ok, 1 finished, but some scans were refused, 2 user error, 130 stopped by
Ctrl-C.""",
)
def explain(
    scans: ScansArgument,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder to write to.", show_default=False),
    ],
    method: Annotated[str, typer.Option(metavar="occlusion|gradient", help="See below.")] = (
        "occlusion"
    ),
    input: InputOption = "head",
    model: BrainModelOption = None,
    jobs: JobsOption = 1,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    json: JsonOption = False,
) -> int:
    """Map what a model's predicted age depends on, in the space of the scan."""
    from neuro.age.explain import UNITS
    from neuro.age.explain import explain as explain_
    from neuro.scans.find import find_scans
    from neuro.scans.preprocess import check_kind

    kind = check_kind(input)
    if method not in UNITS:
        raise CommandError(f"got --method {method}, valid are {' and '.join(UNITS)}")
    kept = cache_folder(cache, no_cache)
    found = find_scans(scans)
    brain = load_brain(model)
    folder = output_folder(out)

    ready: dict[str, Prepared] = {}

    def each(outcome: Outcome) -> dict[str, Any]:
        row: dict[str, Any] = {"file": str(outcome.scan.path), "flags": "", "error": outcome.error}
        row |= {"predicted_age": None, "map": None, "largest": None}
        if outcome.prepared is None:
            return row
        said = brain.estimate(brain.look(outcome.prepared, age=outcome.scan.age))
        if said.age is None:
            return row | {"error": said.error}
        ready[outcome.scan.name] = outcome.prepared
        return row | {"predicted_age": round(said.age, 2), "flags": flag_text(said.flags)}

    rows = prepare(found, kind, jobs=jobs, cache=kept, stage="preparing", each=each)
    with stoppable("stopped; the maps that are written stay"), ProgressLine() as line:
        for scan, row in zip(found, rows, strict=True):
            if scan.name in ready:
                values = explain_(
                    brain.model,
                    ready[scan.name].image,
                    method,
                    progress=partial(line.show, f"explaining {printable(scan.name)}"),
                )
                row["map"], top = _write(scan, ready[scan.name], values, method, folder)
                row["largest"] = round(top, 3)
    columns = ("file", "predicted_age", "flags", "map", "largest", "error")
    rows = [{name: row[name] for name in columns} for row in rows]
    write_table(folder / "explain.csv", columns, rows)
    failed = sum(bool(row["error"]) for row in rows)
    if json:
        emit_json({"method": method, "unit": UNITS[method], "scans": rows, "failed": failed})
    else:
        emit(f"{counted(len(rows) - failed, 'map')} ({UNITS[method]}) in {printable(out)}")
    return EXIT_SKIPPED if failed else EXIT_OK


def _write(
    scan: Scan, prepared: Prepared, values: np.ndarray, method: str, folder: Path
) -> tuple[str, float]:
    """Write map and picture of one scan; the map's name and its value of full colour."""
    import gzip

    from enn_core.files.atomic import replacing
    from neuro.age.explain import UNITS, save_overlay
    from neuro.scans.preprocess import to_native
    from neuro.scans.read import read_volume

    native = to_native(values, prepared.to_mni, read_volume(scan.path))
    name = f"{scan.name}_{method}"
    with replacing(folder / f"{name}.nii.gz") as temporary:
        temporary.write_bytes(gzip.compress(native.to_bytes(), 6, mtime=0))
    top = save_overlay(prepared.image, values, folder / f"{name}.png", unit=UNITS[method])
    return f"{name}.nii.gz", top
