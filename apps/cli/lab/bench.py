"""`enn train bench`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.options import JsonOption, show_help
from apps.cli.terminal import (
    CommandError,
    ProgressLine,
    counted,
    emit,
    emit_json,
    printable,
    quote,
    stoppable,
)

if TYPE_CHECKING:
    from enn_core.lab.bench.suites import Suite

__all__ = ["add_bench", "core"]

bench_app = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    name="bench",
    rich_markup_mode=None,
    help="Compare learning rules on the same data, budget and initial weights.",
    epilog="""\b
Examples:
  enn train bench core --quick""",
)


def add_bench(app: typer.Typer) -> None:
    """Add `bench` to the group `enn train`."""
    app.add_typer(bench_app)


@bench_app.command(
    "core",
    epilog="""\b
Examples:
  enn train bench core --quick                     minutes; shows the direction
  enn train bench core --data-dir ~/data           everything; hours to days
  enn train bench core --cell digits-400/vit-tiny --method enn --method muon
  enn train bench core --list                      cells and methods

\b
A cell is data, number of training images and network. Every method trains it from the
same weights on the same batches, at the learning rate of its grid that is best on
validation images; the grid grows while its best rate is at an edge. Differences are to
backprop-adamw over the same seeds, with 95 % intervals by Student's t.
Every finished run is a line of OUTPUT/runs.jsonl; a later call runs what is missing.
Tables (runs.csv, table.csv, contrasts.csv) and pictures (overview.png, table.png) are
written there when it ends or is stopped.
Exit codes: 0 ok, 2 user error (no such cell, missing data, ...), 130 stopped.""",
)
def core(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two small cells, three rates, three seeds.")
    ] = False,
    large: Annotated[
        bool, typer.Option("--large", help="All of CIFAR-10 with a ResNet-18, on a CUDA device.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of runs and tables. [default: runs/bench, -quick or -large]",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory that data sets lie in. [default: $ENN_DATA]",
            show_default=False,
        ),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this cell; repeatable.", show_default=False),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only this method, in the order given; repeatable.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=0, help="Processes at once; 0: one per core.")
    ] = 0,
    list_: Annotated[
        bool, typer.Option("--list", help="List cells and methods, run none.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Compare all learning rules, each at its best rate.

    The table tells the test error over the seeds and its difference to backpropagation, processor
    time, peak memory of a step, and how well conditioned and how orthogonal the weights end.
    """
    from enn_core.lab.bench.suites import FULL, LARGE, QUICK

    if quick and large:
        raise CommandError("--quick and --large exclude each other; give one of them")
    suite = QUICK if quick else LARGE if large else FULL
    cells = _chosen("cell", cell, suite.cells, [c.name for c in suite.cells])
    methods = _chosen("method", method, suite.methods, [m.label for m in suite.methods])
    if list_:
        _list(suite, json)
        return
    output = output or Path("runs/bench" + "-quick" * quick + "-large" * large)
    if output.exists() and not output.is_dir():
        raise CommandError(f"{quote(output)} is a file; give a directory")
    from enn_core.lab.bench.bench import bench

    with ProgressLine() as line, stoppable("stopped; finished runs are kept, call again to go on"):
        lines, left_out = bench(
            suite,
            output,
            pairs=suite.pairs_of(cells, methods),
            root=data_dir,
            workers=workers or os.cpu_count() or 1,
            progress=line.show,
        )
    if json:
        reasons: dict[str, dict[str, str]] = {}
        for (in_cell, name), reason in left_out.items():
            reasons.setdefault(in_cell, {})[name] = reason
        emit_json({"output": str(output), "table": lines, "left_out": reasons})
        return
    _show(lines)
    for in_cell in dict.fromkeys(in_cell for in_cell, _ in left_out):
        names = [name for where, name in left_out if where == in_cell]
        emit(f"cannot train {in_cell}: {', '.join(names)} (--json says why)")
    rows = f"{counted(len(lines), 'row')} in {printable(output / 'table.csv')}"
    emit(f"{rows}, overview.png and table.png beside it")


def _chosen(kind: str, wanted: list[str] | None, items: Sequence[Any], names: list[str]) -> Any:
    if not wanted:
        return tuple(items)
    for name in wanted:
        if name not in names:
            raise CommandError(
                f"{kind} {printable(name)!r} is unknown; give one of {', '.join(names)}"
            )
    return tuple(items[names.index(name)] for name in wanted)


def _list(suite: Suite, json: bool) -> None:
    cells, methods = [c.name for c in suite.cells], [m.label for m in suite.methods]
    if json:
        emit_json({"cells": cells, "methods": methods})
        return
    emit("cells: " + ", ".join(cells))
    emit("methods: " + ", ".join(methods))


def _show(lines: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    for name in dict.fromkeys(line["cell"] for line in lines):
        shown = Table(title=name, title_justify="left", box=None, pad_edge=False)
        shown.add_column("method")
        for column in ("lr", "error %", "against backprop", "CPU s", "saved MB", "cond W", "drift"):
            shown.add_column(column, justify="right")
        for line in sorted(
            (line for line in lines if line["cell"] == name), key=lambda line: line["test_error"]
        ):
            shown.add_row(
                line["method"],
                f"{line['lr']:g}{'*' if line['lr_at_edge'] else ''}",
                f"{line['test_error']:.1f}"
                + ("" if line["sd"] is None else f" ± {line['sd']:.1f}"),
                _difference(line),
                f"{line['cpu_s']:.1f}",
                f"{line['saved_mb']:.2f}",
                "" if line["condition"] is None else f"{line['condition']:.3g}",
                "" if line["drift"] is None else f"{line['drift']:.1g}",
            )
        console.print(shown)
    if any(line["lr_at_edge"] for line in lines):
        emit("* the best rate is at the edge of its grid")


def _difference(line: dict[str, Any]) -> str:
    if line["difference"] is None:
        return ""
    if line["low"] is None:
        return f"{line['difference']:+.1f}"
    return f"{line['difference']:+.1f} [{line['low']:+.1f}, {line['high']:+.1f}]"
