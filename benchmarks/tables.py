"""Writes the tables of README.md and docs/learning-rules.md from the CSV files they come from.

    python benchmarks/tables.py            # rewrites what stands between the marks
    python benchmarks/tables.py --check    # exit code 1 if a page is not what the files say

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "learning-rules.md")
RESULTS = ROOT / "benchmarks" / "results" / "core"
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, str]


def rows(name: str, folder: Path = RESULTS) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in every)


def plus_minus(mean: str, sd: str, digits: int = 1) -> str:
    text = f"{float(mean):.{digits}f}"
    return f"{text} ± {float(sd):.{digits}f}" if sd else text


def difference(row: Row) -> str:
    """A difference in points with its interval, as far as a row has them."""
    if not row["difference"]:
        return ""
    less = f"{float(row['difference']):+.1f}"
    return f"{less} ({float(row['low']):+.1f} to {float(row['high']):+.1f})" if row["low"] else less


def errors(name: str) -> str:
    """A bench's table: test error by cell and method, best first, with its interval."""
    lines = []
    for row in sorted(rows(name), key=lambda row: (row["cell"], float(row["test_error"]))):
        edge = ", at the grid's edge" if row["lr_at_edge"] == "True" else ""
        lines.append(
            [
                row["cell"],
                row["method"],
                plus_minus(row["test_error"], row["sd"]),
                difference(row),
                f"{float(row['lr']):g}{edge}",
                row["seeds"],
                row["cpu_s"],
            ]
        )
    heads = ["data / network", "rule", "test error, %", "against backprop (95 %)", "rate", "seeds"]
    return markdown([*heads, "CPU s"], lines)


MAIN = ("backprop-adamw", "enn", "enn-penalty", "muon", "ocnn", "local-enn", "dgl")


def matrix() -> str:
    """Test error of the main rules in every cell of the full bench; the best of them in bold."""
    found = {(row["cell"], row["method"]): row for row in rows("table.csv")}
    lines = []
    for cell in dict.fromkeys(cell for cell, _ in found):
        here = {m: found[cell, m] for m in MAIN if (cell, m) in found}
        best = min(float(row["test_error"]) for row in here.values())
        line = [cell]
        for method in MAIN:
            row = here.get(method)
            text = plus_minus(row["test_error"], row["sd"]) if row else ""
            line.append(f"**{text}**" if row and float(row["test_error"]) == best else text)
        lines.append(line)
    return markdown(["data / network", *(f"`{method}`" for method in MAIN)], lines)


def network_of(cell: str) -> str:
    return cell.partition("/")[2].partition(":")[0]


def full(network: str) -> str:
    """All rules on the cells of one network: error, and its difference to backprop."""
    found = {
        (row["cell"], row["method"]): row
        for row in rows("table.csv")
        if network_of(row["cell"]) == network
    }
    cells = list(dict.fromkeys(cell for cell, _ in found))
    best = {
        c: min(float(r["test_error"]) for (at, _), r in found.items() if at == c) for c in cells
    }
    lines = []
    for method in dict.fromkeys(method for _, method in found):
        line = [f"`{method}`" if "heads" not in method else method]
        for cell in cells:
            row = found.get((cell, method))
            text = plus_minus(row["test_error"], row["sd"]) if row else ""
            if row and float(row["test_error"]) == best[cell]:
                text = f"**{text}**"
            if row and row["lr_at_edge"] == "True":
                text += " (rate at the grid's edge)"
            if row and row["difference"]:
                text += f"<br>{difference(row)}"
            line.append(text)
        lines.append(line)
    return markdown(["rule", *cells], lines)


def median(values: Iterable[float], digits: int) -> str:
    found = list(values)
    return f"{statistics.median(found):.{digits}f}" if found else ""


def costs() -> str:
    """What a rule costs in parts of backprop with AdamW, median over the cells of a network."""
    found = {(row["cell"], row["method"]): row for row in rows("table.csv")}
    networks = list(dict.fromkeys(network_of(cell) for cell, _ in found))

    def against(row: Row, column: str) -> float:
        return float(row[column]) / float(found[row["cell"], "backprop-adamw"][column])

    lines = []
    for method in dict.fromkeys(method for _, method in found):
        if "heads" in method:
            continue
        own = [row for (_, name), row in found.items() if name == method]
        here = [[row for row in own if network_of(row["cell"]) == network] for network in networks]
        line = [f"`{method}`"]
        for column in ("cpu_s", "saved_mb"):
            line += [median((against(row, column) for row in part), 2) for part in here]
        line += [median((float(row["condition"]) for row in part), 0) for part in here]
        line.append(median((against(row, "stored") for row in own), 2))
        drifts = [float(row["drift"]) for row in own if row["drift"]]
        line.append(f"{max(drifts):.0e}" if drifts else "")
        lines.append(line)
    heads = [
        f"{what}, {network}" for what in ("CPU", "memory", "condition") for network in networks
    ]
    return markdown(["rule", *heads, "stored", "largest drift"], lines)


def claims() -> str:
    """Errors against backprop, in parts of its error: the papers' and ours."""
    theirs, ours = published(), rows("table.csv")
    cells = list(dict.fromkeys(row["cell"] for row in ours))
    error = {(row["cell"], row["method"]): float(row["test_error"]) for row in ours}

    def changes(rule: str, network: str) -> str:
        found = [
            _change(error.get((cell, rule)), error.get((cell, "backprop-adamw")))
            for cell in cells
            if network_of(cell) == network
        ]
        return " / ".join(text or "–" for text in found)

    lines = []
    for rule, name in (
        ("enn", "ENN"),
        ("enn-penalty", "ENN"),
        ("local-enn", "ENN-l"),
        ("srip", "SRIP"),
        ("ocnn", "OCNN"),
        ("dgl", "DGL"),
    ):
        paper = []
        for data, networks in (("cifar10", RESNETS), ("imagenet", RESNETS), ("imagenet", VIT)):
            found = [
                _change(_published(theirs, data, name, net), _published(theirs, data, "BP", net))
                for net in networks
            ]
            paper.append(" / ".join(text for text in found if text))
        small, vit = changes(rule, "resnet-small"), changes(rule, "vit-tiny")
        lines.append([f"`{rule}`", *paper[:2], small, paper[2], vit])
    data = {
        network: " / ".join(cell.partition("/")[0] for cell in cells if network_of(cell) == network)
        for network in ("resnet-small", "vit-tiny")
    }
    heads = [
        "paper: CIFAR-10, ResNet-50 / 101 / 152",
        "paper: ImageNet, the same",
        f"ours: resnet-small, {data['resnet-small']}",
        "paper: ImageNet, ViT-B/16",
        f"ours: vit-tiny, {data['vit-tiny']}",
    ]
    return markdown(["rule", *heads], lines)


def without_backprop() -> str:
    """Errors of rules without end-to-end backprop: as the ENN paper quotes them, and ours."""
    theirs, ours = published(), rows("table.csv")
    cells = [cell for cell in dict.fromkeys(row["cell"] for row in ours) if "/mlp" in cell]
    error = {(row["cell"], row["method"]): plus_minus(row["test_error"], row["sd"]) for row in ours}
    lines = []
    for rule, name in (
        ("local-enn", "ENN-l"),
        ("dfa", "DFA"),
        ("mono-forward", "Mono-Forward"),
        ("forward-forward", "Forward-Forward"),
    ):
        quoted = _published(theirs, "cifar10", name, "as published")
        line = [f"`{rule}`", f"{quoted:g}"]
        lines.append([*line, *(error.get((cell, rule), "") for cell in cells)])
    return markdown(["rule", "paper: CIFAR-10, best network", *cells], lines)


def published() -> list[dict[str, str]]:
    """Numbers of arXiv 2508.01219 that can be compared with ours."""
    return rows("published.csv", ROOT / "benchmarks")


RESNETS, VIT = ("resnet50", "resnet101", "resnet152"), ("vit_b16",)


def _published(
    theirs: Sequence[Row], data: str, method: str, network: str, metric: str = "top1_error_pct"
) -> float | None:
    for row in theirs:
        place = (row["metric"], row["dataset"], row["method"], row["backbone"])
        if place == (metric, data, method, network):
            return float(row["value"])
    return None


def _change(error: float | None, baseline: float | None) -> str:
    return "" if error is None or not baseline else f"{100 * (error / baseline - 1):+.0f} %"


def speed() -> str:
    """How much faster local training is than backprop: the paper's devices and our processes."""
    names = {"vit-s 224 b8": "ViT-S", "resnet-50 64 b32": "ResNet-50"}
    seconds = {
        (row["network"], row["schedule"]): float(row["seconds_per_step"])
        for row in rows("local_pipeline.csv", RESULTS.parent)
    }
    lines = [
        [
            "ImageNet, four A100",
            network,
            f"{_published(published(), 'imagenet', 'ENN-l', backbone, 'speedup'):g}",
        ]
        for backbone, network in (
            ("resnet101", "ResNet-101"),
            ("resnet152", "ResNet-152"),
            ("vit_b16", "ViT-B/16"),
        )
    ]
    for key, network in names.items():
        for of in ("1 thread", "2 threads"):
            slow = seconds[key, f"backprop, {of}"]
            ratio = slow / seconds[key, "pipeline"]
            lines.append([f"ours: two processes, backprop on {of}", network, f"{ratio:.2f}"])
    return markdown(["where", "network", "backprop's time in parts of ENN-ℓ's"], lines)


def parameters() -> str:
    """Parameters in millions: the paper's number, and ours stored and fused."""
    paper = {"resnet101": "44.61", "resnet152": "60.22", "vit-b16": "86.97"}
    lines = [
        [
            row["network"],
            paper.get(row["network"], ""),
            *(f"{int(row[name]) / 1e6:.2f}" for name in ("plain", "stored", "trainable", "fused")),
        ]
        for row in rows("parameters.csv")
    ]
    return markdown(["network", "paper", "plain", "stored", "trainable", "fused"], lines)


def contrasts(name: str) -> str:
    """Questions about two methods, per cell: the first one's error less the second one's."""
    found = rows(name)
    pairs = list(dict.fromkeys((row["method"], row["against"]) for row in found))
    cells = list(dict.fromkeys(row["cell"] for row in found))
    text = {}
    for row in found:
        text[row["cell"], row["method"], row["against"]] = difference(row)
    lines = [
        [f"{method} less {other}", *(text.get((cell, method, other), "") for cell in cells)]
        for method, other in pairs
    ]
    return markdown(["", *cells], lines)


PROJECTIONS = {
    "none": "node perturbation",
    "low-rank": "its low-rank part alone",
    "cluster": "its clusters alone",
    "mean": "mean input projected out",
    "loco": "LOCO",
}


def deep() -> str:
    """LOCO and its controls in deep nets: test accuracy."""
    lines = [
        [
            f"{row['data']}, {row['depth']} layers, {row['steps']} steps",
            PROJECTIONS.get(row["method"], row["method"]),
            plus_minus(row["test"], row["sd"]),
            f"{float(row['lr']):g}" + (", at the grid's edge" if row["edge"] == "True" else ""),
            row["seeds"],
            row["run_cpu_s"],
        ]
        for row in rows("loco_deep_summary.csv")
    ]
    lines.sort(key=lambda line: line[0])
    return markdown(["net", "rule", "test accuracy, %", "rate", "seeds", "CPU s"], lines)


def spiking() -> str:
    """Spiking nets that are perturbed and trained themselves: test accuracy."""
    lines = []
    for row in rows("loco_spiking_summary.csv"):
        leaky = row["leak"] != "1.0"
        neuron = f"leaky ({float(row['leak']):g})" if leaky else "integrate-and-fire"
        lines.append(
            [
                f"{row['net']}, {row['depth']} layers, {row['steps']} steps",
                f"{neuron}, {row['coding']} input",
                PROJECTIONS[row["method"]],
                plus_minus(row["test"], row["sd"]),
                f"{float(row['lr']):g}" + (", not searched" if row["edge"] == "True" else ""),
                row["seeds"],
            ]
        )
    return markdown(["net", "neurons", "rule", "test accuracy, %", "rate", "seeds"], lines)


def choices() -> str:
    """One choice of LOCO's training changed at a time: test accuracy by projection."""
    found = rows("loco_choices.csv")
    text = {(row["choice"], row["method"]): f"{float(row['test']):.1f}" for row in found}
    methods = ("mean", "none")
    lines = [
        [choice, *(text.get((choice, method), "") for method in methods)]
        for choice in dict.fromkeys(row["choice"] for row in found)
    ]
    return markdown(["changed", *(PROJECTIONS[method] for method in methods)], lines)


def continual() -> str:
    """Tasks one after the other: what is kept of earlier ones, and learnt of later ones."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows("loco_continual_summary.csv"):
        key = tuple(row[name] for name in ("data", "scenario", "rule", "setting", "steps"))
        kind = row["scenario"]
        kind = "permuted, three tasks" if kind == "permuted" else f"{kind}-incremental"
        lines[key] = [
            f"{row['data']}, {kind}",
            row["rule"] + (f", {row['steps']} steps" if row["steps"] != "500" else ""),
            row["setting"],
            f"{100 * float(row['kept']):.1f}",
            f"{100 * float(row['learnt']):.1f}",
            row["seeds"],
        ]
    heads = ["stream", "rule", "protection", "kept, %", "learnt, %", "seeds"]
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
    "matrix": matrix,
    "full-vit": lambda: full("vit-tiny"),
    "full-mlp": lambda: full("mlp"),
    "full-resnet": lambda: full("resnet-small"),
    "costs": costs,
    "speed": speed,
    "quick-contrasts": lambda: contrasts("quick/contrasts.csv"),
    "contrasts": lambda: contrasts("contrasts.csv"),
    "claims": claims,
    "without-backprop": without_backprop,
    "parameters": parameters,
    "deep": deep,
    "spiking": spiking,
    "choices": choices,
    "continual": continual,
    "sequential": sequential,
}


def filled(page: str) -> str:
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: filled(text) for page, text in pages.items()}
    if options.check:
        sys.exit(new != pages)
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
