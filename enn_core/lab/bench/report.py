"""The tables of the bench: CSV of runs, CSV and picture of what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from enn_core.files.tables import write_table
from enn_core.lab.bench.one_run import Cell, Run
from enn_core.lab.bench.plan import Choice, Row, missing
from enn_core.lab.bench.statistics import paired, spread
from enn_core.lab.bench.suites import BASELINE, CONTRASTS, Suite

__all__ = ["contrasts", "table", "write"]

_COSTS = ("cpu_s", "wall_s", "saved_mb", "condition", "drift")
_COUNTS = ("stored", "trainable", "fused")
_ORIGIN = ("commit", "machine", "torch", "date", "command")


def table(suite: Suite, rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """One row per cell and method whose rate has been chosen.

    Columns: "cell", "method", "lr", "tried" (rates), "lr_at_edge", "seeds" (how many are
    finished), "test_error" (mean, percent), "sd", "difference" to backprop with AdamW over the same
    seeds, with its 95 % interval by Student's t ("low", "high"), means of the costs ("saved_mb":
    peak of one step; "condition": median over weights), "diverged" (runs).
    """
    made = []
    for cell in suite.cells:
        results = _results(suite, cell, rows)
        baseline = _by_seed(results[BASELINE][1]) if BASELINE in results else {}
        for label, (choice, found) in results.items():
            made.append(_line(cell.name, label, choice, found, baseline))
    return made


def contrasts(suite: Suite, rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """`CONTRASTS` where both methods have finished runs, one row per cell.

    Columns: "cell", "method", "against", "difference" of the test errors (percent, mean over the
    "seeds" both have), "low", "high": its 95 % interval by Student's t.
    """
    made = []
    for cell in suite.cells:
        errors = {
            label: _by_seed(found) for label, (_, found) in _results(suite, cell, rows).items()
        }
        for method, other in CONTRASTS:
            compared = paired(errors.get(method, {}), errors.get(other, {}))
            if compared is None:
                continue
            difference, limits = compared
            made.append(
                {
                    "cell": cell.name,
                    "method": method,
                    "against": other,
                    "difference": _short(difference),
                    "low": _short(limits[0] if limits else None),
                    "high": _short(limits[1] if limits else None),
                    "seeds": len(errors[method].keys() & errors[other].keys()),
                }
            )
    return made


def _results(
    suite: Suite, cell: Cell, rows: Mapping[str, Row]
) -> dict[str, tuple[Choice, list[Row]]]:
    """Per method whose rate has been chosen: the choice, and its finished runs at that rate."""
    results = {}
    for method in suite.methods:
        _, choice = missing(cell, method, suite.seeds, rows)
        if choice is None:
            continue
        keys = [Run(cell, method, choice.lr, seed, refit=cell.refit).key for seed in suite.seeds]
        found = [rows[key] for key in keys if key in rows]
        if found:
            results[method.label] = (choice, found)
    return results


def _line(
    cell: str, label: str, choice: Choice, found: Sequence[Row], baseline: Mapping[int, float]
) -> dict[str, Any]:
    errors = _by_seed(found)
    compared = paired(errors, baseline) if label != BASELINE else None
    difference, limits = compared or (None, None)
    line: dict[str, Any] = {
        "cell": cell,
        "method": label,
        "lr": choice.lr,
        "tried": " ".join(f"{lr:g}" for lr in choice.tried),
        "lr_at_edge": choice.at_edge,
        "seeds": len(found),
        "test_error": _short(fmean(errors.values())),
        "sd": _short(spread(list(errors.values()))),
        "difference": _short(difference),
        "low": _short(limits[0] if limits else None),
        "high": _short(limits[1] if limits else None),
    }
    for name in _COSTS:
        values = [row[name] for row in found if row.get(name) is not None]
        middle = median if name.endswith("_s") else fmean  # a busy machine spoils single times
        line[name] = _short(middle(values)) if values else None
    for name in _COUNTS:
        line[name] = found[-1].get(name)  # the same for all seeds
    line["diverged"] = sum(bool(row["diverged"]) for row in found)
    for name in _ORIGIN:
        line[name] = found[-1].get(name, "")
    return line


def _by_seed(rows: Iterable[Row]) -> dict[int, float]:
    return {row["seed"]: row["test_error"] for row in rows}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def write(suite: Suite, rows: Mapping[str, Row], folder: Path) -> None:
    """Write `runs.csv` (all finished runs), `table.csv`, `contrasts.csv` and two pictures.

    `table.png` has the errors of every cell, `overview.png` all of them against backprop's.
    """
    order = sorted(rows.values(), key=lambda r: (r["cell"], r["method"], r["lr"], r["seed"]))
    write_table(({k: v for k, v in r.items() if k != "key"} for r in order), folder / "runs.csv")
    lines = table(suite, rows)
    if lines:
        write_table(lines, folder / "table.csv")
        plot(suite, lines, rows, folder / "table.png")
        plot_overview(suite, lines, folder / "overview.png")
    if compared := contrasts(suite, rows):
        write_table(compared, folder / "contrasts.csv")


def plot(
    suite: Suite, lines: Sequence[Mapping[str, Any]], rows: Mapping[str, Row], file: Path
) -> None:
    """Test error of every method, a panel per cell: mean and deviation, a dot per seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    refit = {cell.name: cell.refit for cell in suite.cells}
    cells = list(dict.fromkeys(line["cell"] for line in lines))
    counts = [sum(line["cell"] == cell for line in lines) for cell in cells]
    across = min(3, len(cells))
    heights = [max(counts[i : i + across]) for i in range(0, len(cells), across)]
    size = (5 * across, 0.9 * len(heights) + 0.2 * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(heights), across, squeeze=False, height_ratios=heights).ravel()
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    for axes, cell in zip(panels, cells, strict=False):
        here = sorted(
            (line for line in lines if line["cell"] == cell), key=lambda line: -line["test_error"]
        )
        for height, line in enumerate(here):
            seen = [
                row["test_error"]
                for row in rows.values()
                if (row["cell"], row["method"], row["lr"]) == (cell, line["method"], line["lr"])
                and row["seed"] in suite.seeds
                and row["refit"] == refit[cell]
            ]
            axes.plot(seen, [height] * len(seen), ".", color="0.7", markersize=4)
            axes.errorbar(
                line["test_error"], height, xerr=line["sd"] or 0.0, fmt="o", markersize=4,
                color="tab:orange" if "enn" in line["method"] else "tab:blue",
            )  # fmt: skip
            if line["method"] == BASELINE:
                axes.axvline(line["test_error"], color="0.8", zorder=0)
        axes.set_yticks(range(len(here)), [line["method"] for line in here], fontsize=8)
        axes.set_ylim(-0.6, len(here) - 0.4)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(cell, fontsize=9, loc="left")
        axes.set_xlabel("test error (%)", fontsize=8)
    figure.savefig(file, dpi=120)


def plot_overview(suite: Suite, lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Every method's error in parts of the baseline's: a column per cell, by network.

    Bold: the interval of the difference leaves zero out.
    """
    from matplotlib.figure import Figure

    base = {line["cell"]: line["test_error"] for line in lines if line["method"] == BASELINE}
    networks = list(dict.fromkeys(_network(cell) for cell in base))
    cells = sorted(base, key=lambda cell: networks.index(_network(cell)))
    found = {line["method"] for line in lines} - {BASELINE}
    methods = [method.label for method in suite.methods if method.label in found]
    if not methods or not cells:
        return
    figure = Figure(
        figsize=(2.2 + 0.75 * len(cells), 2 + 0.27 * len(methods)), layout="constrained"
    )
    axes = figure.subplots()
    ratios = np.full((len(methods), len(cells)), np.nan)
    for line in lines:
        if line["method"] == BASELINE or not base.get(line["cell"]):
            continue
        place = methods.index(line["method"]), cells.index(line["cell"])
        ratios[place] = line["test_error"] / base[line["cell"]]
        sure = line["low"] is not None and (line["low"] > 0 or line["high"] < 0)
        axes.text(
            place[1], place[0], f"{ratios[place]:.2f}", ha="center", va="center", fontsize=8,
            weight="bold" if sure else "normal", color="black" if sure else "0.4",
        )  # fmt: skip
    axes.imshow(np.log2(ratios), cmap="RdYlGn_r", vmin=-2, vmax=2, aspect="auto", alpha=0.7)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.set_xticks(range(len(cells)), cells, fontsize=8, rotation=45, ha="right")
    axes.set_title(f"test error, in parts of {BASELINE}'s", fontsize=9, loc="left")
    figure.savefig(file, dpi=120)


def _network(cell: str) -> str:
    """Its name without options."""
    return cell.partition("/")[2].partition(":")[0]
