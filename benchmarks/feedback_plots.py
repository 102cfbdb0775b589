"""Pictures of the feedback benchmarks, from their CSV files, into `docs/images`.

python benchmarks/feedback_plots.py
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import RESULTS

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLOURS = {"Flickr8k val": "#2166ac", "CIFAR-10 test": "#e08214"}
PANELS = {
    "AP same query, alone": "same query, alone",
    "AP same query, after all": "same query,\nafter all are taught",
    "AP paraphrases, after all": "paraphrases",
    "R@10 unrelated, any caption": "unrelated captions,\nR@10 in points",
    "share hurt, after all": "share of queries hurt",
}
TARGETS = {"lookup": (50, 100), "local": (150, 800)}  # ms at 100,000 and at 1,000,000


def main() -> None:
    print(quality(_read("feedback")))
    print(concepts(_read("feedback_concepts")))
    print(speed(_read("feedback_speed")))


def quality(rows: list[dict[str, str]]) -> Path:
    """Differences from the untaught model, by method."""
    plain = [row for row in rows if not row["against"]]
    methods = [m for m in dict.fromkeys(row["method"] for row in plain) if m != "none"]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (measure, title) in zip(axes, PANELS.items(), strict=True):
        for number, (data, colour) in enumerate(COLOURS.items()):
            found = {r["method"]: r for r in plain if (r["data"], r["measure"]) == (data, measure)}
            if measure.startswith("share"):  # of queries that keep nothing: alone
                for row in plain:
                    if (row["data"], row["measure"]) == (data, "share hurt, alone"):
                        found.setdefault(row["method"], row)
            for place, method in enumerate(methods):
                if method in found:
                    _interval(axis, found[method], place + 0.3 * number - 0.15, colour, data)
        axis.axvline(0, color="#999999", linewidth=0.8)
        if measure.startswith("R@"):  # fine-tuning loses fifty points, the others one
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xticks([-50, -10, -1, 0, 1], ["-50", "-10", "-1", "0", "1"])
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        "Teaching by marks: differences of average precision from the untaught model, pictures "
        "never shown, 95 % intervals",
        fontsize=11,
    )
    return _save(figure, "feedback")


def concepts(rows: list[dict[str, str]]) -> Path:
    """Every concept before and after."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axis, method in zip(figure.subplots(1, 2, sharey=True), ("adapter", "local"), strict=True):
        for data, colour in COLOURS.items():
            points = [
                (float(row["control"]), float(row["after_all"]))
                for row in rows
                if (row["data"], row["method"]) == (data, method)
                and row["held_out"] == "False"
                and row["after_all"] not in ("", "nan")
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True), "o", color=colour, alpha=0.5, ms=4, label=data
                )
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="AP untaught", title=method, aspect="equal")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        if method == "adapter":
            axis.set_ylabel("AP after all concepts are taught")
    return _save(figure, "feedback_concepts")


def speed(rows: list[dict[str, str]]) -> Path:
    """Click to new ranking, beside the targets."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for rule, colour in zip(TARGETS, COLOURS.values(), strict=True):
        wanted = (rule, "lesson: click to new ranking")
        found = [row for row in rows if (row["rule"], row["measured"]) == wanted]
        sizes = [int(row["vectors"]) for row in found]
        for column, style in (("wall_ms", "o-"), ("cpu_ms", "o:")):
            times = [float(row[column]) for row in found]
            label = f"{rule}, {'time' if column == 'wall_ms' else 'CPU time'}"
            axis.plot(sizes, times, style, color=colour, label=label)
        axis.plot(
            [100_000, 1_000_000], TARGETS[rule], "_", ms=18, mew=2, color=colour,
            label=f"{rule}, target",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="vectors", ylabel="click to new ranking, ms")
    axis.set_yticks([20, 50, 100, 200, 400, 800], ["20", "50", "100", "200", "400", "800"])
    axis.set_yticks([], minor=True)
    axis.set_xticks([10_000, 100_000, 1_000_000], ["10,000", "100,000", "1,000,000"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return _save(figure, "feedback_speed")


def _interval(axis: Axes, row: dict[str, str], place: float, colour: str, label: str) -> None:
    value, low, high = (float(row[key]) for key in ("difference", "low", "high"))
    axis.plot([low, high], [place, place], color=colour, linewidth=1.5)
    axis.plot(value, place, "o", color=colour, markersize=4, label=label)


def _save(figure: Figure, name: str) -> Path:
    path = IMAGES / f"{name}.webp"
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 85})
    return path


def _read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
