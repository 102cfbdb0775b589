"""Do other fits and the look-up teach more than what ships? Fresh draws, paired intervals.

    python benchmarks/feedback_rules.py                       # CIFAR-10 train; writes nothing
    python benchmarks/feedback_rules.py --fold MODEL          # and photos that MODEL never saw
    python benchmarks/feedback_rules.py --report              # Flickr8k val and CIFAR-10 test, once

Users, marks and measures are those of `feedback.py`. `--fold` takes a model that was trained by the
shipped recipe (`enn search train --config long-eclip-mini --set holdout=2000`) and the photos that
it never saw, as two collections of 1,000: on the first one choices are made, the second judges
them; it writes `results/feedback_rules_unseen.csv`. `--report` draws with seeds that nothing was
chosen on and writes `results/feedback_rules.csv`: each candidate beside the untaught model and
beside what ships. Besides thirty marks, the first ten and five clicks (three good, two bad) are
taught.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from feedback import PHRASES, Draw, Results, draw, measure
from feedback_candidates import CANDIDATES, LOOKED_UP, NEW, SHIPPED
from feedback_data import Gallery, Texts, cifar10, flickr8k
from feedback_methods import Scene, Task
from record import write_rows

import retrieval
from retrieval.eval.recall import bootstrap_interval
from retrieval.model.retrieval_model import RetrievalModel

FRESH = 100  # first seed of the reported draws: none below was used to choose anything
BUDGETS = ("30 marks", "10 marks", "5 clicks")
HURT = 0.01


def fewer(task: Task, vectors: np.ndarray, budget: str) -> Task:
    """The same query with less of its marks."""
    if budget == "30 marks":
        return task
    if budget == "10 marks":
        first = set(np.argsort(-(vectors @ task.c), kind="stable")[:10].tolist())
        good, bad = ([i for i in ids if i in first] for ids in (task.good, task.bad))
    else:
        good, bad = task.good[:3].tolist(), task.bad[:2].tolist()
    return replace(task, good=np.array(good, int), bad=np.array(bad, int))


def table(results: Results, names: list[str], budget: str) -> list[dict[str, Any]]:
    rows = []
    for data in dict.fromkeys(row["data"] for row in results.concepts):
        by = {}
        for row in results.concepts:
            if row["data"] == data:
                by.setdefault(row["method"], {})[(row["seed"], row["concept"], row["held_out"])] = (
                    row
                )
        for name in names:
            own, shipped = by[name], by[SHIPPED]
            line: dict[str, Any] = {"data": data, "marks": budget, "method": name}
            taught = {key: row for key, row in own.items() if not key[2]}
            held = {key: row for key, row in own.items() if key[2]}
            pairs = {
                "same query": ("alone", "control", taught),
                "same query, after all": ("after_all", "control", taught),
                **{f"{p}": (f"{p} after_all", f"{p} control", taught) for p in PHRASES},
                "nobody taught": ("after_all", "control", held),
            }
            for measure_, (column, control, of) in pairs.items():
                keys = [
                    key
                    for key, row in of.items()
                    if not math.isnan(row.get(column, math.nan) + row.get(control, math.nan))
                ]
                if not keys:
                    continue
                value, base = (np.array([of[k][c] for k in keys]) for c in (column, control))
                ship = np.array([shipped[k][column] for k in keys])
                groups = np.unique([k[1] for k in keys], return_inverse=True)[1]
                line |= {
                    "measure": measure_,
                    "value": value.mean(),
                    "untaught": base.mean(),
                    **interval("gain", value - base, groups),
                    **interval("over_shipped", value - ship, groups),
                    "hurt": float((value < base - 1e-9).mean()),
                    "hurt_by_a_point": float((value < base - HURT).mean()),
                    "count": len(keys),
                }
                rows.append(dict(line))
            recalls = [r for r in results.recalls if r["data"] == data and r["method"] == name]
            for captions in dict.fromkeys(r["captions"] for r in recalls):
                few = [r for r in recalls if r["captions"] == captions]
                before, after = (
                    100.0 * np.concatenate([r["ranks"][i] <= 10 for r in few]) for i in (0, 1)
                )
                groups = np.concatenate([r["owners"] for r in few])
                rows.append(
                    {
                        "data": data,
                        "marks": budget,
                        "method": name,
                        "measure": f"R@10 of others, {captions}, points",
                        "value": after.mean(),
                        "untaught": before.mean(),
                        **interval("gain", after - before, groups),
                        "count": len(after),
                    }
                )
    return [{k: _short(v) for k, v in row.items()} for row in rows]


def interval(name: str, values: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values, groups, samples=2000)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["measure"] in ("captions without the word", "same query, after all"):
            continue

        def part(name: str, row=row) -> str:
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            return f"{row[name]:+.4f} [{low:+.3f}, {high:+.3f}]"

        where = f"{row['data'][:16]:16} {row['marks']:8} {row['method'][:38]:38}"
        text = f"{where} {row['measure'][:20]:20} {row['value']:.4g} {part('gain')}"
        if "over_shipped" in row:
            text += f" over {part('over_shipped')}"
            text += f" hurt {row['hurt']:.3f} ({row['hurt_by_a_point']:.3f})"
        print(text, flush=True)


def run(
    model: RetrievalModel,
    galleries: list[Gallery],
    others: Gallery,
    seeds: range,
    budgets: tuple[str, ...],
    names: list[str],
) -> list[dict[str, Any]]:
    rows = []
    for budget in budgets:
        results = Results()
        for gallery in galleries:
            for seed in seeds:
                started = time.perf_counter()
                part: Draw = draw(gallery, others, seed)
                tasks = [fewer(task, part.vectors, budget) for task in part.tasks]
                part = replace(part, tasks=tasks)
                scene = Scene(model, part.vectors)
                for name in names:
                    answers = CANDIDATES[name](scene, tasks)
                    measure(results, gallery, others, part, name, answers)
                took = time.perf_counter() - started
                print(f"{gallery.name}, {budget}, seed {seed}: {took:.0f} s", flush=True)
        found = table(results, names, budget)
        show(found)
        rows += found
    return rows


def fold_galleries(texts: Texts, data: Path) -> list[Gallery]:
    """Photos that a model trained with `holdout` 2,000 never saw."""
    from retrieval.mini.train import _hold_out

    _, held = _hold_out(6091, 2000)
    order = np.random.default_rng(5).permutation(held)
    return [
        flickr8k(texts, data, "train+restval", chosen=order[part], name=f"unseen photos {name}")
        for name, part in (("A", slice(0, 1000)), ("B", slice(1000, None)))
    ]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float | np.floating) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--fold", help="model that was trained without 2,000 photos")
    parser.add_argument("--report", action="store_true", help="the reported sets, fresh draws")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=FRESH, help="seed of the reported draws")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--small", type=int, default=200, help="CIFAR-10 train: pictures a class")
    arguments = parser.parse_args()
    data = Path(arguments.data)
    names = list(dict.fromkeys([SHIPPED, LOOKED_UP, NEW, *arguments.methods]))
    budgets = tuple(arguments.budgets)
    if arguments.report:
        model = retrieval.load()
        texts = Texts(model)
        both = [flickr8k(texts, data, "val"), cifar10(texts, data, "test")]
        seeds = range(arguments.first, arguments.first + arguments.seeds)
        print(write_rows("feedback_rules", run(model, both, both[0], seeds, budgets, names)))
        return
    seeds = range(arguments.seeds)
    if arguments.fold:
        model = retrieval.load(arguments.fold)
        both = fold_galleries(Texts(model), data)
        rows = [
            row for gallery in both for row in run(model, [gallery], gallery, seeds, budgets, names)
        ]
        print(write_rows("feedback_rules_unseen", rows))
    else:
        model = retrieval.load()
        small = cifar10(Texts(model), data, "train", arguments.small)
        run(model, [small], small, seeds, budgets, names)


if __name__ == "__main__":
    main()
