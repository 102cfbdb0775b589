"""Writes the tables of docs/learning-rules.md from the CSV files they come from.

    python benchmarks/tables.py            # rewrites what stands between the marks
    python benchmarks/tables.py --check    # exit code 1 if the page is not what the files say

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "learning-rules.md"
RESULTS = ROOT / "benchmarks" / "results" / "core"
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, str]


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in every)


def plus_minus(mean: str, sd: str, digits: int = 1) -> str:
    text = f"{float(mean):.{digits}f}"
    return f"{text} ± {float(sd):.{digits}f}" if sd else text


def errors(name: str) -> str:
    """A bench's table: test error by cell and method, best first, with its interval."""
    lines = []
    for row in sorted(rows(name), key=lambda row: (row["cell"], float(row["test_error"]))):
        between = ""
        if row["low"]:
            less, low, high = (float(row[name]) for name in ("difference", "low", "high"))
            between = f"{less:+.1f} ({low:+.1f} to {high:+.1f})"
        edge = ", at the grid's edge" if row["lr_at_edge"] == "True" else ""
        lines.append(
            [
                row["cell"],
                row["method"],
                plus_minus(row["test_error"], row["sd"]),
                between,
                f"{float(row['lr']):g}{edge}",
                row["seeds"],
                row["cpu_s"],
            ]
        )
    heads = ["data / network", "rule", "test error, %", "against backprop (95 %)", "rate", "seeds"]
    return markdown([*heads, "CPU s"], lines)


def deep() -> str:
    """LOCO and its controls in deep nets: test accuracy."""
    names = {"none": "node perturbation", "mean": "mean input projected out", "loco": "LOCO"}
    lines = [
        [
            f"{row['data']}, {row['depth']} layers, {row['steps']} steps",
            names.get(row["method"], row["method"]),
            plus_minus(row["test"], row["sd"]),
            f"{float(row['lr']):g}" + (", at the grid's edge" if row["edge"] == "True" else ""),
            row["seeds"],
            row["run_cpu_s"],
        ]
        for row in rows("loco_deep_summary.csv")
    ]
    return markdown(["net", "rule", "test accuracy, %", "rate", "seeds", "CPU s"], lines)


def continual() -> str:
    """Two tasks one after the other: what is kept of the first, and learnt of the second."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows("loco_continual_summary.csv"):
        key = tuple(row[name] for name in ("data", "scenario", "rule", "setting"))
        lines[key] = [
            f"{row['data']}, {row['scenario']}-incremental",
            row["rule"],
            row["setting"],
            f"{100 * float(row['kept']):.1f}",
            f"{100 * float(row['learnt']):.1f}",
            row["seeds"],
        ]
    heads = ["stream", "rule", "protection", "kept of task 1, %", "task 2, %", "seeds"]
    return markdown(heads, list(lines.values()))


def sequential() -> str:
    """Operations of one update that wait for each other, by depth."""
    found = rows("loco_sequential.csv")
    depths = sorted({int(row["depth"]) for row in found})
    rules = list(dict.fromkeys(row["rule"] for row in found))
    after = {(row["rule"], int(row["depth"])): row["after_loss"] for row in found}
    lines = [[rule, *(after.get((rule, depth), "") for depth in depths)] for rule in rules]
    return markdown(["rule", *(f"{depth} layers" for depth in depths)], lines)


TABLES: dict[str, Callable[[], str]] = {
    "quick": lambda: errors("quick/table.csv"),
    "deep": deep,
    "continual": continual,
    "sequential": sequential,
}


def filled(page: str) -> str:
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if options.check:
        sys.exit(new != page)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
